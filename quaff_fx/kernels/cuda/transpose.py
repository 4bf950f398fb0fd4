"""The transposed weight, for the backward product: tensor cores want int8 contiguous along the reduction."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (Kernels are written in Triton's language, which has no types for mypy.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from quaff_fx.kernels.cuda import tiles


@triton.jit
def transpose_kernel(w_ptr, out_ptr, N, K, stride_n, stride_k, SIDE: tl.constexpr):
    # The corner of the tile is a 64-bit scalar, offsets inside the tile are 32 bits: fewer registers.
    first_n = tl.program_id(0) * SIDE
    first_k = tl.program_id(1) * SIDE
    n = tl.arange(0, SIDE)
    k = tl.arange(0, SIDE)
    is_n = n < N - first_n
    is_k = k < K - first_k
    w_ptr += first_n.to(tl.int64) * stride_n + first_k.to(tl.int64) * stride_k
    out_ptr += first_k.to(tl.int64) * N + first_n
    w = tl.load(w_ptr + n[:, None] * stride_n + k[None, :] * stride_k, mask=is_n[:, None] & is_k[None, :], other=0)
    tl.store(out_ptr + k[:, None] * N + n[None, :], tl.trans(w), mask=is_k[:, None] & is_n[None, :])


def transpose(w_int8: Tensor) -> Tensor:
    """Returns w (N, K) as a contiguous tensor (K, N), both int8. A scratch: one byte per weight while it multiplies."""
    n, k = w_int8.shape
    out = torch.empty((k, n), dtype=w_int8.dtype, device=w_int8.device)
    if n and k:
        side = tiles.TRANSPOSE.constants["SIDE"]
        grid = (-(-n // side), -(-k // side))
        kernel = wrap_triton(tiles.tiled(transpose_kernel, tiles.TRANSPOSE))
        kernel[grid](w_int8, out, n, k, w_int8.stride(0), w_int8.stride(1))
    return out
