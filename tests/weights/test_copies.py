"""Modules with int8 weights copied, pickled and saved whole."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from quaff_fx.weights import LoadedWeight, QuantizedWeight, owners
from tests.data import normal
from tests.weights.layers import (
    Conv1D,
    frozen,
    loaded,
    outlier_state,
    quantize,
    quantized_linear,
)
from tests.weights.test_blocks import Block


def pickled(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


def saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES = pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickled, saved_and_loaded], ids=["deepcopy", "pickle", "save"]
)


@COPIES
def test_copies_are_equal_and_independent(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = quantized_linear()
    x = normal(4, 12, seed=1)
    other = copied(module)
    assert type(other) is type(module)
    assert other.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())
    assert torch.equal(other(x), module(x))
    before = module(x)
    for value in other.state_dict().values():
        value.zero_()
    assert torch.equal(module(x), before)


@COPIES
def test_a_module_that_was_loaded_as_int8_survives_a_copy(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = frozen(Conv1D(12, 8))
    owners.attach(module, {"weight": loaded(module.weight, in_dim=0)})
    (weight,), (other,) = (owners.states_of(each).values() for each in (module, copied(module)))
    assert isinstance(other, LoadedWeight)
    assert (other.in_dim, other.rotation, other.dtype, other.source) == (0, 1, torch.float32, weight.source)
    assert torch.equal(other.dequantized(), weight.dequantized())
    assert other.w_int8 is not weight.w_int8


@COPIES
@pytest.mark.parametrize("move", [lambda m: m, lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_shared_outlier_state_stays_shared(
    copied: Callable[[nn.Module], nn.Module], move: Callable[[nn.Module], nn.Module]
) -> None:
    outliers = outlier_state()
    model = nn.ModuleList([frozen(nn.Linear(12, 8)), frozen(nn.Linear(12, 20))])
    for module in model:
        quantize(module, outliers=outliers)
    model = copied(move(model))
    first, second = (owners.states_of(module)["weight"] for module in model)
    assert isinstance(first, QuantizedWeight)
    assert isinstance(second, QuantizedWeight)
    assert first.outliers is second.outliers
    assert first.outliers is not outliers
    first.outliers.next_smoothing_scale.fill_(9)
    second.outliers.commit()
    assert first.outliers.smoothing_scale.tolist() == [9, 9]


@COPIES
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_copy_of_a_block_runs_on_its_own(copied: Callable[[nn.Module], nn.Module], is_int8: bool) -> None:
    """What runs the block belongs to its model, and is in no copy of the block alone."""
    block, x = Block(), normal(3, 12, seed=1)
    if is_int8:
        quantize(block, in_dim=0)
        quantize(block.up)
    owners.set_block(block, True)
    expected = block(x)
    block.__dict__[owners.RUN] = pytest.fail
    other = copied(block)
    assert type(other) is type(block)
    assert owners.RUN not in other.__dict__
    assert block.__dict__[owners.RUN] is pytest.fail
    assert torch.equal(other(x), expected)
    assert len(owners.int8_places(other)) == 2 * is_int8
    owners.set_block(other, False)
    assert type(other).__name__ == ("QuaffBlock" if is_int8 else "Block")
