"""Loading a model as int8 from its files, and training it as if it had been loaded in float."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import quaff_fx
from quaff_fx import weights
from quaff_fx.errors import CheckpointError, ConfigError
from quaff_fx.files import loading, stored_tensor
from quaff_fx.files.stored_tensor import StoredTensor
from quaff_fx.weights import LoadedWeight, QuantizedWeight, owners
from tests.interrupted_lines import interrupted_at
from tests.models import Run, cosine, float_llama, token_ids, with_lora

QUIET = {"progress": False, "calibration_steps": 2, "outlier_budget": 0.04}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Matrices of tiny models are then read in several parts."""
    monkeypatch.setattr(stored_tensor, "CHUNK_BYTES", 4 * 48 * 5)


def saved(folder: Path, model: nn.Module | None = None, **options) -> Path:
    (model or float_llama()).save_pretrained(folder, **options)
    return folder


def loaded_llama(folder: Path, config=None, **options):
    return quaff_fx.from_pretrained(LlamaForCausalLM, folder, config=config or QUIET, **options)


def states(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    """The states of one kind, by names without the wrappers of PEFT."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if type(module) is kind
    }


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 80}
    rates = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0))


def assert_same_buffers(model: nn.Module, other: nn.Module) -> None:
    expected = {name: value for name, value in other.named_buffers() if "quaff_" not in name}
    actual = {name: value for name, value in model.named_buffers() if "quaff_" not in name}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_linears_of_the_blocks_are_int8_and_the_rest_is_what_was_saved(tmp_path):
    original = float_llama()
    model = loaded_llama(saved(tmp_path, original))
    assert len(states(model, LoadedWeight)) == 14
    assert not model.training
    assert model.name_or_path == str(tmp_path)
    assert_same_buffers(model, original)
    for name, parameter in original.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not owners.states_of(owner):
            assert torch.equal(model.get_parameter(name), parameter)
            continue
        loaded = owners.states_of(owner)["weight"]
        assert loaded.rotation == (32 if "down_proj" in name else 16)  # the largest power of two in 96 and in 48
        w_int8, w_scale = quaff_fx.numerics.quantize_weight(parameter, loaded.rotation)
        assert torch.equal(loaded.w_int8, w_int8)
        assert torch.equal(loaded.w_scale, w_scale)
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original.eval()(ids).logits, rtol=0.05, atol=0.01)


def test_a_generation_config_is_loaded(tmp_path):
    original = float_llama()
    original.generation_config.max_new_tokens = 7
    assert loaded_llama(saved(tmp_path, original)).generation_config.max_new_tokens == 7


def test_an_auto_class_and_fields_of_the_models_config_work(tmp_path):
    saved(tmp_path)
    options = {"attn_implementation": "eager", "use_cache": False}
    model = quaff_fx.from_pretrained(AutoModelForCausalLM, tmp_path, config=QUIET, **options)
    assert isinstance(model, LlamaForCausalLM)
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False


def test_a_sharded_checkpoint_gives_the_same_model(tmp_path):
    whole = loaded_llama(saved(tmp_path / "whole"))
    folder = saved(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    expected, actual = whole.state_dict(), loaded_llama(folder).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_tied_embeddings_are_one_parameter(tmp_path):
    original = float_llama(tie_word_embeddings=True)
    model = loaded_llama(saved(tmp_path, original))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_checkpoint_loads_in_its_dtype_or_the_one_asked_for(tmp_path, dtype):
    saved(tmp_path, float_llama().to(torch.bfloat16))
    model = loaded_llama(tmp_path, **({} if dtype is torch.bfloat16 else {"dtype": dtype}))
    assert model.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_same_buffers(model, reference)
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)


def test_a_checkpoint_of_the_bare_decoder_loads_by_its_prefix(tmp_path):
    original = float_llama(tie_word_embeddings=True)
    original.model.save_pretrained(tmp_path)
    model = loaded_llama(tmp_path, tie_word_embeddings=True)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_an_excluded_weight_stays_float_and_compile_knows_the_config(tmp_path):
    model = loaded_llama(saved(tmp_path), {**QUIET, "exclude": ("down_proj", "lm_head")})
    assert len(states(model, LoadedWeight)) == 12
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    model = quaff_fx.compile(with_lora(model))
    rows = {row.name: row for row in quaff_fx.explain(model).rows}
    assert rows["model.layers.0.mlp.down_proj"].reason == "excluded by the config"
    assert rows["model.layers.0.mlp.up_proj"].stage == "observed (int8)"


def test_a_model_of_any_library_is_filled_in_place(tmp_path):
    def build() -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12)) for _ in range(2)]
        return nn.Sequential(nn.ModuleList(blocks), nn.BatchNorm1d(12), nn.Conv1d(2, 3, 4))

    original = build()
    original[1].running_mean.normal_()
    save_file(original.state_dict(), tmp_path / "weights.safetensors")
    with torch.device("meta"):
        model = build()
    model[1].to_empty(device="cpu")
    assert quaff_fx.load_checkpoint(model, tmp_path / "weights.safetensors", QUIET) is model
    assert len(states(model, LoadedWeight)) == 4
    assert torch.equal(model[1].running_mean, original[1].running_mean)
    assert torch.equal(model[2].weight, original[2].weight)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_weight_with_a_non_finite_value_stays_float(tmp_path):
    original = float_llama()
    original.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    model = loaded_llama(saved(tmp_path, original))
    assert len(states(model, LoadedWeight)) == 13
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, original.model.layers[1].mlp.up_proj.weight)


def test_loaded_weights_are_no_views_of_the_file(tmp_path):
    model = loaded_llama(saved(tmp_path))
    before = copy.deepcopy(model.state_dict())
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-file.stat().st_size // 2, os.SEEK_END)
        stream.write(b"x" * (file.stat().st_size // 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class LargestFloat(TorchDispatchMode):
    """The most elements of a float tensor that any operation read or wrote, those of mapped files apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.mapped: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.set_.source_Storage:
            self.mapped.add(result.untyped_storage().data_ptr())
        for tensor in pytree.tree_leaves((args, kwargs, result)):
            is_float = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta
            if is_float and tensor.untyped_storage().data_ptr() not in self.mapped:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_float_matrix_of_a_block_is_ever_in_memory_as_a_whole(tmp_path, monkeypatch):
    """The embedding and head have 2 rows here, parts have 5 (of 96 columns: 2) and the blocks' matrices 24 to 96."""
    saved(tmp_path, float_llama(vocab_size=2, max_position_embeddings=8))
    model = meta_llama(vocab_size=2, max_position_embeddings=8)
    whole: list[str] = []
    read = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda self, *rest: whole.append(self.name) or read(self, *rest))
    with LargestFloat() as largest:
        quaff_fx.load_checkpoint(model, tmp_path, QUIET)
    assert largest.elements <= 5 * 48
    assert sorted(name for name in whole if "_proj" in name) == []
    model = with_lora(model).train()
    whole.clear()
    converted(model, torch.zeros(1, 8, dtype=torch.int64))
    assert whole == [], "a conversion reads in parts as well"


