"""Chooses the int8 product of a device, once, and says what was chosen."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext

import torch
from torch import Tensor

from quaff_fx import numerics
from quaff_fx.errors import QuaffWarning
from quaff_fx.kernels import cpu, cuda, reference


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
) -> Tensor:
    """Returns ``a_scale w_scale (a wᵀ) + a_outlier w_outlier + bias``, or with `transpose_w` the same of ``a w``.

    The integers are added up exactly whatever computes them.

    Args:
        a_int8: (T, K), or (T, N) with `transpose_w`; int8 in ±`activation_max`.
        w_int8: (N, K) int8 in ±127.
        transpose_w: False: the forward product, C = N result columns; True: the backward one, C = K.
        activation_max: 127 or 63; with 63 an AVX2 machine may use its fast saturating instruction safely.
        a_scale: (T,) float32. w_scale: (C,) float32. bias: (C,).
        a_outlier: (T, O) float32. w_outlier: (O, C) float32.
        out_dtype: float32, bfloat16 or float16; or int32 for the bare accumulator, without scales.
        rotation: B of `numerics.rotate`, which the first term goes through: the gradient of a rotated activation.

    Returns:
        (T, C) of `out_dtype`.
    """
    if a_int8.device.type == "cpu" and reason_no_kernel() is None:
        return cpu.int8_linear(
            a_int8,
            w_int8,
            transpose_w=transpose_w,
            activation_max=activation_max,
            a_scale=a_scale,
            w_scale=w_scale,
            a_outlier=a_outlier,
            w_outlier=w_outlier,
            bias=None if bias is None else bias.float(),
            out_dtype=out_dtype,
            rotation=rotation,
        )
    int8_matmul = cuda.int8_matmul if a_int8.device.type == "cuda" else reference.int8_matmul
    accumulator = int8_matmul(a_int8, w_int8, transpose_w)
    return dequantized(accumulator, a_scale, w_scale, a_outlier, w_outlier, bias, out_dtype, rotation)


def quantize_activation(
    x: Tensor, outlier_channels: Tensor, smoothing_scale: Tensor, activation_max: int, rotation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `numerics.quantize_activation` of x (T, K), through the compiled kernel where there is one."""
    quantize = numerics.quantize_activation
    if x.device.type == "cpu" and reason_no_kernel() is None:
        quantize = cpu.quantize_activation
    return quantize(x, outlier_channels, smoothing_scale, activation_max, rotation)


def dequantized(
    accumulator: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    a_outlier: Tensor | None,
    w_outlier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    rotation: int = 1,
) -> Tensor:
    """Returns the epilogue of `int8_linear` on an int32 accumulator (T, C), in plain torch."""
    if out_dtype == torch.int32:
        return accumulator
    result = accumulator.float()
    if a_scale is not None:
        result = result * a_scale.unsqueeze(1)
    if w_scale is not None:
        result = result * w_scale
    result = numerics.rotate(result, rotation)
    if a_outlier is not None and w_outlier is not None and a_outlier.shape[1]:
        kind = accumulator.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            result = result + a_outlier @ w_outlier
    if bias is not None:
        result = result + bias.float()
    return result.to(out_dtype)


@functools.cache
def reason_no_kernel() -> str | None:
    """Why the compiled kernel is not used on this CPU, or None; warns once if it is not."""
    found = cpu.obstacle_to_kernel()
    if found is not None:
        warn_of(found)
    return None if found is None else found.reason


@functools.cache
def warn_of(obstacle: cpu.Obstacle) -> None:
    """Warns, once for each obstacle: one keeps both the kernel and Inductor from compiling."""
    warnings.warn(
        f"compilation: {obstacle.reason}, expected code compiled for this machine. The model runs without it: right, "
        f"in int8, but slower than in float32. {obstacle.way_out}",
        QuaffWarning,
        stacklevel=3,
    )


def activation_max(bits: str | int, device: torch.device) -> int:
    """Returns Q for `QuaffConfig.activation_bits` on a device: 127, or 63 where only 7 bits are fast and exact."""
    if bits == "auto":
        slow_at_8_bits = device.type == "cpu" and cpu.instruction_set() == "avx2"
        return 63 if slow_at_8_bits else 127
    return 63 if bits == 7 else 127


def describe(device: torch.device) -> str:
    """Returns in a few words what computes the int8 products on a device."""
    if device.type == "cuda":
        return "torch._int_mm"
    if device.type == "cpu" and cpu.reason_unavailable() is None:
        return f"own kernel, {cpu.instruction_set()}"
    return "plain torch (exact, slow)"
