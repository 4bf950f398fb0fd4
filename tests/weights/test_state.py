"""What every int8 weight does: read eagerly or traced, moved to other dtypes, counted in bytes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quaff_fx.weights import LoadedWeight, QuantizedWeight, owners
from quaff_fx.weights.int8_weight import Int8Weight
from tests.data import normal
from tests.weights.layers import (
    Conv1D,
    count_int8_products,
    frozen,
    loaded,
    outlier_state,
    quantize,
    quantized_linear,
)


def test_the_module_keeps_its_mode_and_passes_it_on() -> None:
    module = frozen(nn.Linear(12, 8)).eval()
    quantized = quantize(module)
    assert not quantized.training
    module.train()
    assert quantized.training


def test_weight_bytes_count_every_tensor() -> None:
    quantized = quantize(frozen(nn.Linear(12, 8)))
    assert quantized.weight_bytes() == 8 * 12 + 4 * 8 + 2 * 2 * 8 + 8 * 2 + 3 * 4 * 2


def test_while_traced_a_read_is_one_marker_with_all_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    module = quantized_linear()
    conv = frozen(Conv1D(12, 8))
    quantize(conv, in_dim=0)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert type(module.weight) is Tensor
    assert module.weight.shape == (8, 12)
    assert conv.weight.shape == (12, 8)
    as_int8 = frozen(Conv1D(12, 8))
    owners.attach(as_int8, {"weight": loaded(as_int8.weight, in_dim=0)})
    assert type(as_int8.weight) is Tensor
    assert as_int8.weight.shape == (12, 8)


def test_while_another_thread_compiles_eager_code_reads_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compiler.is_compiling()` is true in all threads while one compiles."""
    module = quantized_linear()
    as_int8 = frozen(Conv1D(12, 8))
    owners.attach(as_int8, {"weight": loaded(as_int8.weight, in_dim=0)})
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    assert isinstance(module.weight, Int8Weight)
    assert isinstance(as_int8.weight, Int8Weight)
    assert count_int8_products(lambda: module(normal(3, 12, seed=1))) == 1


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.type(torch.float16), torch.float16),
        (lambda m: m.to("cpu"), torch.float32),
    ],
    ids=["half", "bfloat16", "to bfloat16", "double", "type", "to cpu"],
)
@pytest.mark.parametrize("where", ["module", "parent"])
def test_float32_state_stays_float32_and_the_weight_follows(
    move: Callable[[nn.Module], nn.Module], dtype: torch.dtype, where: str
) -> None:
    module = quantized_linear()
    before = {name: value.clone() for name, value in module.state_dict().items() if name.startswith("quaff_")}
    assert len(before) == 7
    move(module if where == "module" else nn.Sequential(nn.Sequential(module)))
    after = {name: value for name, value in module.state_dict().items() if name.startswith("quaff_")}
    assert {name: value.dtype for name, value in after.items()} == {n: v.dtype for n, v in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert module.weight.dtype == dtype
    assert module.bias.dtype == dtype


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_scales_of_a_weight_that_was_loaded_stay_float32(move: Callable[[nn.Module], nn.Module]) -> None:
    module = frozen(nn.Linear(12, 8))
    owners.attach(module, {"weight": loaded(module.weight)})
    move(module)
    (weight,) = owners.states_of(module).values()
    assert isinstance(weight, LoadedWeight)
    assert (weight.w_int8.dtype, weight.w_scale.dtype) == (torch.int8, torch.float32)
    assert weight.dtype == module.weight.dtype == module.bias.dtype
    assert weight.loaded_dtype == torch.float32, "its columns are read again as they were"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_moved_module_still_multiplies(dtype: torch.dtype) -> None:
    module = quantized_linear()
    x = normal(4, 12, seed=1, dtype=dtype)
    expected = module(x.float())
    y = module.to(dtype)(x)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


def rotated_linear(rotation: int) -> nn.Linear:
    module = nn.Linear(12, 8).requires_grad_(False)
    owners.attach(module, {"weight": QuantizedWeight(module.weight, 1, outlier_state(), 127, rotation)})
    return module


def test_a_state_dict_of_features_rotated_far_apart_is_refused() -> None:
    source, target = rotated_linear(4), rotated_linear(4)
    before = copy.deepcopy(target.state_dict())
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer)
    del saved._metadata["quaff_weight"]["rotated"]
    with pytest.raises(RuntimeError, match=r"quaff_weight\.w_int8: is of an earlier quaff_fx, which rotated features"):
        target.load_state_dict(saved)
    assert torch.equal(target.quaff_weight.w_int8, before["quaff_weight.w_int8"])
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer))
    assert torch.equal(target.quaff_weight.w_int8, source.quaff_weight.w_int8)
    plain = rotated_linear(1)
    saved = rotated_linear(1).state_dict()
    del saved._metadata["quaff_weight"]["rotated"]
    plain.load_state_dict(saved)
    assert torch.equal(plain.quaff_weight.w_int8, saved["quaff_weight.w_int8"])
