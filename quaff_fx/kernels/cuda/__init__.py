"""Int8 on CUDA: `rows` and `product` in Triton, `int_mm` where Triton has no int8 product.

Only `rows`, `product`, `transpose` and `hadamard` import Triton, which builds of torch for a CPU come without: whoever
has a CUDA weight asks `reason_without_triton` and imports them then.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from quaff_fx.kernels.cuda.int_mm import int8_matmul
from quaff_fx.kernels.cuda.tiles import FIRST_ARCHITECTURE, architecture

__all__ = ["architecture", "int8_matmul", "reason_without_triton"]


@functools.cache
def reason_without_triton(device: torch.device) -> str:
    """Why a CUDA device has to do with `int_mm`; empty where `rows` and `product` run."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    if (found := architecture(device)) < FIRST_ARCHITECTURE:
        return f"the device is an sm_{found}, Triton multiplies int8 from sm_{FIRST_ARCHITECTURE} on"
    return ""
