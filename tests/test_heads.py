"""The head in int8, and its loss without its logits, in whole models."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

import quaff_fx
from quaff_fx import heads
from quaff_fx.kernels.dispatch import kernels_of
from quaff_fx.sites import HEAD_FEATURES
from quaff_fx.weights import logits, owners
from tests.models import float_llama, with_lora

VOCABULARY = HEAD_FEATURES + 5  # no multiple of anything
QUIET = {"calibration_steps": 1, "progress": False}
pytestmark = pytest.mark.compile


def llama(**config: Any) -> PreTrainedModel:
    return float_llama(2, vocab_size=VOCABULARY, **config)


def gemma(**config: Any) -> PreTrainedModel:
    """Tied, with a soft cap, and an embedding that is scaled."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": VOCABULARY, "final_logit_softcapping": 3.0}
    return Gemma2ForCausalLM(Gemma2Config(**(sizes | config)))


MODELS = {
    "Llama": llama,
    "Llama, tied": lambda: llama(tie_word_embeddings=True),
    "Gemma 2": gemma,
}


def ids(tokens: int = 24) -> Tensor:
    return torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(model: nn.Module, tokens: int = 24, **arguments: Any) -> tuple[float, Tensor, Any]:
    """Loss, gradient and outputs of one training step."""
    model.zero_grad()
    outputs = model(input_ids=ids(tokens), labels=ids(tokens), **arguments)
    outputs.loss.backward()
    return outputs.loss.item(), gradient(model), outputs


