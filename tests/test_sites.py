"""Which weights are taken, which are left alone and why, and which modules are blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from quaff_fx.config import QuaffConfig
from quaff_fx.errors import ConfigError
from quaff_fx.numerics import INT32_MAX_REDUCTION
from quaff_fx.sites import HEAD_FEATURES, Site, choose_blocks, find_blocks, find_sites


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(self.norm(x)))
        return result


class Decoder(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block() for _ in range(blocks)])
        self.lm_head = nn.Linear(8, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.lm_head(x)
        return result


def frozen_decoder(blocks: int = 3) -> Decoder:
    return Decoder(blocks).requires_grad_(False)


def chosen(model: nn.Module, **config: object) -> dict[str, Site]:
    """The sites by the name of their weight, once the blocks are chosen."""
    given = QuaffConfig(**config)  # type: ignore[arg-type]
    sites = find_sites(model, given)
    choose_blocks(model, sites, given)
    return {site.weight_name: site for site in sites}


def reasons(model: nn.Module, **config: object) -> dict[str, str]:
    return {site.name: site.reason for site in chosen(model, **config).values()}


# --- sites -------------------------------------------------------------------------------------------------------


def test_every_frozen_matrix_is_a_site_but_embeddings_and_vectors_are_none() -> None:
    sites = find_sites(frozen_decoder(1), QuaffConfig())
    assert [(site.weight_name, site.shape, site.dtype, site.reason) for site in sites] == [
        ("layers.0.up.weight", (16, 8), torch.float32, ""),
        ("layers.0.down.weight", (8, 16), torch.float32, ""),
        ("lm_head.weight", (10, 8), torch.float32, ""),
    ]


def test_a_site_knows_its_module() -> None:
    model = frozen_decoder(1)
    site = find_sites(model, QuaffConfig())[0]
    assert site.module is model.layers[0].up  # type: ignore[union-attr]
    assert (site.name, site.parameter) == ("layers.0.up", "weight")


def test_the_root_itself_may_be_a_site() -> None:
    (site,) = find_sites(nn.Linear(4, 4).requires_grad_(False), QuaffConfig())
    assert (site.name, site.weight_name, site.reason) == ("", "weight", "")


def test_a_parameter_of_the_users_own_module_is_a_site() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(4, 6), requires_grad=False)
            self.nothing = nn.Parameter(torch.zeros(4), requires_grad=False)
            self.register_parameter("missing", None)

    assert [site.weight_name for site in find_sites(nn.ModuleDict({"own": Own()}), QuaffConfig())] == ["own.matrix"]


def trainable(model: Decoder) -> None:
    model.layers[0].up.weight.requires_grad_(True)  # type: ignore[union-attr]


def three_dimensional(model: Decoder) -> None:
    model.layers[0].up.weight = nn.Parameter(torch.zeros(2, 16, 8), requires_grad=False)  # type: ignore[union-attr]


def shared(model: Decoder) -> None:
    model.layers[0].up.weight = model.layers[1].up.weight  # type: ignore[union-attr]


def tied_to_the_embedding(model: Decoder) -> None:
    model.layers[0].up.weight = model.embed.weight  # type: ignore[union-attr]


def double(model: Decoder) -> None:
    model.layers[0].up.double()  # type: ignore[union-attr]


def int8(model: Decoder) -> None:
    weight = torch.zeros(16, 8, dtype=torch.int8)
    model.layers[0].up.weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[union-attr]


def on_meta(model: Decoder) -> None:
    model.layers[0].up.to("meta")  # type: ignore[union-attr]


def empty(model: Decoder) -> None:
    model.layers[0].up.weight = nn.Parameter(torch.zeros(16, 0), requires_grad=False)  # type: ignore[union-attr]


def too_long(model: Decoder) -> None:
    weight = torch.zeros(1, INT32_MAX_REDUCTION + 1)
    model.layers[0].up.weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (trainable, "weight is trainable"),
        (three_dimensional, "weight has 3 dimensions, a linear's has 2"),
        (tied_to_the_embedding, "tied to embed.weight"),
        (double, "weight is torch.float64, quantized are float32, bfloat16 and float16"),
        (int8, "weight is torch.int8, quantized are float32, bfloat16 and float16"),
        (on_meta, "weight is on device meta, quantized are weights on cpu and cuda"),
        (empty, "weight has shape (16, 0), a side is empty or too long for int32 sums"),
        (too_long, f"weight has shape (1, {INT32_MAX_REDUCTION + 1}), a side is empty or too long for int32 sums"),
    ],
)
def test_a_weight_that_cannot_be_int8_is_left_alone_with_its_reason(
    spoil: Callable[[Decoder], None], reason: str
) -> None:
    model = frozen_decoder()
    spoil(model)
    found = reasons(model)
    assert found["layers.0.up"] == reason
    assert found["layers.0.down"] == "", "its neighbour is not affected"


def test_modules_that_share_a_weight_are_one_site() -> None:
    model = frozen_decoder()
    shared(model)
    sites = find_sites(model, QuaffConfig())
    (site,) = (site for site in sites if site.module is model.layers[0].up)  # type: ignore[union-attr]
    assert (site.weight_name, site.reason) == ("layers.0.up.weight", "")
    assert site.places == [(model.layers[index].up, "weight") for index in (0, 1)]  # type: ignore[union-attr]
    assert "layers.1.up.weight" not in [site.weight_name for site in sites]
    assert all(site.places == [(site.module, site.parameter)] for site in sites if len(site.places) == 1)


def test_what_is_excluded_by_one_name_of_a_shared_weight_is_excluded() -> None:
    model = frozen_decoder()
    shared(model)
    for name in ("layers.0.up", "layers.1.up"):
        assert reasons(model, exclude=(name,))["layers.0.up"] == "excluded by the config"
    assert reasons(model, include=("layers.1.up",))["layers.0.up"] == ""


def test_a_weight_under_two_names_in_one_module_is_one_site() -> None:
    model = frozen_decoder()
    up = model.layers[0].up  # type: ignore[union-attr]
    up.alias = up.weight
    (site,) = (site for site in find_sites(model, QuaffConfig()) if site.module is up)
    assert site.places == [(up, "weight"), (up, "alias")]


@pytest.mark.parametrize("is_first", [True, False])
def test_what_shares_the_weight_of_a_table_is_tied_to_it(is_first: bool) -> None:
    """A row of an embedding is looked up in float; it is said of the linear, whichever comes first."""
    model = frozen_decoder()
    (first, second) = (model.embed, model.layers[0].up) if is_first else (model.layers[0].up, model.embed)  # type: ignore[union-attr]
    tree = nn.ModuleDict({"first": first, "second": second, "rest": model})
    second.weight = first.weight
    table = "first" if is_first else "second"
    found = chosen(tree)["second.weight" if is_first else "first.weight"]
    assert found.reason == f"tied to {table}.weight"


def test_a_module_used_under_two_names_is_one_site_and_listed_once() -> None:
    model = frozen_decoder()
    model.again = model.layers[0].up  # type: ignore[union-attr, assignment]
    found = [site for site in find_sites(model, QuaffConfig()) if site.module is model.again]
    assert [(site.weight_name, site.reason) for site in found] == [("layers.0.up.weight", "")]
    assert found[0].places == [(model.again, "weight")]


def test_a_module_that_is_also_outside_the_blocks_is_inside() -> None:
    """It is one module: what runs it elsewhere runs it eagerly, in int8."""
    model = frozen_decoder()
    model.again = model.layers[0].up  # type: ignore[union-attr, assignment]
    assert reasons(model)["layers.0.up"] == ""


def test_a_weight_shared_with_a_module_outside_the_blocks_is_left_alone() -> None:
    model = frozen_decoder()
    model.head = nn.Linear(8, 16).requires_grad_(False)
    model.head.weight = model.layers[0].up.weight  # type: ignore[union-attr]
    found = reasons(model)
    assert found["layers.0.up"] == "outside the repeated blocks (scope='blocks')"
    assert found["layers.1.up"] == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_dtypes_are_taken(dtype: torch.dtype) -> None:
    assert reasons(frozen_decoder().to(dtype))["layers.0.up"] == ""


def test_include_and_exclude_take_patterns() -> None:
    found = reasons(frozen_decoder(), include=("layers.*",), exclude=("down",))
    assert found["layers.0.up"] == ""
    assert found["layers.0.down"] == "excluded by the config"
    assert found["lm_head"] == "not included by the config"


def with_head(features: int = HEAD_FEATURES, tied: bool = False) -> Decoder:
    model = Decoder()
    model.embed, model.lm_head = nn.Embedding(features, 8), nn.Linear(8, features)
    if tied:
        model.lm_head.weight = model.embed.weight
    return model.requires_grad_(False)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_a_site_like_any_other(tied: bool) -> None:
    head = chosen(with_head(tied=tied))["lm_head.weight"]
    assert (head.reason, head.is_head, head.table) == ("", True, "embed.weight" if tied else "")
    assert len(head.places) == 1 + tied
    assert not chosen(with_head(tied=tied))["layers.0.up.weight"].is_head
    assert reasons(with_head(tied=tied), exclude=("lm_head",))["lm_head"] == "excluded by the config"


def test_a_small_matrix_outside_the_blocks_is_no_head() -> None:
    head = chosen(with_head(HEAD_FEATURES - 1))["lm_head.weight"]
    assert (head.reason, head.is_head) == ("outside the repeated blocks (scope='blocks')", False)


def test_a_head_of_more_classes_than_int32_sums_hold_is_taken() -> None:
    assert chosen(with_head(INT32_MAX_REDUCTION + 1))["lm_head.weight"].reason == ""


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda model: setattr(model.embed, "max_norm", 1.0), {}),
        (lambda model: setattr(model, "embed", nn.EmbeddingBag.from_pretrained(model.lm_head.weight)), {}),
        (lambda model: None, {"scope": "model"}),
    ],
    ids=["max_norm", "bag", "compiled whole"],
)
def test_a_table_that_does_more_than_give_rows_keeps_its_head_in_float(
    change: Callable[[Decoder], None], config: dict[str, object]
) -> None:
    model = with_head(tied=True)
    change(model)
    model.lm_head.weight = model.embed.weight
    assert reasons(model, **config)["lm_head"] == "tied to embed.weight"


def test_a_head_that_is_compiled_with_all_of_the_model_is_one() -> None:
    head = chosen(with_head(), scope="model")["lm_head.weight"]
    assert (head.reason, head.is_head) == ("", True)


def test_a_wide_matrix_in_a_block_is_no_head() -> None:
    model = frozen_decoder()
    for layer in model.layers:
        layer.up = nn.Linear(8, HEAD_FEATURES).requires_grad_(False)  # type: ignore[union-attr]
    assert not chosen(model)["layers.0.up.weight"].is_head


def test_weights_inside_the_attention_of_torch_are_left_alone_with_a_reason() -> None:
    """Dynamo traces `multi_head_attention_forward` as one operation: there is no linear to see."""
    layer = nn.TransformerDecoderLayer(8, 2, 16).requires_grad_(False)
    reason = "inside nn.MultiheadAttention, which is traced as one operation"
    assert {site.weight_name: site.reason for site in find_sites(layer, QuaffConfig())} == {
        f"{attention}.{weight}": reason
        for attention in ("self_attn", "multihead_attn")
        for weight in ("in_proj_weight", "out_proj.weight")
    } | {"linear1.weight": "", "linear2.weight": ""}
    separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=4).requires_grad_(False)
    with pytest.raises(ConfigError, match=f"4 × {reason}"):
        find_sites(separate, QuaffConfig())


def test_being_trainable_is_the_first_reason_given() -> None:
    model = frozen_decoder()
    model.lm_head.requires_grad_(True)
    assert reasons(model)["lm_head"] == "weight is trainable"


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_model_with_nothing_frozen_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"^model: all 7 weight matrices are trainable, expected frozen ones\..*PEFT"):
        find_sites(Decoder(), QuaffConfig())


def test_a_model_without_matrices_is_refused() -> None:
    for model in (nn.Sequential(nn.LayerNorm(4), nn.ReLU()), nn.Embedding(10, 4)):
        with pytest.raises(ConfigError, match=r"^model: has no matrix that a linear could read, expected some\."):
            find_sites(model, QuaffConfig())


def test_a_model_whose_matrices_all_have_reasons_lists_them_with_counts() -> None:
    with pytest.raises(ConfigError) as raised:
        find_sites(frozen_decoder(), QuaffConfig(exclude=("up", "down", "lm_head")))
    assert str(raised.value).startswith(
        "model: has no frozen weight to quantize (7 × excluded by the config), expected at least one."
    )


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"exclude: pattern 'layers.0.upp' matches no layer \(near: .*up"):
        find_sites(frozen_decoder(), QuaffConfig(exclude=("layers.0.upp",)))


# --- blocks ------------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[str]:
    found = find_blocks(model, find_sites(model, QuaffConfig()))
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in found]


def test_the_layers_of_a_decoder_are_its_blocks() -> None:
    assert blocks_of(frozen_decoder()) == ["layers.0", "layers.1", "layers.2"]


def test_blocks_in_a_sequential_are_found() -> None:
    assert blocks_of(nn.Sequential(Block(), Block()).requires_grad_(False)) == ["0", "1"]


def test_one_block_alone_is_not_repeated() -> None:
    assert blocks_of(frozen_decoder(1)) == []


def test_bare_linears_in_a_list_are_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(False)
    assert blocks_of(model) == []


def test_the_outermost_blocks_win() -> None:
    """Experts inside of decoder layers are part of their layer's graph."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([Block(), Block()])

    model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])}).requires_grad_(False)
    assert blocks_of(model) == ["layers.0", "layers.1"]


