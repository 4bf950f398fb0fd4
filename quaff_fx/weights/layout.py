"""The two layouts in which a parameter holds the matrix (N, K) of a linear.

The dimension that the product reduces over, `in_dim`, names the layout: 1 is (N, K), as `nn.Linear` has it; 0 is
(K, N), as GPT-2's Conv1D has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def as_matrix(weight: Tensor, in_dim: int) -> Tensor:
    """Returns the matrix (N, K) of a parameter, a view."""
    return weight if in_dim == 1 else weight.t()


def from_matrix(matrix: Tensor, in_dim: int) -> Tensor:
    """Returns a matrix (N, K) in the layout of the parameter, a view."""
    return matrix if in_dim == 1 else matrix.t()


def swapped_shape(shape: Sequence[int], in_dim: int) -> tuple[int, ...]:
    """Returns (N, K) for the shape of a parameter, and the shape of the parameter for (N, K)."""
    return tuple(shape) if in_dim == 1 else tuple(shape)[::-1]
