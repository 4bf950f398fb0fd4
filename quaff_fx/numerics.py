"""The formulas, on tensors and numbers only. `docs/numerics.md` gives the source of each.

Sizes: tokens T, in_features K, out_features N, outlier channels O. Every function works eagerly, under fake tensors
and inside a decomposition that Inductor fuses; none looks at tensor values in Python.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quaff_fx.errors import ShapeError

WEIGHT_MAX = 127
"""Largest absolute value of an int8 weight; -128 is never used, so signs can be swapped."""

INT32_MAX_REDUCTION = (2**31 - 1) // (WEIGHT_MAX * 127)
"""Longest reduction whose int32 accumulator cannot overflow."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The smallest normal float32. A scale below it is a scale of zero: its inverse, or that times 127, is infinite, and
infinity times zero would decide an integer."""


def quantize_weight(weight: Tensor, rotation: int = 1) -> tuple[Tensor, Tensor]:
    """Returns int8 weight and scale per out-feature: ``W ≈ w_int8 * w_scale[:, None]``, with W rotated along K.

    ``w_scale = absmax over K of each row / 127``, ``w_int8 = round(W / w_scale)``. A row of zeros has scale 0; so
    has one whose scale would be subnormal, and it comes out as zeros.

    Args:
        weight: (N, K), floating point, finite. rotation: B of `rotate`.

    Returns:
        w_int8 (N, K) int8 in ±127; w_scale (N,) float32.

    Raises:
        ShapeError: `weight` is not a floating matrix, or K is too long for an int32 accumulator.

    Source: per-row absmax as in Quaff, but per out-feature where the paper's code uses one scale per
    tensor: the same int8 tensor then serves forward and backward.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ShapeError(
            f"weight: is {weight.dtype} of shape {tuple(weight.shape)}, expected a floating matrix (N, K). Pass one."
        )
    if weight.shape[1] > INT32_MAX_REDUCTION:
        raise ShapeError(
            f"weight: has shape {tuple(weight.shape)}, expected at most {INT32_MAX_REDUCTION} in-features. "
            "An int32 accumulator could overflow; exclude the layer."
        )
    weight = rotate(weight.detach().float(), rotation)
    absmax = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    w_scale = _normal_or_zero(absmax / WEIGHT_MAX)
    w_int8 = torch.round(weight * _reciprocal(w_scale).unsqueeze(1)).clamp_(-WEIGHT_MAX, WEIGHT_MAX).to(torch.int8)
    return w_int8, w_scale


def dequantize_rows(w_int8: Tensor, w_scale: Tensor, rotation: int = 1) -> Tensor:
    """Returns ``w_int8 * w_scale[:, None]`` rotated back, (N, K) float32.

    Args:
        w_int8: (N, K) int8. w_scale: (N,) float32. rotation: the block B that the weight was rotated with.
    """
    return rotate(w_int8 * w_scale.unsqueeze(1), rotation)


def rotation_block(features: int, largest: int) -> int:
    """Returns B, the largest power of two up to `largest` that divides `features`; 1 is no rotation."""
    block = 1
    while 2 * block <= largest and features % (2 * block) == 0:
        block *= 2
    return block


