"""A weight that was loaded as int8: its float product, and what it becomes once its outlier channels are known."""

from __future__ import annotations

import pytest
import torch

from quaff_fx.errors import CheckpointError
from quaff_fx.weights import OutlierState
from tests.data import dequantized_rows, normal
from tests.weights.layers import loaded


@pytest.mark.parametrize("in_dim", [1, 0], ids=["nn.Linear", "Conv1D"])
def test_its_product_and_gradient_are_those_of_the_dequantized_weight(in_dim: int) -> None:
    matrix, bias = normal(8, 12, seed=0), normal(8, seed=1)
    weight = loaded(matrix if in_dim == 1 else matrix.t().contiguous(), in_dim)
    x, dy = normal(2, 3, 12, seed=2).requires_grad_(), normal(2, 3, 8, seed=3)
    y = weight.linear(x, bias)
    y.backward(dy)
    dequantized = dequantized_rows(weight.w_int8, weight.w_scale)
    torch.testing.assert_close(y.detach().double(), x.detach().double() @ dequantized.t() + bias, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), dy.double() @ dequantized, rtol=1e-5, atol=1e-5)


def test_linears_may_read_it_over_its_own_dimension_alone() -> None:
    """It was rounded row by row: over the other dimension its scales would be none of the rows."""
    assert loaded(normal(8, 12, seed=0)).in_dims == (1,)
    assert loaded(normal(12, 8, seed=0), in_dim=0).in_dims == (0,)


def test_what_it_becomes_keeps_its_integers_and_takes_the_columns_it_is_given() -> None:
    weight = loaded(normal(8, 12, seed=0))
    outliers = OutlierState(torch.tensor([5, 1]), torch.ones(2), torch.full((2,), torch.inf), 1.0)
    columns = normal(8, 2, seed=1)
    quantized = weight.quantized(1, outliers, 63, 1, columns)
    assert quantized.w_int8 is weight.w_int8
    assert quantized.w_scale is weight.w_scale
    assert torch.equal(quantized.w_outlier, columns.t().half())
    assert (quantized.outliers, quantized.activation_bits) == (outliers, 7)


def test_a_file_that_is_gone_is_told_when_its_columns_are_to_be_read() -> None:
    weight = loaded(normal(8, 12, seed=0))
    with pytest.raises(CheckpointError, match=r"^gone\.safetensors: cannot be read any more"):
        weight.check_source()
    with pytest.raises(CheckpointError, match=r"^gone\.safetensors: cannot be read any more"):
        weight.columns(torch.tensor([1]), 1)