def two_blocks() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12)) for _ in range(2)]
    return nn.Sequential(nn.ModuleList(blocks), nn.BatchNorm1d(12))


def meta_blocks() -> nn.Module:
    with torch.device("meta"):
        model = two_blocks()
    model[1].to_empty(device="cpu")
    return model


def contents(model: nn.Module) -> list[tuple]:
    """Every module of a model with its class and the very objects that it owns, in order, kept alive."""
    return [
        (name, type(module), module, *(list(d.items()) for d in (module._parameters, module._buffers, module._modules)))
        for name, module in model.named_modules()
    ]


def assert_is(model: nn.Module, before: list[tuple]) -> None:
    def ids(found: list[tuple]) -> list[tuple]:
        return pytree.tree_map(lambda each: each if isinstance(each, (str, type)) else id(each), found)

    assert ids(contents(model)) == ids(before)
    assert not hasattr(model, "_quaff_config")


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    expected, actual = other.state_dict(), model.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert (value.dtype, value.device) == (expected[name].dtype, expected[name].device), name
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_loading_gives_the_model_back(tmp_path):
    save_file(two_blocks().state_dict(), tmp_path / "model.safetensors")
    expected, model = (meta_blocks() for _ in range(2))
    files = (loading, stored_tensor, owners, weights.state, weights.loaded)
    lines = interrupted_at(partial(quaff_fx.load_checkpoint, expected, tmp_path, QUIET), None, files)
    before = contents(model)
    interrupted = 0
    for number in range(0, lines, 5):
        try:
            interrupted_at(partial(quaff_fx.load_checkpoint, model, tmp_path, QUIET), number, files)
        except KeyboardInterrupt:
            interrupted += 1
            if not hasattr(model, "_quaff_config"):
                assert_is(model, before)
                continue
        # It came after the last step, or was ignored where a generator was let go.
        assert_same_state(model, expected)
        model = meta_blocks()
        before = contents(model)
    assert interrupted > 100
    assert_same_state(quaff_fx.load_checkpoint(model, tmp_path, QUIET), expected)


