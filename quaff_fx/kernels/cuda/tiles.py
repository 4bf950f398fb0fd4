"""The tiles of each kernel: what one block of threads computes at a time, by shape and architecture.

A figure is *measured* (on a card, with the card named), *compiled* (registers, spills and shared memory that
`benchmarks/compile_ahead.py` prints, without a card) or a *guess*. Triton need not be there to import this file.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

FIRST_ARCHITECTURE = 80
"""Triton's int8 product does not lower for Turing, sm_75 (seen in 3.6)."""


@dataclass(frozen=True)
class Tile:
    """How a kernel is compiled.

    Attributes:
        constants: its sizes, by the names of the kernel's last arguments.
        warps: of 32 threads, in a block. stages: of the software pipeline that loads ahead.
    """

    constants: Mapping[str, int]
    warps: int
    stages: int

    def __hash__(self) -> int:
        return hash((tuple(self.constants.items()), self.warps, self.stages))


def _tile(warps: int, stages: int = 1, **constants: int) -> Tile:
    return Tile(MappingProxyType(constants), warps, stages)


@functools.cache
def tiled(kernel: Any, tile: Tile) -> Any:
    """Returns a Triton kernel with its tile.

    As the one configuration of an autotuner, which tries nothing then: `wrap_triton` makes such an autotuner anew in
    each call of a kernel whose warps are arguments, and torch keeps every one. Inductor takes sizes, warps and stages
    from a configuration and nothing else: `maxnreg` would be dropped without a word (read in torch 2.11 and 2.13).
    """
    import triton

    config = triton.Config(dict(tile.constants), num_warps=tile.warps, num_stages=tile.stages)
    return triton.autotune(configs=[config], key=[])(kernel)


@functools.cache
def architecture(device: torch.device) -> int:
    """Returns the compute capability of a CUDA device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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


TRANSPOSE = _tile(warps=8, SIDE=128)
"""Measured on an H200: 3.4 TB/s; the product that follows takes 11 to 30 times as long."""

FACTOR = _tile(warps=4, WIDTH=1024)
"""A guess; it writes as much as two rows have."""

ROWS_PER_PROGRAM = 4
"""A guess: the rotation, built once a program, costs some 15 % of a row of 4096."""


_HAS_TENSOR_MEMORY = (100, 103)
"""Architectures where every float product in a kernel takes some of 512 columns of tensor memory."""


def row_tile(arch: int, features: int, dtype: torch.dtype, rotation: int) -> Tile:
    """The tile of the row quantizer; a row of more features than its width is read in chunks, twice.

    Measured on an H200 with a row a program: 4 warps, 1.6 TB/s at 4096 features and 1.4 TB/s at 14336. Compiled: 4
    warps spill at 16384, so wide rows have 8 (a guess); float32 spills there as well. On sm_100 two chunks of 8192 in
    float32 would take 608 columns of tensor memory.
    """
    narrowest = 16 * max(rotation, 16)  # tensor cores multiply at least 16 blocks
    whole = max(narrowest, 1 << max(features - 1, 0).bit_length())
    widest = 16384 if dtype.itemsize == 2 else 4096 if arch in _HAS_TENSOR_MEMORY else 8192
    width = whole if whole <= widest else min(widest, 8192)
    return _tile(warps=2 if width <= 1024 else 4 if width <= 4096 else 8, WIDTH=width)


FEW_TOKENS = 32
"""Up to here a product is bound by reading its weight (decoding)."""


def product_tile(arch: int, tokens: int, dtype: torch.dtype) -> Tile:
    """The tile of the product, for a result of a dtype.

    Measured on an H200: 128 × 128 × 128 with 8 warps and 3 stages is the fastest of those tried, with at most 128
    registers, where two blocks fit on a multiprocessor. Compiled: a float32 epilogue of 128 columns spills hundreds of
    bytes, and its rotation takes 104 KiB of shared memory, more than a block of sm_86, 89 and 120 may have. 64 columns
    take 56 KiB, and spill at most 64 bytes, with 144 outlier channels and rank 64 on sm_80 and sm_120. On sm_100 a
    float32 epilogue takes tensor memory for every 16 channels, and with 144 more than there is. The tile of few tokens
    takes none.
    """
    is_16_bit = dtype.itemsize == 2
    if tokens <= FEW_TOKENS or (arch in _HAS_TENSOR_MEMORY and not is_16_bit):
        return _tile(4, 4, TOKENS=16 if tokens <= 16 else 32, COLUMNS=64, REDUCTION=128, GROUP=1)
    return _tile(8, 3, TOKENS=128, COLUMNS=128 if is_16_bit else 64, REDUCTION=128, GROUP=8)
