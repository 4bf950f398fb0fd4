"""The contract of every device, in plain torch: exact on every device, and slower than a float32 product."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from quaff_fx import numerics

quantize_activation = numerics.quantize_activation


def int8_matmul(a_int8: Tensor, w_int8: Tensor, transpose_w: bool) -> Tensor:
    """Returns the int32 product a wᵀ (T, N), or with `transpose_w` a w (T, K), exactly.

    Through float64, which holds every sum that int32 holds, and which neither autocast nor
    `torch.set_float32_matmul_precision` touches.

    Args:
        a_int8: (T, K), or (T, N) with `transpose_w`; int8. w_int8: (N, K) int8.
    """
    w = w_int8 if transpose_w else w_int8.t()
    return (a_int8.double() @ w.double()).to(torch.int32)


def int8_linear(
    a_int8: Tensor,
    w_int8: Tensor,
    *,
    transpose_w: bool,
    activation_max: int,
    a_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    a_outlier: Tensor | None = None,
    w_outlier: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.int32,
    rotation: int = 1,
    a_low_rank: Tensor | None = None,
    w_low_rank: Tensor | None = None,
    int8_matmul: Callable[[Tensor, Tensor, bool], Tensor] = int8_matmul,
) -> Tensor:
    """Returns ``a_scale w_scale (a wᵀ) + a_outlier w_outlier + a_low_rank w_low_rank + bias``, or that of ``a w``.

    The integers are added up exactly whatever computes them.

    Args:
        a_int8: (T, K), or (T, N) with `transpose_w`; int8 in ±`activation_max`.
        w_int8: (N, K) int8 in ±127.
        transpose_w: False: the forward product, C = N result columns; True: the backward one, C = K.
        activation_max: 127 or 63; with 63 an AVX2 machine may use its fast saturating instruction safely.
        a_scale: (T,) float32. w_scale: (C,) float32. bias: (C,) floating.
        a_outlier: (T, O) floating, or wider if the quantizer pads it with columns of zeros. w_outlier: (O, C) floating.
        a_low_rank: (T, R) floating. w_low_rank: (R, C) floating; an adapter's. Both products are added up in float32.
        out_dtype: float32, bfloat16 or float16; or int32 for the bare accumulator, without scales.
        rotation: B of `numerics.rotate`, which the first term goes through: the gradient of a rotated activation.
        int8_matmul: the bare product, which has the signature of this file's.

    Returns:
        (T, C) of `out_dtype`.
    """
    accumulator = int8_matmul(a_int8, w_int8, transpose_w)
    if out_dtype == torch.int32:
        return accumulator
    result = accumulator.float()
    if a_scale is not None:
        result = result * a_scale.unsqueeze(1)
    if w_scale is not None:
        result = result * w_scale
    result = numerics.rotate(result, rotation)
    for a, w in ((a_outlier, w_outlier), (a_low_rank, w_low_rank)):
        if a is not None and w is not None and w.shape[0]:
            kind = accumulator.device.type
            with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
                result = result + a.narrow(1, 0, w.shape[0]).float() @ w.float()
    if bias is not None:
        result = result + bias
    return result.to(out_dtype)