def no_memory(*_):
    raise MemoryError


def unreadable(*_):
    raise CheckpointError("model.safetensors: cannot be read")


@pytest.mark.parametrize("fails", [no_memory, unreadable])
def test_a_loading_that_fails_in_the_middle_gives_the_model_back(tmp_path, monkeypatch, fails):
    save_file(two_blocks().state_dict(), tmp_path / "model.safetensors")
    model = meta_blocks()
    before, rows, count = contents(model), StoredTensor.rows, iter(range(99))
    with monkeypatch.context() as patch:
        patch.setattr(StoredTensor, "rows", lambda *args: rows(*args) if next(count) < 3 else fails())
        with pytest.raises((MemoryError, CheckpointError)):
            quaff_fx.load_checkpoint(model, tmp_path, QUIET)
    assert_is(model, before)
    assert_same_state(
        quaff_fx.load_checkpoint(model, tmp_path, QUIET), quaff_fx.load_checkpoint(meta_blocks(), tmp_path, QUIET)
    )


@contextlib.contextmanager
def default(dtype=torch.float32, device=None, is_inference=False):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        with torch.inference_mode(is_inference):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DEFAULTS = [
    *({"dtype": dtype} for dtype in (torch.bfloat16, torch.float16, torch.float64)),
    {"device": "meta"},
    {"is_inference": True},
]


@pytest.mark.parametrize("options", DEFAULTS, ids=str)
def test_whatever_the_defaults_are_the_same_is_loaded(tmp_path, options):
    save_file(two_blocks().state_dict(), tmp_path / "model.safetensors")
    saved(tmp_path / "llama")
    model = meta_blocks()
    with default(**options):
        quaff_fx.load_checkpoint(model, tmp_path, QUIET)
        llama = loaded_llama(tmp_path / "llama")
    assert_same_state(model, quaff_fx.load_checkpoint(meta_blocks(), tmp_path, QUIET))
    expected = loaded_llama(tmp_path / "llama")
    assert_same_state(llama, expected)
    assert_same_buffers(llama, expected)
    for each in (model, llama):
        for weight in states(each, LoadedWeight).values():
            assert (weight.w_scale.dtype, weight.w_scale.device.type) == (torch.float32, "cpu")
        assert not any(tensor.is_inference() for tensor in [*each.parameters(), *each.buffers()])