def quantized(model: nn.Module, **config: Any) -> nn.Module:
    model = quaff_fx.compile(model.train(), QUIET | config)
    step(model)
    return model


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A float model with LoRA, and the same with int8 weights after two steps."""
    make = MODELS[request.param]
    model = quantized(with_lora(make()))
    step(model)
    return with_lora(make()).train(), model


def cosine(one: Tensor, other: Tensor) -> float:
    return torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def test_loss_and_gradient_are_near_those_in_float(trained: tuple[nn.Module, nn.Module]) -> None:
    plain, model = trained
    loss, found, outputs = step(model)
    expected_loss, expected, expected_outputs = step(plain)
    assert loss == pytest.approx(expected_loss, abs=2e-3)
    assert cosine(found, expected) > 0.995
    assert isinstance(outputs.logits, logits.Logits)
    assert cosine(outputs.logits, expected_outputs.logits) > 0.998


def test_the_loss_is_that_of_the_logits(trained: tuple[nn.Module, nn.Module]) -> None:
    _, model = trained
    loss, found, _ = step(model)
    model.zero_grad()
    z = model(input_ids=ids()).logits.float()[:, :-1].log_softmax(-1)
    read = -z.gather(2, ids()[:, 1:, None]).mean()
    read.backward()
    assert loss == pytest.approx(read.item(), abs=1e-5)
    assert cosine(found, gradient(model)) > 0.9999


def test_nothing_as_large_as_the_logits_exists(
    trained: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = trained
    part = 16
    weight = owners.quantized_in(base_layer(model.get_output_embeddings()))["weight"]
    losses, tokens = weight._token_losses, []
    assert losses is not None

    def counted(x: Tensor, *rest: Any) -> Tensor:
        tokens.append(len(x))
        return losses(x, *rest)

    whole, _, _ = step(model, tokens=40)
    monkeypatch.setattr(weight, "_token_losses", counted)
    monkeypatch.setattr(weight, "product", None)  # nobody computes the logits
    kernels = dataclasses.replace(kernels_of(torch.device("cpu")), logits_bytes=4 * part * VOCABULARY)
    monkeypatch.setattr(logits, "kernels_of", lambda _: kernels)
    monkeypatch.setattr(logits, "EFFICIENT_PART", part)
    in_parts, _, outputs = step(model, tokens=40)
    assert whole == pytest.approx(in_parts, abs=1e-4)
    assert tokens == [part] * 5
    assert outputs.logits.shape == (2, 40, VOCABULARY)


def base_layer(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)  # type: ignore[no-any-return]


def test_explain_and_graphs_show_the_head(trained: tuple[nn.Module, nn.Module]) -> None:
    _, model = trained
    (row,) = [row for row in quaff_fx.explain(model).rows if row.name == "lm_head"]
    assert (row.stage, row.reason) == ("int8", "")
    products = [change.site for graph in quaff_fx.graphs(model) for change in graph.changes]
    assert "lm_head.weight" in products
    assert quaff_fx.explain(model).also_read == ()


def test_generation_and_evaluation_have_plain_logits(trained: tuple[nn.Module, nn.Module]) -> None:
    _, model = trained
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(input_ids=ids(), labels=ids())
            assert type(outputs.logits) is Tensor
        assert model.generate(input_ids=ids(4), max_new_tokens=3, do_sample=False).shape == (2, 7)
    finally:
        model.train()


def test_a_copy_and_a_saved_state_go_on_alike(trained: tuple[nn.Module, nn.Module], tmp_path: Any) -> None:
    plain, model = trained
    expected, expected_gradient, _ = step(model)
    copied = copy.deepcopy(model)
    quaff_fx.save_state(model, tmp_path)
    resumed = quaff_fx.compile(copy.deepcopy(plain), QUIET)
    quaff_fx.load_state(resumed, tmp_path)
    for other in (copied, resumed):
        loss, found, outputs = step(other)
        assert loss == expected
        assert torch.equal(found, expected_gradient)
        assert isinstance(outputs.logits, logits.Logits)


def test_dequantize_gives_plain_weights_and_ties_again(trained: tuple[nn.Module, nn.Module]) -> None:
    plain, model = trained
    restored = quaff_fx.dequantize(copy.deepcopy(model))
    head, table = restored.get_output_embeddings(), restored.get_input_embeddings()
    assert (head.weight is table.weight) == plain.config.tie_word_embeddings
    assert type(head) is nn.Linear
    assert cosine(head.weight, plain.get_output_embeddings().weight) > 0.999
    assert type(step(restored)[2].logits) is Tensor
    expected = {name: value.shape for name, value in plain.state_dict().items()}
    assert {name: value.shape for name, value in restored.state_dict().items()} == expected


def test_a_tied_head_and_its_table_are_one_int8_matrix() -> None:
    plain = with_lora(llama(tie_word_embeddings=True))
    model = quantized(with_lora(llama(tie_word_embeddings=True)))
    step(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    state = owners.states_of(table)["weight"]
    assert owners.states_of(head)["weight"] is state
    looked_up = table(ids())
    assert torch.equal(looked_up, table.weight[ids()])
    error = (looked_up - plain.get_input_embeddings()(ids())).norm() / looked_up.norm()
    assert error < 0.01
    assert table(ids().int()).shape == looked_up.shape
    for wrong in (VOCABULARY, -1):
        with pytest.raises(IndexError, match="index out of range"):
            table(torch.tensor([wrong]))
    head.weight = table.weight  # what ties them
    assert owners.states_of(head)["weight"] is state
    assert state.weight_bytes() < 0.3 * plain.get_input_embeddings().weight.numel() * 4


@pytest.mark.parametrize("config", [{"loss_without_logits": False}, {"smoothing": "momentum"}])
def test_logits_are_computed_where_they_are_asked_for(config: dict[str, Any]) -> None:
    model = quantized(with_lora(llama()), **config)
    loss, found, outputs = step(model)
    assert type(outputs.logits) is Tensor
    expected_loss, expected, _ = step(with_lora(llama()).train())
    assert loss == pytest.approx(expected_loss, abs=3e-3)
    assert cosine(found, expected) > 0.99
    assert owners.states_of(model.get_output_embeddings())["weight"].grad_outliers


def test_a_head_that_is_compiled_with_all_of_the_model_keeps_large_gradients_apart() -> None:
    model = quantized(with_lora(llama()), scope="model")
    _, found, _ = step(model)
    assert cosine(found, step(with_lora(llama()).train())[1]) > 0.995


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    ],
    ids=["LoRA on the head", "trained head", "LoRA on the table", "trained tokens"],
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_adapters_of_head_and_table(adapter: dict[str, Any], tied: bool) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=2, init_lora_weights=False, **adapter)
        return get_peft_model(llama(tie_word_embeddings=tied), config).train()

    model, plain = quantized(made()), made()
    loss, found, _ = step(model)
    expected_loss, expected, _ = step(plain)
    assert loss == pytest.approx(expected_loss, abs=5e-3)
    assert found.shape == expected.shape
    assert cosine(found, expected) > 0.99
    rows = {row.name: row for row in quaff_fx.explain(model).rows}
    left_alone = {row.reason for row in rows.values() if row.stage == "float" and max(row.shape) == VOCABULARY}
    assert all(left_alone), "everything that is not int8 says why"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_the_loss_of_tokens_is_torchs(dtype: torch.dtype, label_smoothing: float) -> None:
    torch.manual_seed(0)
    z = (4 * torch.randn(9, 50)).to(dtype)
    z[1, :20], z[2, 7] = -torch.inf, 300.0
    labels = torch.randint(20, 50, (9,))
    labels[3] = -100
    found, expected = (z.clone().requires_grad_() for _ in range(2))
    options: dict[str, Any] = {"ignore_index": -100, "label_smoothing": label_smoothing}
    losses = heads.token_losses(found, labels, **options)
    wanted = torch.nn.functional.cross_entropy(expected, labels, reduction="none", **options)
    assert losses.dtype == wanted.dtype
    torch.testing.assert_close(losses, wanted)
    losses.sum().backward()
    wanted.sum().backward()
    # In 16 bits torch rounds the log-probabilities that its gradient is made of.
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(
        found.grad, expected.grad, atol=tolerance, rtol=2 * tolerance, equal_nan=bool(label_smoothing)
    )


def test_a_head_whose_weight_is_there_only_while_it_runs_computes_its_logits(
    trained: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 of the head alone frees what it has gathered after the head's own forward."""
    _, model = trained
    expected, expected_gradient, _ = step(model)
    weight = owners.quantized_in(base_layer(model.get_output_embeddings()))["weight"]
    assert not weight._is_gone_later()
    monkeypatch.setattr(weight, "_is_gone_later", lambda: True)
    loss, found, outputs = step(model)
    assert type(outputs.logits) is Tensor
    assert loss == pytest.approx(expected, abs=1e-4)
    assert cosine(found, expected_gradient) > 0.9999


