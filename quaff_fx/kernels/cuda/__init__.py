"""Int8 on CUDA: `rows` and `product` in Triton, `int_mm` where Triton has no int8 product.

Only `rows`, `product`, `transpose` and `hadamard` import Triton, which builds of torch for a CPU come without: whoever
has a CUDA weight asks `reason_without_triton` and imports them then.
"""

from quaff_fx.kernels.cuda.int_mm import int8_matmul
from quaff_fx.kernels.cuda.tiles import architecture, reason_without_triton

__all__ = ["architecture", "int8_matmul", "reason_without_triton"]
