"""The row quantizer: smooth, rotate and round an activation, and take its outlier channels out, in one read of it."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (Kernels are written in Triton's language, which has no types for mypy.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from quaff_fx import numerics
from quaff_fx.kernels.cuda import tiles
from quaff_fx.kernels.cuda.hadamard import rotated

SMALLEST_SCALE = tl.constexpr(numerics.SMALLEST_SCALE)

ROUND_TO_EVEN = tl.constexpr(12582912.0)
"""1.5 · 2^23: a float32 of up to 2^22 that is added to it is rounded half to even, and stands in the lowest bits."""

OUTLIER_MULTIPLE = 16
"""What the columns of x_outlier are padded to: tensor cores reduce 16 wide."""


@triton.jit
def factor_kernel(
    outlier_channel_ptr, smoothing_scale_ptr, factor_ptr, K,
    OUTLIERS: tl.constexpr, OUTLIER_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What each channel of x is multiplied by: 1, and 1 / s for outlier channels, (K,) float32."""
    first = tl.program_id(0) * WIDTH
    column = first + tl.arange(0, WIDTH)
    tl.store(factor_ptr + column, tl.full((WIDTH,), 1.0, tl.float32), mask=column < K)
    # A channel's 1 and its 1 / s are written by different threads of this program, and in this order.
    tl.debug_barrier()
    o = tl.arange(0, OUTLIER_WIDTH)
    channel = tl.load(outlier_channel_ptr + o, mask=o < OUTLIERS, other=-1)
    smoothing_scale = tl.load(smoothing_scale_ptr + o, mask=o < OUTLIERS, other=1.0)
    is_here = (channel >= first) & (channel < first + WIDTH)
    tl.store(factor_ptr + channel, 1.0 / smoothing_scale, mask=is_here)


