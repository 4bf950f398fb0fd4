"""What every Triton kernel asks of a card, compiled ahead without one: registers, spills, shared memory, instructions.

    python -m benchmarks.compile_ahead
    python -m benchmarks.compile_ahead --architectures 86 90 --dtypes float32

The product's own functions choose tiles and constants, for the shapes of a layer of Llama-8B; Triton specializes them
for what it would see at the launch, and compiles instead of launching.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor

HIDDEN, INNER = 4096, 14336
"""Of Llama-8B. Widths of other layers compile to the same kernels, but for the outlier channels that they have."""
TOKENS = 4096
ROWS = (4096, 14336, 16384, 32768)
"""Features of activations that are quantized."""
RANKS = (0, 16, 64)
"""Of adapters; 0 is none."""
ROTATION = 64

_INT8 = r"(?:wgmma\.mma_async|mma\.sync)[^\n]*\.s8|tcgen05\.mma[^\n]*i8"
_RESERVED = 1024
"""Bytes of shared memory that each block takes beside its own."""
_TENSOR_MEMORY = 512
"""Columns of a multiprocessor of sm_100."""


@dataclass(frozen=True)
class Card:
    """What a multiprocessor of an architecture has, after the table of compute capabilities in the CUDA guide.

    Attributes:
        shared: bytes of shared memory. shared_per_block: of these, what one block may have.
        threads: that may be resident. Registers are 65536 everywhere.
    """

    shared: int
    shared_per_block: int
    threads: int


CARDS = {
    61: Card(98304, 49152, 2048),
    70: Card(98304, 98304, 2048),
    75: Card(65536, 65536, 1024),
    80: Card(167936, 166912, 2048),
    86: Card(102400, 101376, 1536),
    89: Card(102400, 101376, 1536),
    90: Card(233472, 232448, 2048),
    100: Card(233472, 232448, 2048),
    120: Card(102400, 101376, 1536),
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs.

    Attributes:
        name: of its function. warps: of a block. stages: of its pipeline. registers: of a thread.
        stack: bytes of a thread that lie in memory instead of registers: what it spills.
        shared: bytes of a block. tensor_memory: columns of a block, on sm_100 alone; a kernel that takes more than
            there are is empty, and its launch fails. is_int8: the tensor cores multiply int8 in it.
    """

    name: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    is_int8: bool

    def blocks(self, card: Card) -> int:
        """Returns how many of its blocks fit on one multiprocessor; 0 if it does not run at all."""
        if self.shared > card.shared_per_block or self.tensor_memory > _TENSOR_MEMORY:
            return 0
        threads = 32 * self.warps
        # A warp's registers come in units of 256.
        registers = -(-self.registers // 8) * 8 * threads
        fit = min(65536 // registers, card.shared // (self.shared + _RESERVED), card.threads // threads)
        return min(fit, _TENSOR_MEMORY // self.tensor_memory) if self.tensor_memory else fit


class _Driver:
    """What Triton asks the driver of a card. Each architecture is a device of its own: kernels are kept by device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, _: int) -> int:
        return 0


def compiled(architecture: int, call: Callable[[], object]) -> list[Compiled]:
    """Returns the kernels that a call would launch on a card of an architecture, in order. Nothing is launched."""
    import triton
    from triton.runtime.jit import JITFunction, MockTensor

    from quaff_fx.kernels.cuda import tiles

    found: list[Compiled] = []
    launch = JITFunction.run

    def compile_only(function: Any, *args: Any, **kwargs: Any) -> None:
        typed = [MockTensor(each.dtype) if isinstance(each, Tensor) else each for each in args]
        found.append(_usage(function.fn.__name__, launch(function, *typed, **{**kwargs, "warmup": True})))

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(architecture))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(tiles, "architecture", return_value=architecture),
        ):
            call()
    finally:
        triton.runtime.driver._active = before
    return found


def _usage(name: str, kernel: Any) -> Compiled:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Of the kernel and, on sm_100, of a trap handler.
    registers, stack = (max(map(int, re.findall(rf"{key}:(\d+)", printed))) for key in ("REG", "STACK"))
    about = kernel.metadata
    is_int8 = re.search(_INT8, kernel.asm["ptx"]) is not None
    tensor_memory = getattr(about, "tmem_size", None) or 0
    return Compiled(name, about.num_warps, about.num_stages, registers, stack, about.shared, tensor_memory, is_int8)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that nothing writes to: it takes no memory."""
    return torch.empty(*shape, dtype=dtype)


def forward(dtype: torch.dtype, tokens: int, k: int, rank: int) -> Callable[[], Tensor]:
    """Returns the forward product of a linear with K features, as a lowered graph has it."""
    from quaff_fx.kernels.cuda import product, rows

    n, outliers = HIDDEN, -(-k // 100)
    outlier_dtype, padded = rows.outlier_operand(dtype, outliers)
    low_rank = {
        # q, k and v share one product of their first factors.
        "a_low_rank": _empty(tokens, 3 * rank, dtype=dtype)[:, :rank],
        "w_low_rank": _empty(n, rank, dtype=dtype).t(),
    }
    return partial(
        product.int8_linear,
        _empty(tokens, k, dtype=torch.int8),
        _empty(n, k, dtype=torch.int8),
        transpose_w=False,
        activation_max=127,
        a_scale=_empty(tokens, dtype=torch.float32),
        w_scale=_empty(n, dtype=torch.float32),
        a_outlier=_empty(tokens, padded, dtype=outlier_dtype),
        # Outlier columns of a float32 weight are kept in float16.
        w_outlier=_empty(outliers, n, dtype=dtype if dtype.itemsize == 2 else torch.float16),
        out_dtype=dtype,
        **(low_rank if rank else {}),
    )


def backward(dtype: torch.dtype, tokens: int, rank: int) -> Callable[[], Tensor]:
    """Returns the backward product: the gradient of a rotated activation, after the transpose of its weight."""
    from quaff_fx.kernels.cuda import product

    low_rank = {"a_low_rank": _empty(tokens, rank, dtype=dtype), "w_low_rank": _empty(rank, HIDDEN, dtype=dtype)}
    return partial(
        product.int8_linear,
        _empty(tokens, HIDDEN, dtype=torch.int8),
        _empty(HIDDEN, HIDDEN, dtype=torch.int8),
        transpose_w=True,
        activation_max=127,
        a_scale=_empty(tokens, dtype=torch.float32),
        out_dtype=dtype,
        rotation=ROTATION,
        **(low_rank if rank else {}),
    )


def quantize(dtype: torch.dtype, k: int) -> Callable[[], object]:
    """Returns the row quantizer of an activation with K features."""
    from quaff_fx.kernels.cuda import rows

    outliers = -(-k // 100)
    return partial(
        rows.quantize_activation,
        _empty(TOKENS, k, dtype=dtype),
        _empty(outliers, dtype=torch.int64),
        _empty(outliers, dtype=torch.float32),
        127,
        ROTATION,
    )


def cases(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yields what is launched for activations of a dtype: in words, the name of its kernel, and the call."""
    for rank in RANKS:
        for k in (HIDDEN, INNER):
            yield f"forward, K = {k}, rank {rank}", "int8_linear_kernel", forward(dtype, TOKENS, k, rank)
        yield f"backward, rank {rank}", "int8_linear_kernel", backward(dtype, TOKENS, rank)
    for tokens in (16, 32):
        yield f"forward, {tokens} tokens", "int8_linear_kernel", forward(dtype, tokens, HIDDEN, 16)
        yield f"backward, {tokens} tokens", "int8_linear_kernel", backward(dtype, tokens, 16)
    for k in ROWS:
        yield f"quantize, K = {k}", "quantize_kernel", quantize(dtype, k)
    yield "transpose", "transpose_kernel", backward(dtype, TOKENS, 0)
    yield "factors of outliers", "factor_kernel", quantize(dtype, HIDDEN)


def table(architecture: int, dtype: torch.dtype) -> str:
    """Returns what the kernels of an architecture need, as Markdown."""
    lines = []
    for words, name, call in cases(dtype):
        kernel = next(each for each in compiled(architecture, call) if each.name == name)
        lines.append(
            {
                f"sm_{architecture}, {str(dtype).removeprefix('torch.')}": words,
                "warps": kernel.warps,
                "stages": kernel.stages,
                "registers": kernel.registers,
                "spilled bytes": kernel.stack,
                "shared KiB": kernel.shared / 1024,
                "tensor memory": kernel.tensor_memory or "",
                "int8": "yes" if kernel.is_int8 else "",
                "blocks": kernel.blocks(CARDS[architecture]),
            }
        )
    return tabulate(lines, headers="keys", tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [architecture for architecture in CARDS if architecture >= 80]
    parser.add_argument("--architectures", type=int, nargs="+", default=known, choices=known)
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float32"), choices=dtypes)
    options = parser.parse_args()
    import triton

    print(f"torch {torch.__version__}, Triton {triton.__version__}")
    for architecture in options.architectures:
        for dtype in options.dtypes:
            print(f"\n{table(architecture, getattr(torch, dtype))}", flush=True)


if __name__ == "__main__":
    main()