class Shared(nn.Module):
    """Two blocks that share a weight, in two modules, and a module that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)) for _ in range(2))
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.alias = self.blocks[0][1]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.alias(x)


@pytest.mark.parametrize("name", ["alias", "blocks.0.1"])
def test_a_weight_of_several_modules_is_loaded_once_and_is_at_every_place(tmp_path, name):
    torch.manual_seed(0)
    original = Shared()
    tensors = {key: value.clone() for key, value in original.state_dict().items() if not key.startswith("alias")}
    if name == "alias":  # files have one of the names of a module
        tensors = {key.replace("blocks.0.1", "alias"): value for key, value in tensors.items()}
    del tensors["blocks.1.0.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Shared()
    quaff_fx.load_checkpoint(model, tmp_path, QUIET)
    first, second = model.blocks
    assert owners.states_of(first[0])["weight"] is owners.states_of(second[0])["weight"]
    assert model.alias is first[1]
    assert len({id(module) for module in model.modules() if isinstance(module, LoadedWeight)}) == 3
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), original(x), rtol=0.05, atol=0.05)


def lora(model: nn.Module) -> nn.Module:
    return with_lora(model, fan_in_fan_out=isinstance(model, GPT2LMHeadModel)).train()


def test_training_follows_the_ordinary_route(tmp_path):
    saved(tmp_path)
    runs = [Run(lora(float_llama())), Run(lora(loaded_llama(tmp_path)))]
    for run in runs:
        quaff_fx.compile(run.model, QUIET)
        optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(6):
            run.step(token_ids())
            optimizer.step()
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=2e-3)
    assert all(cosine(*gradients) > 0.99 for gradients in zip(*(run.gradients for run in runs), strict=True))
    assert runs[1].losses[-1] < runs[1].losses[0]
    assert quaff_fx.explain(runs[1].model).bytes_after == quaff_fx.explain(runs[0].model).bytes_after


def converted(model: nn.Module, ids=None) -> nn.Module:
    quaff_fx.compile(model, QUIET)
    return quaff_fx.calibrate(model, [{"input_ids": token_ids() if ids is None else ids}])


@pytest.mark.parametrize("build", [float_llama, gpt2], ids=["Llama", "GPT-2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_weight_is_bit_for_bit_that_of_the_float_model(tmp_path, build, dtype):
    original = build().to(dtype)
    folder = saved(tmp_path, original)
    model = converted(lora(quaff_fx.from_pretrained(AutoModelForCausalLM, folder, config=QUIET)))
    weights = states(model, QuantizedWeight)
    assert len(weights) == (14 if build is float_llama else 8)
    for name, weight in weights.items():
        owner, _, slot = name.rpartition(".")
        parameter = original.get_parameter(f"{owner}.{slot.removeprefix('quaff_')}")
        expected = QuantizedWeight(parameter, weight.in_dim, weight.outliers, weight.activation_max, weight.rotation)
        for part in ("w_int8", "w_scale", "w_outlier"):
            assert torch.equal(getattr(weight, part), getattr(expected, part)), (name, part)
            assert getattr(weight, part).is_contiguous(), (name, part)
        assert weight.dtype == dtype


def test_gpt2_trains(tmp_path):
    run = Run(lora(quaff_fx.from_pretrained(AutoModelForCausalLM, saved(tmp_path, gpt2()), config=QUIET)))
    quaff_fx.compile(run.model)
    for _ in range(4):
        run.step(token_ids())
    reference = Run(lora(gpt2()))
    reference.step(token_ids())
    assert run.losses == pytest.approx(reference.losses * 4, rel=5e-3)
    assert {row.stage for row in quaff_fx.explain(run.model).rows if not row.reason} == {"int8"}


def test_the_observed_graph_keeps_no_dequantized_weight_for_backward(tmp_path):
    model = lora(loaded_llama(saved(tmp_path)))
    quaff_fx.compile(model, QUIET)
    shapes = {tuple(weight.w_int8.shape) for weight in states(model, LoadedWeight).values()}
    shapes |= {shape[::-1] for shape in shapes}
    kept = []

    def keep(tensor):
        if tensor.is_floating_point() and tuple(tensor.shape) in shapes:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=token_ids(3, 11), labels=token_ids(3, 11))
    assert kept == []
    for graph in quaff_fx.graphs(model):
        assert graph.rewritten.count("quaff.weight_only_linear.default(") == 7
        assert "observe_int8_weight" not in graph.rewritten


def test_explain_shows_int8_weights_while_they_are_observed(tmp_path):
    model = quaff_fx.compile(lora(loaded_llama(saved(tmp_path))), QUIET)
    explanation = quaff_fx.explain(model)
    rows = [row for row in explanation.rows if row.stage == "observed (int8)"]
    assert len(rows) == 14
    assert rows[0].bytes_before == 48 * 48 * 4
    assert rows[0].bytes_after == 48 * 48 + 48 * 4
    assert "14 weights were loaded as int8" in str(explanation)


@pytest.mark.parametrize("steps", [0, 3])
def test_dequantize_gives_plain_float_weights(tmp_path, steps):
    original = float_llama()
    model = quaff_fx.compile(lora(loaded_llama(saved(tmp_path, original))), QUIET)
    for _ in range(steps):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    quaff_fx.dequantize(model)
    weight = model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight
    assert type(weight) is nn.Parameter
    expected = original.model.layers[0].mlp.down_proj.weight
    # 8 bits of a normal row: its absmax is about 3 deviations, a rounding error 3 / 127 / sqrt(12) = 0.7 % of one.
    assert (weight - expected).norm() <= expected.norm() * 0.01
    model.merge_and_unload()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_copy_trains_on_its_own(tmp_path, copied, is_compiled):
    model = lora(loaded_llama(saved(tmp_path)))
    if is_compiled:
        quaff_fx.compile(model, QUIET)
        Run(model).step(token_ids())
    other = copied(model)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
    if not is_compiled:
        quaff_fx.compile(other, QUIET)
    run = Run(other)
    for _ in range(3):
        run.step(token_ids())
    assert len(states(other, QuantizedWeight)) == 14
    assert len(states(model, LoadedWeight)) == 14


def test_the_state_dict_of_a_loaded_model_loads_into_another(tmp_path):
    first, second = loaded_llama(saved(tmp_path / "a")), loaded_llama(saved(tmp_path / "b"))
    layer = second.model.layers[0].mlp.up_proj
    owners.states_of(layer)["weight"].w_int8.zero_()
    second.load_state_dict(first.state_dict())
    assert torch.equal(layer.weight + 0, first.model.layers[0].mlp.up_proj.weight + 0)
    keys = [key for key in first.state_dict() if "layers.0.mlp.up_proj" in key]
    assert [key.rpartition(".")[2] for key in keys] == ["w_int8", "w_scale"]


def test_a_loaded_model_generates_before_and_after_compile(tmp_path):
    model = loaded_llama(saved(tmp_path))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = model.generate(token_ids(1, 5), **options)
    adapted = converted(with_lora(model, init_lora_weights=True).eval())
    assert adapted.generate(input_ids=token_ids(1, 5), **options).shape == before.shape


class Block(nn.Module):
    """A linear, and one whose weight is read by something else as well."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(12, 12)
        self.scaled = nn.Linear(12, 12)

    def forward(self, x):
        return self.plain(x) + self.scaled(x) / self.scaled.weight[0].norm()


