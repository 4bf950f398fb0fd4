"""Kernels compiled without a card: what each asks of one stays within what there is, and is what the tiles promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import compile_ahead
from benchmarks.compile_ahead import CARDS, HIDDEN, INNER, TOKENS, Compiled

triton = pytest.importorskip("triton", reason="Triton is not installed")

PAST_TWO_BLOCKS = {("3.7", HIDDEN, 0): 136, ("3.7", INNER, 16): 130}
"""Forward products of sm_90 that take more than 128 registers, by Triton, features and rank. Triton 3.6 gives 128."""

SPILLED = {(80, torch.float32): 16, (120, torch.float32): 64}
"""Bytes, with 144 outlier channels and rank 64 (Triton 3.7.1). A tile of 64 × 64 spills none, and loads more."""

ROWS_SPILLED = {(100, torch.bfloat16, features): spilled for features, spilled in ((14336, 8), (16384, 8), (32768, 40))}


@pytest.fixture(scope="module", autouse=True)
def kernels_compiled_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that an earlier run compiled is taken for what the sources give now, and nothing is left behind."""
    folder = tmp_path_factory.mktemp("kernels")
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        yield


def compiled(architecture: int, call: Callable[[], object]) -> Compiled:
    """The last kernel of a call: what the others prepare is for it."""
    return compile_ahead.compiled(architecture, call)[-1]


class TestBlocks:
    def test_registers_decide(self) -> None:
        kernel = Compiled(
            "kernel", warps=8, stages=3, registers=128, stack=0, shared=98304, tensor_memory=0, is_int8=True
        )
        assert kernel.blocks(CARDS[90]) == 2
        assert Compiled("kernel", 8, 3, 129, 0, 98304, 0, True).blocks(CARDS[90]) == 1

    def test_shared_memory_decides(self) -> None:
        assert Compiled("kernel", 8, 3, 64, 0, 98304, 0, True).blocks(CARDS[86]) == 1
        assert Compiled("kernel", 8, 3, 64, 0, 106496, 0, True).blocks(CARDS[86]) == 0, "it does not run"

    def test_threads_decide(self) -> None:
        assert Compiled("kernel", 8, 1, 16, 0, 0, 0, False).blocks(CARDS[89]) == 6
        assert Compiled("kernel", 8, 1, 16, 0, 0, 0, False).blocks(CARDS[90]) == 8

    def test_tensor_memory_decides(self) -> None:
        assert Compiled("kernel", 8, 1, 16, 0, 0, 256, False).blocks(CARDS[100]) == 2
        assert Compiled("kernel", 8, 1, 16, 0, 0, 608, False).blocks(CARDS[100]) == 0, "it does not run"


def test_a_call_is_compiled_and_not_launched() -> None:
    kernels = compile_ahead.compiled(90, compile_ahead.quantize(torch.bfloat16, 256))
    assert [kernel.name for kernel in kernels] == ["factor_kernel", "quantize_kernel"]
    assert triton.runtime.driver._active is None or not isinstance(triton.runtime.driver._active, compile_ahead._Driver)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_products_multiply_int8_on_tensor_cores_and_fit(architecture: int, dtype: torch.dtype) -> None:
    """On every architecture, with and without an adapter, forward and backward, many tokens and few."""
    calls = [
        compile_ahead.forward(dtype, TOKENS, HIDDEN, 0),
        compile_ahead.forward(dtype, TOKENS, INNER, 64),
        compile_ahead.backward(dtype, TOKENS, 64),
        compile_ahead.forward(dtype, 16, HIDDEN, 16),
    ]
    for kernel in (compiled(architecture, call) for call in calls):
        assert kernel.name == "int8_linear_kernel"
        assert kernel.is_int8
        assert kernel.stack <= SPILLED.get((architecture, dtype), 0), kernel
        assert kernel.blocks(CARDS[architecture]) >= 1, kernel


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [86, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("features", [4096, 14336, 16384, 32768])
def test_the_quantizer_keeps_a_row_in_registers(architecture: int, dtype: torch.dtype, features: int) -> None:
    kernel = compiled(architecture, compile_ahead.quantize(dtype, features))
    assert kernel.name == "quantize_kernel"
    assert kernel.stack <= ROWS_SPILLED.get((architecture, dtype, features), 0), kernel
    assert kernel.blocks(CARDS[architecture]) >= 1, kernel


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 16, 64])
def test_two_blocks_of_a_backward_product_share_a_multiprocessor(rank: int) -> None:
    """On an H200 that is worth a fifth: one computes while the other writes (`tiles.product_tile`)."""
    kernel = compiled(90, compile_ahead.backward(torch.bfloat16, TOKENS, rank))
    assert kernel.blocks(CARDS[90]) == 2, kernel


@pytest.mark.slow
@pytest.mark.parametrize(("features", "rank"), [(HIDDEN, 0), (HIDDEN, 16), (INNER, 16)])
def test_two_blocks_of_a_forward_product_share_a_multiprocessor(features: int, rank: int) -> None:
    kernel = compiled(90, compile_ahead.forward(torch.bfloat16, TOKENS, features, rank))
    version = ".".join(triton.__version__.split(".")[:2])
    assert kernel.registers <= PAST_TWO_BLOCKS.get((version, features, rank), 128), kernel
