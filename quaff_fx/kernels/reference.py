"""The int8 product in plain torch: exact on every device and slower than a float32 product."""

from __future__ import annotations

import torch
from torch import Tensor


def int8_matmul(a_int8: Tensor, w_int8: Tensor, transpose_w: bool) -> Tensor:
    """Returns the int32 product a wᵀ (T, N), or with `transpose_w` a w (T, K), exactly.

    Through float64, which holds every sum that int32 holds, and which neither autocast nor
    `torch.set_float32_matmul_precision` touches.

    Args:
        a_int8: (T, K), or (T, N) with `transpose_w`; int8. w_int8: (N, K) int8.
    """
    w = w_int8 if transpose_w else w_int8.t()
    return (a_int8.double() @ w.double()).to(torch.int32)