def rotate(x: Tensor, block: int) -> Tensor:
    """Returns x (..., K) with each block of B neighbouring features multiplied by H_B: ``x (I ⊗ H_B)``.

    ``x.reshape(..., K/B, B) @ H_B``, H the orthogonal Sylvester-Hadamard matrix: 1/√B times (-1)^(bits set in i & j).
    It is its own inverse, and leaves ``x Wᵀ`` what it was when both are rotated. It spreads what is large in one
    feature over B, so that a row's absmax, and with it the rounding error, falls. Blocks are contiguous, so that a
    kernel that has a few neighbouring columns of a result in registers can rotate them there. Source: the online
    Hadamard transform of QuaRot (Ashkboos and others, NeurIPS 2024); here in blocks, and on every frozen linear.

    Sums are taken in a fixed order, so that a row comes out the same in whatever batch it is: after the factor, first
    over features that differ in bit 0 of their index, then in bit 1, and so on. `kernels/cpu/int8_rotate.h` adds in the
    same order, so both give the same bits.

    Args:
        x: (..., K) float32. block: B, a power of two that divides K; 1 returns x.
    """
    if block == 1:
        return x
    shape = x.shape
    x = x.reshape(-1, block) * (1.0 / math.sqrt(block))
    # Sums go before differences, which turns the next bit of the index into bit 0. After all bits each is in its place.
    for _ in range(block.bit_length() - 1):
        first, second = x.reshape(-1, block // 2, 2).unbind(-1)
        x = torch.cat([first + second, first - second], dim=-1)
    return x.reshape(shape)


def outlier_rows(columns: Tensor) -> Tensor:
    """Returns the outlier columns of a weight, (N, O), as what is kept of them, (O, N), in 16 bits.

    As they are if they have a 16-bit dtype, else in float16, whose rounding, 2^-11 of a value, is far below that of
    the int8 weights beside them; in float32 if a value is beyond float16's largest.
    """
    rows = columns.detach().t().contiguous()
    if rows.dtype.itemsize == 2:
        return rows
    is_in_range = rows.numel() == 0 or bool(rows.abs().amax() <= torch.finfo(torch.float16).max)
    return rows.to(torch.float16 if is_in_range else torch.float32)


def dequantize_weight(
    w_int8: Tensor, w_scale: Tensor, w_outlier: Tensor, outlier_channels: Tensor, rotation: int
) -> Tensor:
    """Returns the float32 weight (N, K) `dequantize_rows` with the kept outlier columns in place.

    Args:
        w_int8: (N, K) int8. w_scale: (N,) float32. w_outlier: (O, N), row j is column ``outlier_channels[j]`` of W.
        outlier_channels: (O,) int64, distinct, in [0, K). rotation: the block B that the weight was rotated with.
    """
    weight = dequantize_rows(w_int8, w_scale, rotation)
    return weight.index_copy(1, outlier_channels, w_outlier.float().t())


def smoothing_target(x_absmax: Tensor, w_absmax: Tensor) -> Tensor:
    """Returns β = max(1, sqrt(absmax x_i / absmax W_i)) for each outlier channel, (O,) float32.

    A channel whose weights are all zero, or subnormal, gets 1. Source: Quaff; the paper's code floors at 1 as well.
    """
    ratio = x_absmax.float() * _reciprocal(w_absmax.float())
    return ratio.sqrt().clamp(min=1.0)


def updated_smoothing_scale(smoothing_scale: Tensor, target: Tensor, momentum: float) -> Tensor:
    """Returns γ s + (1 - γ) β, (O,) float32; keeps s where β is not finite, so that one bad batch is forgotten.

    Source: Quaff. `momentum` weighs the **old** value; the paper's code gives the new one 0.9.
    """
    return torch.where(torch.isfinite(target), momentum * smoothing_scale + (1.0 - momentum) * target, smoothing_scale)


def channel_absmax(x: Tensor) -> Tensor:
    """Returns the absolute maximum of each channel of x (T, K) over tokens, (K,) float32; zeros when T is 0."""
    if x.shape[0] == 0:
        return x.new_zeros(x.shape[1], dtype=torch.float32)
    return x.abs().amax(dim=0).float()


def quantize_rows(x: Tensor, activation_max: int) -> tuple[Tensor, Tensor]:
    """Returns int8 rows and a scale per row: ``x ≈ x_int8 * x_scale[:, None]``.

    ``x_scale = absmax of the row / Q``, ``x_int8 = round(x Q / absmax)``, half to even. A row of zeros has scale 0, and
    so has one whose scale would be subnormal: it comes out as zeros. A row with a non-finite value has scale NaN and
    zeros as integers: it comes out non-finite, and touches no other row.

    `kernels/int8_quantize.h` rounds after the same operations in the same order, so both give the same bits.

    Args:
        x: (T, K) floating point. activation_max: Q, 127 or 63.

    Returns:
        x_int8 (T, K) int8 in ±Q; x_scale (T,) float32.
    """
    x = x.float()
    if x.shape[1] == 0:
        return x.to(torch.int8), x.new_zeros(x.shape[0])
    return _quantize_rows_up_to(x, x.abs().amax(dim=1), activation_max)


def _quantize_rows_up_to(x: Tensor, absmax: Tensor, activation_max: int) -> tuple[Tensor, Tensor]:
    """Returns `quantize_rows` of rows whose values beyond `absmax` (T,), if there are any, become ±Q."""
    finite = absmax < torch.inf  # false for NaN as well
    scale = _normal_or_zero(absmax * (1.0 / activation_max))
    inverse = torch.where(finite & (scale > 0), absmax.reciprocal() * activation_max, 0.0)
    scaled = torch.where(finite.unsqueeze(1), x * inverse.unsqueeze(1), 0.0)
    x_int8 = torch.round(scaled).clamp(-activation_max, activation_max).to(torch.int8).contiguous()
    return x_int8, torch.where(finite, scale, torch.nan)


def quantize_activation(
    x: Tensor, outlier_channels: Tensor, smoothing_scale: Tensor, activation_max: int, rotation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the smoothed and rotated activation in int8, its scale per token, and the operand of the correction.

    ``x̂ = x / s`` with s_i = 1 outside the outlier channels; ``x_outlier = x̂_O (s_O - 1) = x_O (1 - 1 / s_O)``. Then
    ``y = x_scale w_scale (x_int8 w_int8ᵀ) + x_outlier W_Oᵀ`` equals x Wᵀ up to rounding (Quaff), x̂ and W rotated alike.

    Args:
        x: (T, K) floating point. outlier_channels: (O,) int64. smoothing_scale: (O,) float32, at least 1; infinite
            for channels that leave the int8 product altogether: x̂_i = 0 and x_outlier_i = x_i.
        activation_max: Q, 127 or 63. rotation: B of `rotate`.

    Returns:
        x_int8 (T, K) int8 in ±Q; x_scale (T,) float32; x_outlier (T, O) float32.
    """
    x = x.float()
    if outlier_channels.shape[0] == 0:
        return *quantize_rows(rotate(x, rotation), activation_max), x.new_zeros(x.shape[0], 0)
    inverse = 1.0 / smoothing_scale
    smoothed = x * x.new_ones(x.shape[1]).index_copy(0, outlier_channels, inverse)
    x_outlier = x.index_select(1, outlier_channels) * (1.0 - inverse)
    return *quantize_rows(rotate(smoothed, rotation), activation_max), x_outlier


def quantize_gradient(grad_output: Tensor, w_scale: Tensor, activation_max: int) -> tuple[Tensor, Tensor]:
    """Returns ``dy ⊙ w_scale`` in int8 with a scale per token: g_int8 (T, N) int8, g_scale (T,) float32.

    Then ``dx = g_scale (g_int8 w_int8)``: for a fixed s the gradient is dy W exactly, it needs neither s nor x.
    """
    return quantize_rows(grad_output.float() * w_scale, activation_max)


GRAD_OUTLIERS = 32
"""How many values of each token's gradient of the logits are kept apart."""


def quantize_gradient_of_logits(
    grad_output: Tensor, w_scale: Tensor, activation_max: int, outliers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `quantize_gradient` with the largest values of each token apart.

    Then ``dx = g_scale (g_int8 w_int8) + rest w_int8[index]``.
    The gradient of a cross entropy is softmax minus one-hot: a few tokens of the vocabulary have almost all of it, and
    beside them 8 bits round tens of thousands of small ones, which count together, to zero. So the scale is that of the
    largest value but for `outliers`. These become ±Q at most, and what that leaves of them is `rest`.
    `docs/numerics.md` has the figures.

    Args:
        grad_output: (T, N) floating point. w_scale: (N,) float32. activation_max: Q. outliers: how many, below N.

    Returns:
        g_int8 (T, N) int8 in ±Q; g_scale (T,) float32; index (T, outliers) int64 and rest (T, outliers) float32.
    """
    g = grad_output.float() * w_scale
    largest, index = _largest(g.abs(), outliers + 1)
    g_int8, g_scale = _quantize_rows_up_to(g, largest[:, -1], activation_max)
    index = index[:, :-1]
    rest = g.gather(1, index) - g_int8.gather(1, index) * g_scale.unsqueeze(1)
    return g_int8, g_scale, index, rest


_SEGMENT = 64


def _largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the `count` largest values of each row of x (T, N), descending, and where they are.

    They are in the `count` segments that have the largest maxima, so one pass over x and a small sort find them.
    """
    if x.shape[1] <= count * _SEGMENT:
        return x.topk(count)
    segments = torch.nn.functional.pad(x, (0, -x.shape[1] % _SEGMENT)).reshape(x.shape[0], -1, _SEGMENT)
    chosen = segments.amax(dim=2).topk(count).indices
    largest, index = segments.gather(1, chosen.unsqueeze(2).expand(-1, -1, _SEGMENT)).flatten(1).topk(count)
    return largest, chosen.gather(1, index // _SEGMENT) * _SEGMENT + index % _SEGMENT


def outlier_hits(absmax: Tensor, count: int) -> Tensor:
    """Returns which channels are among the `count` of largest absmax in one step, (K,) bool; never a zero channel."""
    hits = torch.zeros_like(absmax, dtype=torch.bool)
    if count:
        hits[absmax.topk(count).indices] = True
    return hits & (absmax > 0)


def stable_outlier_channels(hits: Tensor, absmax: Tensor, count: int) -> Tensor:
    """Returns the `count` channels that were outliers in the most steps, ties broken by mean absmax, (O,) int64.

    Every site of one projection gets the same `count`, so that blocks share compiled graphs; channels that fill the
    budget without being outliers are harmless, since s ≥ 1 leaves small ones as they are.

    Args:
        hits: (K,) number of steps (or of values) in which the channel was an outlier.
        absmax: (K,) mean over steps of the channel's absmax.
        count: at most K.
    """
    by_absmax = torch.argsort(absmax, descending=True, stable=True)
    by_hits = torch.argsort(hits[by_absmax], descending=True, stable=True)
    return by_absmax[by_hits][:count].clone()  # a slice would keep all of it, and safetensors refuses shared slices


def outlier_count(in_features: int, budget: float) -> int:
    """Returns how many channels a budget allows: the share of K rounded down to an integer, at least 1 if any share."""
    allowed = int(in_features * budget + 1e-6)  # 200 × 0.145 is 28.999… in floating point
    return min(in_features, max(1, allowed)) if budget > 0 else 0


def _normal_or_zero(scale: Tensor) -> Tensor:
    """The scale, and 0 where it is subnormal; NaN stays."""
    return torch.where(scale < SMALLEST_SCALE, 0.0, scale)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where scale is 0, subnormal or NaN."""
    return torch.where(scale >= SMALLEST_SCALE, 1.0 / scale, 0.0)