def test_a_weight_that_not_only_linears_read_stays_int8_and_is_told(tmp_path):
    original = nn.Sequential(Block(), Block())
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(Block(), Block())
    quaff_fx.load_checkpoint(model, tmp_path, QUIET)
    quaff_fx.compile(model)
    x = torch.randn(3, 12, requires_grad=True)
    expected = original(x)
    for _ in range(4):
        torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
        model(x).sum().backward()
    rows = {row.name: row for row in quaff_fx.explain(model).rows}
    assert rows["0.plain"].stage == "int8"
    row = rows["0.scaled"]
    assert (row.stage, row.reason) == ("int8 weight", "not only linears over one dimension read it")
    assert row.bytes_after == 12 * 12 + 4 * 12
    assert "int8 weight" in str(quaff_fx.explain(model))
    quaff_fx.dequantize(model)
    assert type(model[0].scaled) is nn.Linear


def test_dora_on_a_loaded_weight_takes_the_norm_of_the_int8_one(tmp_path):
    config = {"target_modules": ["q_proj"], "use_dora": True}
    model = with_lora(loaded_llama(saved(tmp_path)), **config)
    reference = with_lora(float_llama(), **config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=3e-3, atol=0)
    assert len(states(model, LoadedWeight)) == 14


def test_a_forward_past_the_blocks_leaves_the_weights_int8(tmp_path):
    model = lora(loaded_llama(saved(tmp_path)))
    quaff_fx.compile(model, QUIET)
    with pytest.raises(quaff_fx.errors.CalibrationError, match="forward: read none of the frozen weights"):
        quaff_fx.calibrate(model, [{}], forward=lambda *_: None)
    assert len(states(model, LoadedWeight)) == 14
    assert quaff_fx.explain(model).steps == 0
    quaff_fx.calibrate(model, [token_ids()])
    assert len(states(model, QuantizedWeight)) == 14


