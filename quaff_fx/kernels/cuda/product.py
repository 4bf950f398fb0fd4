"""The int8 product with its epilogue: scales, rotation, the outlier correction, an adapter's product, and the bias."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (Kernels are written in Triton's language, which has no types for mypy.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from quaff_fx.kernels.cuda import tiles
from quaff_fx.kernels.cuda.hadamard import rotated
from quaff_fx.kernels.cuda.transpose import transpose


@triton.jit
def plus_pair(
    out, a_rows, b_columns, stride_a, stride_b, RANK: tl.constexpr, B_RANK: tl.constexpr, dtype: tl.constexpr
):
    """Returns `out` plus a b, 16 of the rank at a time: of all widths this one takes the fewest registers.

    Args:
        a_rows, b_columns: pointers to the first element of each row of a (T, RANK), each column of b (B_RANK, C).
        RANK, B_RANK: columns of a past B_RANK are zero.
    """
    for part in tl.static_range((RANK + 15) // 16):
        r = part * 16 + tl.arange(0, 16)
        if RANK % 16 == 0:
            a = tl.load(a_rows + r[None, :] * stride_a)
        else:
            a = tl.load(a_rows + r[None, :] * stride_a, mask=(r < RANK)[None, :], other=0.0)
        # Where b ends, a is zero: the last row of b is read again, which unlike a mask takes no registers.
        b = tl.load(b_columns + tl.minimum(r, B_RANK - 1)[:, None] * stride_b)
        out = tl.dot(a.to(dtype), b.to(dtype), out, input_precision="tf32x3")
    return out


@triton.jit
def int8_linear_kernel(
    a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, a_outlier_ptr, w_outlier_ptr, a_low_rank_ptr, w_low_rank_ptr,
    bias_ptr, T, C, K, stride_at, stride_ak, stride_wc, stride_wk,
    stride_aot, stride_aor, stride_wor, stride_woc, stride_alt, stride_alr, stride_wlr, stride_wlc,
    HAS_A_SCALE: tl.constexpr, HAS_W_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, OUTLIERS: tl.constexpr,
    W_OUTLIERS: tl.constexpr, RANK: tl.constexpr, ROTATION: tl.constexpr, IS_EVEN: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, REDUCTION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of ``rotate(a_scale w_scale (a wᵀ)) + a_outlier w_outlier + a_low_rank w_low_rank + bias``, w (C, K)."""
    # Neighbouring programs share rows of w: GROUP tiles of tokens, then the next columns. So w is read once per group.
    tiles_t = tl.cdiv(T, TOKENS)
    in_group = GROUP * tl.cdiv(C, COLUMNS)
    program = tl.program_id(0)
    first_t = program // in_group * GROUP
    group = tl.minimum(tiles_t - first_t, GROUP)
    corner_t = (first_t + program % in_group % group) * TOKENS
    corner_c = program % in_group // group * COLUMNS

    # The corner of the tile is a 64-bit scalar that walks along the reduction, offsets inside the tile are 32 bits and
    # stay: fewer registers. Tokens and columns past the end read the last one again, instead of masks; only the store
    # is masked.
    t = tl.arange(0, TOKENS)
    c = tl.arange(0, COLUMNS)
    k = tl.arange(0, REDUCTION)
    row = tl.minimum(t, T - corner_t - 1)
    column = tl.minimum(c, C - corner_c - 1)
    wide_t = corner_t.to(tl.int64)
    wide_c = corner_c.to(tl.int64)
    a_ptr += wide_t * stride_at
    w_ptr += wide_c * stride_wc
    a_tile = row[:, None] * stride_at + k[None, :] * stride_ak
    w_tile = column[None, :] * stride_wc + k[:, None] * stride_wk
    total = tl.zeros((TOKENS, COLUMNS), tl.int32)
    for step in range(tl.cdiv(K, REDUCTION)):
        if IS_EVEN:
            a = tl.load(a_ptr + a_tile)
            w = tl.load(w_ptr + w_tile)
        else:
            a = tl.load(a_ptr + a_tile, mask=(k < K - step * REDUCTION)[None, :], other=0)
            w = tl.load(w_ptr + w_tile, mask=(k < K - step * REDUCTION)[:, None], other=0)
        total = tl.dot(a, w, total, out_dtype=tl.int32)
        a_ptr += REDUCTION * stride_ak
        w_ptr += REDUCTION * stride_wk

    out_tile = out_ptr + wide_t * C + wide_c + t[:, None] * C + c[None, :]
    is_inside = (t < T - corner_t)[:, None] & (c < C - corner_c)[None, :]
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_tile, total, mask=is_inside)
    else:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        out = total.to(tl.float32)
        if HAS_A_SCALE:
            out *= tl.load(a_scale_ptr + wide_t + row)[:, None]
        if HAS_W_SCALE:
            out *= tl.load(w_scale_ptr + corner_c + column)[None, :]
        if ROTATION > 1:
            out = rotated(out, ROTATION, dtype)
        if RANK > 0:
            a_rows = a_low_rank_ptr + wide_t * stride_alt + row[:, None] * stride_alt
            w_columns = w_low_rank_ptr + wide_c * stride_wlc + column[None, :] * stride_wlc
            out = plus_pair(out, a_rows, w_columns, stride_alr, stride_wlr, RANK, RANK, dtype)
        if OUTLIERS > 0:
            a_rows = a_outlier_ptr + wide_t * stride_aot + row[:, None] * stride_aot
            w_columns = w_outlier_ptr + wide_c * stride_woc + column[None, :] * stride_woc
            out = plus_pair(out, a_rows, w_columns, stride_aor, stride_wor, OUTLIERS, W_OUTLIERS, dtype)
        if HAS_BIAS:
            out += tl.load(bias_ptr + corner_c + column).to(tl.float32)[None, :]
        tl.store(out_tile, out.to(dtype), mask=is_inside)


