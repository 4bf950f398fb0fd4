"""The int8 product on CUDA: `torch._int_mm`, which Inductor lowers to a Triton template or cuBLASLt."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_TOKENS = 17
"""`torch._int_mm` wants more than 16 rows."""
MULTIPLE = 8
"""`torch._int_mm` wants inner and outer sizes in multiples of 8."""


def int8_matmul(a_int8: Tensor, w_int8: Tensor, transpose_w: bool) -> Tensor:
    """Returns the int32 product a wᵀ (T, N), or with `transpose_w` a w (T, K); pads where `torch._int_mm` needs it.

    Args:
        a_int8: (T, K), or (T, N) with `transpose_w`; int8. w_int8: (N, K) int8.
    """
    w = w_int8 if transpose_w else w_int8.t()
    tokens, inner = a_int8.shape
    columns = w.shape[1]
    if tokens < MIN_TOKENS or inner % MULTIPLE:
        a_int8 = torch.nn.functional.pad(a_int8, (0, -inner % MULTIPLE, 0, max(0, MIN_TOKENS - tokens)))
    if inner % MULTIPLE or columns % MULTIPLE:
        w = torch.nn.functional.pad(w, (0, -columns % MULTIPLE, 0, -inner % MULTIPLE))
    accumulator: Tensor = torch._int_mm(a_int8, w)
    return accumulator.narrow(0, 0, tokens).narrow(1, 0, columns)
