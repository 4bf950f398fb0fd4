"""A quantized weight: its product, its gradient, its state dict, and the edits that make it unusable."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quaff_fx import numerics
from quaff_fx.weights import QuantizedWeight, owners
from tests.data import normal, planted_outliers
from tests.weights.layers import (
    CHANNELS,
    DTYPES,
    assert_within_bound,
    frozen,
    outlier_state,
    quantize,
    quantized_linear,
)


def test_quantizing_the_restored_weight_again_gives_the_same_integers() -> None:
    """Rounding twice must not drift; the outlier columns may hold a row's largest value, so they are left out."""
    module = frozen(nn.Linear(12, 8))
    quantized = quantize(module)
    owners.restore([(module, "weight")])
    w_int8, w_scale = numerics.quantize_weight(module.weight)
    same_scale = torch.isclose(w_scale, quantized.w_scale, rtol=1e-6, atol=0)
    assert same_scale.any()
    assert torch.equal(w_int8[same_scale], quantized.w_int8[same_scale])


def test_nothing_of_a_quantized_weight_is_trainable() -> None:
    module = quantized_linear()
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_an_all_zero_weight_multiplies_to_the_bias() -> None:
    module = nn.Linear(12, 8).requires_grad_(False)
    module.weight.zero_()
    bias = module.bias.clone()
    quantize(module)
    assert torch.equal(module(normal(3, 12, seed=0)), bias.expand(3, 8))


@pytest.mark.parametrize("q", [127, 63])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,), ()])
def test_a_linear_runs_in_int8_and_agrees_with_float64(lead: tuple[int, ...], q: int) -> None:
    module = frozen(nn.Linear(12, 8))
    weight, bias = module.weight.clone(), module.bias.clone()
    quantized = quantize(module, q=q)
    x = planted_outliers(30, 12, CHANNELS, 40.0, seed=1)[: max(1, torch.Size(lead).numel())].reshape(-1)
    x = x[: torch.Size(lead).numel() * 12].reshape(*lead, 12)
    y = module(x)
    assert type(y) is Tensor
    assert y.shape == (*lead, 8)
    assert_within_bound(y - bias, x, weight, quantized)


