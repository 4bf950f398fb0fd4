"""The two layouts of a parameter: views that come back, and shapes."""

from __future__ import annotations

import pytest
import torch

from quaff_fx.weights.layout import as_matrix, from_matrix, swapped_shape
from tests.data import normal


@pytest.mark.parametrize("in_dim", [1, 0], ids=["nn.Linear", "Conv1D"])
def test_a_parameter_and_its_matrix(in_dim: int) -> None:
    matrix = normal(8, 12, seed=0)
    parameter = matrix if in_dim == 1 else matrix.t().contiguous()
    assert torch.equal(as_matrix(parameter, in_dim), matrix)
    assert torch.equal(from_matrix(matrix, in_dim), parameter)
    assert as_matrix(parameter, in_dim).data_ptr() == parameter.data_ptr(), "a view"
    assert from_matrix(matrix, in_dim).data_ptr() == matrix.data_ptr(), "a view"
    assert swapped_shape(parameter.shape, in_dim) == (8, 12)
    assert swapped_shape((8, 12), in_dim) == tuple(parameter.shape)
