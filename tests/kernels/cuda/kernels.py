"""Kernels that only tests launch. (Triton reads their source, so they are functions of a file.)"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quaff_fx.kernels.cuda.hadamard import rotated


@triton.jit
def rotate_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: N803
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, rotated(x, BLOCK, x_ptr.dtype.element_ty))
