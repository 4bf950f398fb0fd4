"""The rotation inside a kernel: blocks of neighbouring features times the Hadamard matrix, on the tensor cores."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (Kernels are written in Triton's language, which has no types for mypy.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated(values, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Returns `values` (R, W) times ``I ⊗ H``, in blocks of B neighbouring columns, (R, W) float32.

    H is the orthogonal Sylvester-Hadamard matrix, (-1)^(ones in i & j) / sqrt(B). Its signs multiply exactly in 16
    bits, and the root afterwards in float32. A float32 value is the sum of three bfloat16 ones, all its 24 bits.

    The matrix is built here, not loaded: a tensor that the launching function kept would become a constant of every
    graph that is traced through it. Tensor cores multiply at least 16 wide: smaller blocks lie on the diagonal of 16.

    Args:
        values: R W / 16 is at least 16. BLOCK: B, a power of two, 2 to 64, that divides W. dtype: of the operands.
    """
    SIZE: tl.constexpr = 16 if BLOCK < 16 else BLOCK
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    ones = row & column & (BLOCK - 1)
    ones ^= ones >> 4
    ones ^= ones >> 2
    ones ^= ones >> 1
    signs = tl.where((row // BLOCK) == (column // BLOCK), tl.where((ones & 1) == 0, 1.0, -1.0), 0.0)
    blocks = tl.reshape(values, (values.shape[0] * values.shape[1] // SIZE, SIZE))
    if dtype == tl.float32:
        matrix = signs.to(tl.bfloat16)
        high = blocks.to(tl.bfloat16)
        rest = blocks - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(high, matrix, tl.dot(middle, matrix, tl.dot(low, matrix)))
    else:
        product = tl.dot(blocks.to(dtype), signs.to(dtype))
    return tl.reshape(product * (BLOCK**-0.5), (values.shape[0], values.shape[1]))
