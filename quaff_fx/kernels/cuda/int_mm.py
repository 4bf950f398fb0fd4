"""The int8 product of torch, `torch._int_mm`, for devices where Triton has none: Turing (sm_75)."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_ARCHITECTURE = 75
"""Older cards have no tensor cores for int8."""
MIN_TOKENS = 17
"""`torch._int_mm` wants more than 16 rows."""
MULTIPLE = 8
"""`torch._int_mm` wants inner and outer sizes in multiples of 8."""


def int8_matmul(a_int8: Tensor, w_int8: Tensor, transpose_w: bool) -> Tensor:
    """Returns the int32 product a wᵀ (T, N), or with `transpose_w` a w (T, K); pads where `torch._int_mm` needs it.

    The right operand is column-major in both directions, as tensor cores take it; backward a transposed weight exists
    for the time of the product. A row-major one is 6.5 times slower on an H200, and small shapes end there in
    CUBLAS_STATUS_NOT_SUPPORTED. The transpose is torch's own: Inductor compiles it, only eager code runs it slowly.

    Args:
        a_int8: (T, K), or (T, N) with `transpose_w`; int8. w_int8: (N, K) int8.
    """
    columns_first = w_int8.t().clone(memory_format=torch.contiguous_format) if transpose_w else w_int8
    columns, inner = columns_first.shape
    tokens = a_int8.shape[0]
    if tokens < MIN_TOKENS or inner % MULTIPLE:
        a_int8 = torch.nn.functional.pad(a_int8, (0, -inner % MULTIPLE, 0, max(0, MIN_TOKENS - tokens)))
    if inner % MULTIPLE or columns % MULTIPLE:
        columns_first = torch.nn.functional.pad(columns_first, (0, -inner % MULTIPLE, 0, -columns % MULTIPLE))
    accumulator: Tensor = torch._int_mm(a_int8, columns_first.t())
    return accumulator.narrow(0, 0, tokens).narrow(1, 0, columns)
