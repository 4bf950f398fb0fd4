"""The compiled int8 product for CPUs. Read `build`, then `product`, then int8_gemm.cpp and the headers it names."""

from quaff_fx.kernels.cpu.build import (
    DEFAULT_VARIANT,
    VARIANTS,
    Obstacle,
    check_variant,
    instruction_set,
    obstacle,
    obstacle_of,
    obstacle_to_kernel,
    reason_unavailable,
    remove_cut_off,
)
from quaff_fx.kernels.cpu.product import int8_linear, quantize_activation

__all__ = [
    "DEFAULT_VARIANT",
    "VARIANTS",
    "Obstacle",
    "check_variant",
    "instruction_set",
    "int8_linear",
    "obstacle",
    "obstacle_of",
    "obstacle_to_kernel",
    "quantize_activation",
    "reason_unavailable",
    "remove_cut_off",
]
