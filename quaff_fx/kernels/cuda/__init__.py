"""The int8 product on CUDA."""

from quaff_fx.kernels.cuda.product import int8_matmul

__all__ = ["int8_matmul"]