def test_the_gradient_of_an_eager_linear_is_dy_w() -> None:
    module = quantized_linear()
    (quantized,) = owners.states_of(module).values()
    assert isinstance(quantized, QuantizedWeight)
    x, dy = normal(4, 12, seed=1).requires_grad_(), normal(4, 8, seed=2)
    module(x).backward(dy)
    assert x.grad is not None
    w_int8, w_scale = quantized.w_int8.double(), quantized.w_scale.double()
    g_scale = (dy.double() * w_scale).abs().amax(dim=1, keepdim=True) / 127
    exact = (dy.double() * w_scale) @ w_int8
    assert ((x.grad.double() - exact).abs() <= 1.001 * g_scale / 2 * w_int8.abs().sum(dim=0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_gives_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    module = quantized_linear(dtype)
    assert module(normal(3, 12, seed=0, dtype=dtype)).dtype == dtype


def edit_in_place(quantized: QuantizedWeight) -> None:
    quantized.w_int8.copy_(quantized.w_int8.roll(1, 0) + 1)


VALUES = {
    "w_int8": edit_in_place,
    "w_scale": lambda quantized: quantized.w_scale.mul_(0.5),
    "w_outlier": lambda quantized: quantized.w_outlier.mul_(0.5),
    "foreach": lambda quantized: torch._foreach_mul_([quantized.w_scale, quantized.w_outlier], 0.999),
    "sign of one value": lambda quantized: quantized.w_outlier[0, :1].neg_(),
}


@pytest.mark.parametrize("edit", VALUES.values(), ids=VALUES)
def test_an_edit_of_the_parts_makes_the_weight_unusable(edit: Callable[[QuantizedWeight], object]) -> None:
    """An average of weights edits all parameters alike."""
    (quantized,) = owners.states_of(quantized_linear()).values()
    assert isinstance(quantized, QuantizedWeight)
    assert quantized.reason_unusable() == ""
    with torch.no_grad():
        edit(quantized)
    assert quantized.reason_unusable() == "was edited in place"
    assert quantized.reason_unusable() == "was edited in place", "asking changes nothing"
    assert copy.deepcopy(quantized).reason_unusable() == "was edited in place"
    quantized.remember_values()
    assert quantized.reason_unusable() == ""


@pytest.mark.parametrize("part", ["w_scale", "w_outlier"])
def test_a_part_that_is_to_be_trained_makes_the_weight_unusable(part: str) -> None:
    (quantized,) = owners.states_of(quantized_linear()).values()
    assert isinstance(quantized, QuantizedWeight)
    getattr(quantized, part).requires_grad_(True)
    assert quantized.reason_unusable() == "is to be trained (requires_grad)"
    quantized.requires_grad_(False)
    assert quantized.reason_unusable() == ""


HARMLESS: dict[str, Callable[[nn.Module], object]] = {
    "the same values": lambda m: [p.copy_(p.clone()) for p in m.parameters()],
    "load_state_dict": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}),
    "load_state_dict of another": lambda m: m.load_state_dict(quantized_linear().state_dict()),
    "load_state_dict, assign": lambda m: m.load_state_dict(quantized_linear().state_dict(), assign=True),
    "moved": lambda m: m.to(torch.bfloat16).double(),
    "smoothing scale": lambda m: m._modules["quaff_weight"].outliers.smoothing_scale.fill_(9),
    "bias": lambda m: m.bias.fill_(9),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_keeps_the_values_or_brings_whole_ones_is_no_edit(change: Callable[[nn.Module], object]) -> None:
    module = quantized_linear()
    (quantized,) = owners.states_of(module).values()
    assert isinstance(quantized, QuantizedWeight)
    with torch.no_grad():
        change(module)
    assert quantized.reason_unusable() == ""


def test_a_weight_that_was_quantized_in_inference_mode_is_usable() -> None:
    with torch.inference_mode():
        quantized = QuantizedWeight(normal(8, 12, seed=0), 1, outlier_state(), 127, 1)
        assert quantized.reason_unusable() == ""
    assert quantized.reason_unusable() == ""


def test_a_copy_that_was_made_in_inference_mode_is_usable() -> None:
    module = quantized_linear()
    with torch.inference_mode():
        copied = copy.deepcopy(module)
    (quantized,) = owners.states_of(copied).values()
    assert isinstance(quantized, QuantizedWeight)
    assert quantized.w_int8.is_inference()
    assert quantized.reason_unusable() == ""
    x = normal(4, 12, seed=1)
    with torch.no_grad():
        assert torch.equal(copied(x), module(x))


def test_state_dict_round_trip_is_bit_for_bit() -> None:
    source, target = quantized_linear(), frozen(nn.Linear(12, 8), seed=50)
    quantize(target)
    saved = {name: value.clone() for name, value in source.state_dict().items()}
    assert sorted(saved) == [
        "bias",
        "quaff_weight.outliers.next_smoothing_scale",
        "quaff_weight.outliers.outlier_channels",
        "quaff_weight.outliers.outlier_w_absmax",
        "quaff_weight.outliers.smoothing_scale",
        "quaff_weight.w_int8",
        "quaff_weight.w_outlier",
        "quaff_weight.w_scale",
    ]
    target.load_state_dict(saved, strict=True)
    assert all(torch.equal(value, saved[name]) for name, value in target.state_dict().items())
    x = normal(4, 12, seed=1)
    assert torch.equal(target(x), source(x))


def test_the_next_smoothing_scale_counts_only_after_commit() -> None:
    outliers = outlier_state()
    outliers.next_smoothing_scale.copy_(torch.tensor([5.0, 6.0]))
    assert outliers.smoothing_scale.tolist() == [8, 3]
    outliers.commit()
    assert outliers.smoothing_scale.tolist() == [5, 6]
    outliers.next_smoothing_scale.zero_()
    assert outliers.smoothing_scale.tolist() == [5, 6], "committed is a copy"