def test_a_list_of_lists_is_looked_into() -> None:
    model = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])]).requires_grad_(False)
    assert blocks_of(model) == ["0.0", "0.1"]


def test_encoder_and_decoder_have_blocks_each() -> None:
    model = nn.ModuleDict({"encoder": Decoder(2), "decoder": Decoder(2)}).requires_grad_(False)
    expected = ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]
    assert blocks_of(model) == expected


def test_blocks_of_two_classes_in_one_list_are_all_found_but_a_single_one_is_not() -> None:
    class Other(Block):
        pass

    class Single(Block):
        pass

    model = nn.ModuleList([Block(), Other(), Block(), Single(), Other()]).requires_grad_(False)
    assert sorted(blocks_of(model)) == ["0", "1", "2", "4"]


def test_blocks_without_a_site_are_none() -> None:
    """A trainable stack beside a frozen one has nothing to compile."""
    frozen, trained = Decoder(2).requires_grad_(False), Decoder(2)
    assert blocks_of(nn.ModuleDict({"frozen": frozen, "trained": trained})) == ["frozen.layers.0", "frozen.layers.1"]


def with_lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["up", "down"]))  # type: ignore[arg-type]


def test_blocks_under_a_peft_wrapper_are_found_with_the_base_weights_as_sites() -> None:
    model = with_lora(Decoder())
    assert blocks_of(model) == [f"base_model.model.layers.{i}" for i in range(3)]
    sites = {site.weight_name: site for site in find_sites(model, QuaffConfig())}
    up = model.base_model.model.layers[0].up  # type: ignore[union-attr]
    assert sites["layers.0.up.weight"].reason == ""
    assert sites["layers.0.up.weight"].module is up.base_layer, "the wrapped layer owns the weight"
    assert sites["layers.0.up.lora_A.default.weight"].reason == "weight is trainable"
    assert sites["lm_head.weight"].reason == ""


def test_patterns_name_layers_as_the_user_knows_them_under_peft() -> None:
    """The user writes "down"; PEFT calls the module that owns the weight "down.base_layer"."""
    config = QuaffConfig(exclude=("down", "lm_head"), outlier_budget={"layers.0.up": 0.1, "*": 0.02})
    sites = {site.name: site for site in find_sites(with_lora(Decoder()), config)}
    assert sites["layers.0.down"].reason == "excluded by the config"
    assert sites["layers.0.up"].reason == ""
    assert config.budget_of(sites["layers.0.up"].name) == 0.1
    assert config.budget_of(sites["layers.1.up"].name) == 0.02


def test_sites_outside_the_blocks_get_their_reason() -> None:
    model = frozen_decoder()
    found = reasons(model)
    assert found["lm_head"] == "outside the repeated blocks (scope='blocks')"
    assert found["layers.2.down"] == ""


def test_an_earlier_reason_is_kept_outside_the_blocks() -> None:
    assert reasons(frozen_decoder(), exclude=("lm_head",))["lm_head"] == "excluded by the config"