def edited(folder: Path, edit) -> Path:
    """Rewrites the one file of a checkpoint after `edit` has changed its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def meta_llama(**config) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        return float_llama(**config)


UP = "model.layers.1.mlp.up_proj.weight"
BAD = {
    "missing": (lambda t: t.pop(UP), rf"{UP}: is missing in the files \(near: .*\), expected every parameter"),
    "renamed": (lambda t: t.update({UP + "s": t.pop(UP)}), rf"{UP}: is missing in the files \(near: {UP}s\)"),
    "unexpected": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].clone()}),
        r"layers\.2\.mlp\.up_proj\.weight: is in the files but not in the model \(near: ",
    ),
    "integers": (lambda t: t.update({UP: t[UP].int()}), rf"{UP}: is stored as torch.int32, expected torch.float32"),
    "shape": (
        lambda t: t.update({UP: t[UP][:5].clone()}),
        rf"{UP}: has shape \(5, 48\) in the files, expected \(96, 48\)",
    ),
}


@pytest.mark.parametrize(("edit", "match"), BAD.values(), ids=BAD)
def test_a_checkpoint_that_does_not_fit_leaves_the_model_as_it_was(tmp_path, edit, match):
    edited(saved(tmp_path), edit)
    model = meta_llama()
    with pytest.raises(CheckpointError, match=match):
        quaff_fx.load_checkpoint(model, tmp_path, QUIET)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert states(model, LoadedWeight) == {}
    with pytest.raises(CheckpointError, match=match):
        loaded_llama(tmp_path)


def test_a_truncated_file_is_refused_before_anything_is_loaded(tmp_path):
    folder = saved(tmp_path, max_shard_size="60KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    model = meta_llama()
    with pytest.raises(CheckpointError, match=rf"{last.name}: cannot be read as safetensors"):
        quaff_fx.load_checkpoint(model, folder, QUIET)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_tied_weights_that_differ_are_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"differs from model\.embed_tokens\.weight"):
        loaded_llama(tmp_path, tie_word_embeddings=True)


def test_ways_of_loading_that_are_not_meant_are_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ConfigError, match="device_map: is given"):
        loaded_llama(tmp_path, device_map="auto")
    with pytest.raises(ConfigError, match=r"dtype: is torch\.int8, expected a floating"):
        loaded_llama(tmp_path, dtype=torch.int8)
    with pytest.raises(ConfigError, match="holds int8 weights already"):
        quaff_fx.load_checkpoint(loaded_llama(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match="config: is a int"):
        loaded_llama(tmp_path, 3)


def change_time(file: Path) -> None:
    os.utime(file, ns=(0, 0))


CHANGES = {
    "vanished": (Path.unlink, "cannot be read any more"),
    "other size": (lambda file: file.write_bytes(file.read_bytes() + b" "), "has changed since"),
    "other time": (change_time, "has changed since"),
}


@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_before_the_conversion_is_told_and_nothing_is_converted(tmp_path, change, match):
    folder = saved(tmp_path)
    model = lora(loaded_llama(folder))
    quaff_fx.compile(model, QUIET)
    run = Run(model)
    for _ in range(2):
        run.step(token_ids())
    file = folder / "model.safetensors"
    content, found = file.read_bytes(), file.stat()
    change(file)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {match}"):
        run.step(token_ids())
    assert len(states(model, LoadedWeight)) == 14
    file.write_bytes(content)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    run.step(token_ids())
    assert len(states(model, QuantizedWeight)) == 14


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"exclude": ("up_proj",)}, "excluded by the config"), ({"include": ("q_proj",)}, "not included by the config")],
)
def test_leaving_alone_what_is_int8_already_is_an_error(tmp_path, config, reason):
    model = lora(loaded_llama(saved(tmp_path)))
    with pytest.raises(ConfigError, match=f"was loaded as int8 but is {reason}"):
        quaff_fx.compile(model, {**QUIET, **config})
    assert len(states(model, LoadedWeight)) == 14
    quaff_fx.compile(model)
