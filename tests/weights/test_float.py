"""A frozen weight that is a float parameter answers what the int8 ones answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quaff_fx.weights import FloatWeight, OutlierState
from tests.data import normal
from tests.weights.layers import (
    loaded,
)


@pytest.mark.parametrize("in_dim", [1, 0], ids=["nn.Linear", "Conv1D"])
def test_every_kind_of_weight_answers_in_the_layout_of_the_parameter(in_dim: int) -> None:
    parameter = nn.Parameter(normal(8, 12, seed=0), requires_grad=False)
    matrix = parameter if in_dim == 1 else parameter.t()
    plain = FloatWeight(parameter)
    outliers = OutlierState(torch.tensor([1, 4]), torch.ones(2), torch.full((2,), torch.inf), 1.0)
    from_float = plain.quantized(in_dim, outliers, 127, 1, None)
    source = loaded(parameter, in_dim)
    from_int8 = source.quantized(in_dim, outliers, 127, 1, plain.columns(outliers.outlier_channels, in_dim))
    for weight in (plain, source, from_float, from_int8):
        assert (weight.shape, weight.dtype, weight.device.type) == ((8, 12), torch.float32, "cpu")
        assert weight.is_made_from(parameter)
        assert not weight.is_made_from(2 * parameter)
    assert torch.equal(plain.columns(outliers.outlier_channels, in_dim), matrix[:, [1, 4]])
    assert torch.equal(from_float.w_int8, from_int8.w_int8)
    assert torch.equal(from_float.w_outlier, from_int8.w_outlier)
    forms = [[weight.form(is_observed) for is_observed in (True, False)] for weight in (plain, source, from_float)]
    assert forms == [["observed", "float"], ["observed (int8)", "int8 weight"], ["int8", "int8"]]
    assert FloatWeight(None).reason_not_observable() == "weight was replaced while it was observed"
    assert source.reason_not_observable() == plain.reason_not_observable() == ""


def test_why_it_can_be_observed_no_more() -> None:
    parameter = nn.Parameter(normal(8, 12, seed=0), requires_grad=False)
    weight = FloatWeight(parameter)
    assert weight.reason_not_observable() == ""
    parameter.requires_grad_(True)
    assert weight.reason_not_observable() == "weight is trainable"


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_one_value_that_is_not_finite_is_found(poison: float) -> None:
    parameter = nn.Parameter(normal(8, 12, seed=0), requires_grad=False)
    assert FloatWeight(parameter).is_finite()
    parameter[7, 11] = poison
    assert not FloatWeight(parameter).is_finite()


def test_it_is_compared_with_a_stored_tensor_in_its_own_dtype() -> None:
    stored = normal(8, 12, seed=0)
    weight = FloatWeight(nn.Parameter(stored.bfloat16(), requires_grad=False))
    assert weight.is_made_from(stored)
    stored[3, 4] *= 1.01
    assert not weight.is_made_from(stored)