class _Pair(NamedTuple):
    """Two factors, (T, a_rank) and (b_rank, C); both ranks are 0 where there are none."""

    a: Tensor
    b: Tensor
    a_rank: int
    b_rank: int


def _pair(a: Tensor | None, b: Tensor | None, absent: Tensor) -> _Pair:
    """Returns two factors; where they are not given, or have no rank, `absent` stands in their place, never read."""
    if a is None or b is None or b.shape[0] == 0:
        return _Pair(absent, absent, 0, 0)
    return _Pair(a, b, a.shape[1], b.shape[0])


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
    a_low_rank: Tensor | None = None,
    w_low_rank: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.int32,
    rotation: int = 1,
) -> Tensor:
    """Returns what `kernels.reference.int8_linear` gives.

    Integers are added up exactly. The rest is float32, but for what tensor cores multiply: of a 16-bit `out_dtype` the
    operands of both pairs, and the result before the rotation, are rounded to it; of float32 they keep 22 bits.

    Backward the weight is transposed into a scratch, which lives while it multiplies. Sizes decide how it is launched,
    values never: a graph with a symbolic T is guarded at `tiles.FEW_TOKENS`.

    Args:
        a_int8: (T, K), or (T, N) with `transpose_w`; int8. w_int8: (N, K) int8. Matrices have any strides,
            vectors are contiguous.
        transpose_w: False: the forward product, C = N result columns; True: the backward one, C = K.
        activation_max: 127 or 63; no matter here.
        a_scale: (T,) float32. w_scale: (C,) float32. bias: (C,) floating point.
        a_outlier: (T, O') floating point. w_outlier: (O, C) floating point, O up to O'. Columns of a_outlier past O are
            zero, as `rows.quantize_activation` gives them. A multiple of 16 is fastest.
        a_low_rank: (T, R) floating point. w_low_rank: (R, C) floating point.
        out_dtype: float32, bfloat16 or float16; or int32 for the bare accumulator, without the rest.
        rotation: B of `numerics.rotate`, at most 64, which the first term goes through.

    Returns:
        (T, C) of `out_dtype`.
    """
    w = transpose(w_int8) if transpose_w else w_int8
    tokens, reduction = a_int8.shape
    columns = w.shape[0]
    out = torch.empty((tokens, columns), dtype=out_dtype, device=a_int8.device)
    if tokens == 0 or columns == 0:
        return out
    tile = tiles.product_tile(tiles.architecture(a_int8.device), tokens, out_dtype)
    size = tile.constants
    # A pointer has to stand for what is not there. Not that of a_int8: Inductor would compute it once for each.
    outliers = _pair(a_outlier, w_outlier, w)
    low_rank = _pair(a_low_rank, w_low_rank, w)
    kernel = wrap_triton(tiles.tiled(int8_linear_kernel, tile))
    kernel[(-(-tokens // size["TOKENS"]) * -(-columns // size["COLUMNS"]),)](
        a_int8, w, out, w if a_scale is None else a_scale, w if w_scale is None else w_scale,
        outliers.a, outliers.b, low_rank.a, low_rank.b, w if bias is None else bias,
        tokens, columns, reduction, *a_int8.stride(), *w.stride(),
        *outliers.a.stride(), *outliers.b.stride(), *low_rank.a.stride(), *low_rank.b.stride(),
        a_scale is not None, w_scale is not None, bias is not None,
        outliers.a_rank, outliers.b_rank, low_rank.a_rank, rotation, reduction % size["REDUCTION"] == 0,
    )  # fmt: skip
    return out