def test_a_loss_that_torch_compiles_gets_the_logits(trained: tuple[nn.Module, nn.Module]) -> None:
    _, model = trained
    _, expected, _ = step(model)
    model.zero_grad()

    @torch.compile
    def loss_of(z: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())

    loss_of(model(input_ids=ids()).logits.float()).backward()
    assert cosine(gradient(model), expected) > 0.9999


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_loaded_as_int8_and_merged_into_its_files(tied: bool, tmp_path: Any) -> None:
    def base() -> PreTrainedModel:
        return llama(tie_word_embeddings=tied)

    base().save_pretrained(tmp_path / "base")
    model = quaff_fx.from_pretrained(AutoModelForCausalLM, tmp_path / "base", config=QUIET)
    assert owners.states_of(model.lm_head)["weight"].is_int8
    model = quaff_fx.compile(with_lora(model).train())
    step(model)
    loss, found, outputs = step(model)
    expected_loss, expected, _ = step(with_lora(base()).train())
    assert isinstance(outputs.logits, logits.Logits)
    assert loss == pytest.approx(expected_loss, abs=2e-3)
    assert cosine(found, expected) > 0.995
    quaff_fx.merge_into_checkpoint(model, tmp_path / "base", tmp_path / "merged", progress=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    wanted = with_lora(base()).merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, wanted[name]), name