@triton.jit
def smoothed(
    x_ptr, factor_ptr, first, K, stride_k,
    HAS_FACTOR: tl.constexpr, ROTATION: tl.constexpr, dtype: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Returns `WIDTH` channels of a row from `first` on, times their factors and rotated, (1, WIDTH) float32."""
    column = first + tl.arange(0, WIDTH)[None, :]
    x = tl.load(x_ptr + column * stride_k, mask=column < K, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        x *= tl.load(factor_ptr + column, mask=column < K, other=0.0)
    if ROTATION > 1:
        x = rotated(x, ROTATION, dtype)
    return x


@triton.jit
def absmax_bits(x):
    """Returns the largest |x| of a row as the bits of a float32, whose order as integers puts NaN above infinity.

    Triton's maximum of floats passes NaN over. One axis after the other does not compile for sm_100 (Triton 3.7.1).
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def quantized(x, inverse, is_finite, ACTIVATION_MAX: tl.constexpr):
    # Limits come before rounding: between a product and a sum they keep the compiler from a fused multiply-add, which
    # would round another number than the contract's. Limits are integers, so that their order does not matter.
    scaled = tl.where(is_finite, x * inverse, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -ACTIVATION_MAX), ACTIVATION_MAX)
    return (scaled + ROUND_TO_EVEN).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize_kernel(
    x_ptr, factor_ptr, outlier_channel_ptr, smoothing_scale_ptr, x_int8_ptr, x_scale_ptr, x_outlier_ptr,
    T, K, stride_t, stride_k,
    OUTLIERS: tl.constexpr, PADDED: tl.constexpr, OUTLIER_WIDTH: tl.constexpr,
    ACTIVATION_MAX: tl.constexpr, ROTATION: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program quantizes every P-th row, P the number of programs, so that it builds the rotation once."""
    dtype: tl.constexpr = x_outlier_ptr.dtype.element_ty
    for row in range(tl.program_id(0), T, tl.num_programs(0)):
        x_row = x_ptr + tl.cast(row, tl.int64) * stride_t
        x_int8_row = x_int8_ptr + tl.cast(row, tl.int64) * K
        x = smoothed(x_row, factor_ptr, 0, K, stride_k, OUTLIERS > 0, ROTATION, dtype, WIDTH)
        bits = absmax_bits(x)
        # A row that does not fit in registers is read twice, the second time from the cache.
        for chunk in range(1, CHUNKS):
            x = smoothed(x_row, factor_ptr, chunk * WIDTH, K, stride_k, OUTLIERS > 0, ROTATION, dtype, WIDTH)
            bits = tl.maximum(bits, absmax_bits(x))

        absmax = bits.to(tl.float32, bitcast=True)
        is_finite = absmax < float("inf")
        scale = absmax * (1.0 / ACTIVATION_MAX)
        is_normal = scale >= SMALLEST_SCALE
        inverse = tl.where(is_finite & is_normal, tl.div_rn(1.0, absmax) * ACTIVATION_MAX, 0.0)
        scale = tl.where(is_normal, scale, 0.0)
        tl.store(x_scale_ptr + row, tl.where(is_finite, scale, float("nan")))

        for chunk in range(CHUNKS):
            if CHUNKS > 1:
                x = smoothed(x_row, factor_ptr, chunk * WIDTH, K, stride_k, OUTLIERS > 0, ROTATION, dtype, WIDTH)
            column = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
            tl.store(x_int8_row + column, quantized(x, inverse, is_finite, ACTIVATION_MAX), mask=column < K)

        if OUTLIERS > 0:
            o = tl.arange(0, OUTLIER_WIDTH)
            channel = tl.load(outlier_channel_ptr + o, mask=o < OUTLIERS, other=0)
            share = 1.0 - 1.0 / tl.load(smoothing_scale_ptr + o, mask=o < OUTLIERS, other=1.0)
            x_o = tl.load(x_row + channel * stride_k, mask=o < OUTLIERS, other=0.0).to(tl.float32) * share
            tl.store(x_outlier_ptr + tl.cast(row, tl.int64) * PADDED + o, x_o.to(dtype), mask=o < PADDED)


def outlier_operand(dtype: torch.dtype, outliers: int) -> tuple[torch.dtype, int]:
    """Returns dtype and columns of x_outlier for O outlier channels of an x of a dtype."""
    return dtype if dtype.itemsize == 2 else torch.float32, outlier_columns(outliers)


def outlier_columns(outliers: int) -> int:
    """Returns how many columns x_outlier has for O outlier channels: O rounded up to a multiple of 16."""
    return -(-outliers // OUTLIER_MULTIPLE) * OUTLIER_MULTIPLE


def quantize_activation(
    x: Tensor, outlier_channels: Tensor, smoothing_scale: Tensor, activation_max: int, rotation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `numerics.quantize_activation` gives, with x_outlier padded and in the dtype of x.

    A 16-bit x that is rotated is rounded to its dtype after the division by s; where s is infinite that changes
    nothing. Rotated values are float32 sums in the order of the tensor cores, so a few integers differ by one from
    those of another order; without rotation all bits are those of the contract.

    Args:
        x: (T, K) floating point, any strides. outlier_channels: (O,) int64, distinct. smoothing_scale: (O,) float32,
            at least 1, or infinite. activation_max: Q, 127 or 63. rotation: B of `numerics.rotate`, at most 64.

    Returns:
        x_int8 (T, K) int8 in ±Q; x_scale (T,) float32; x_outlier (T, `outlier_columns` (O)), in the dtype of a 16-bit
        x, else float32, whose columns past O are zero.
    """
    tokens, features = x.shape
    outliers = outlier_channels.shape[0]
    dtype, padded = outlier_operand(x.dtype, outliers)
    x_int8 = torch.empty((tokens, features), dtype=torch.int8, device=x.device)
    x_scale = torch.empty((tokens,), dtype=torch.float32, device=x.device)
    x_outlier = torch.empty((tokens, padded), dtype=dtype, device=x.device)
    if tokens == 0:
        return x_int8, x_scale, x_outlier
    outlier_width = triton.next_power_of_2(max(outliers, padded, 1))
    factor = smoothing_scale
    if outliers:
        factor = torch.empty((features,), dtype=torch.float32, device=x.device)
        kernel = wrap_triton(tiles.tiled(factor_kernel, tiles.FACTOR))
        grid = (-(-features // tiles.FACTOR.constants["WIDTH"]),)
        kernel[grid](outlier_channels, smoothing_scale, factor, features, outliers, outlier_width)
    tile = tiles.row_tile(tiles.architecture(x.device), features, x.dtype, rotation)
    kernel = wrap_triton(tiles.tiled(quantize_kernel, tile))
    chunks = max(1, -(-features // tile.constants["WIDTH"]))
    kernel[(-(-tokens // tiles.ROWS_PER_PROGRAM),)](
        x, factor, outlier_channels, smoothing_scale, x_int8, x_scale, x_outlier,
        tokens, features, x.stride(0), x.stride(1), outliers, padded, outlier_width, activation_max, rotation, chunks,
    )  # fmt: skip
    return x_int8, x_scale, x_outlier
