"""Which tile a kernel gets, and which cards have kernels of Triton."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from quaff_fx.kernels.cuda import tiles
from tests import cards


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        (75, "the device is an sm_75, Triton multiplies int8 from sm_80 on"),
        (80, ""),
        (90, ""),
    ],
)
def test_reason_without_triton(architecture: int, reason: str) -> None:
    with cards.card(architecture):
        assert tiles.reason_without_triton(cards.DEVICE) == reason
        assert tiles.architecture(cards.DEVICE) == architecture


def test_without_triton_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    tiles.reason_without_triton.cache_clear()
    try:
        assert tiles.reason_without_triton(cards.DEVICE) == "Triton is not installed"
    finally:
        tiles.reason_without_triton.cache_clear()


@pytest.mark.parametrize("features", [1, 64, 577, 4096, 14336, 28672, 32768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotation", [1, 2, 64])
@pytest.mark.parametrize("architecture", [90, 100])
def test_rows_are_read_in_whole_blocks_that_tensor_cores_can_multiply(
    features: int, dtype: torch.dtype, rotation: int, architecture: int
) -> None:
    width = tiles.row_tile(architecture, features, dtype, rotation).constants["WIDTH"]
    assert width & (width - 1) == 0
    assert width % rotation == 0
    assert width >= 16 * max(rotation, 16)
    assert width <= 16384


def test_few_tokens_get_a_low_tile() -> None:
    for tokens in (1, 16, 17, 32):
        assert tiles.product_tile(90, tokens, torch.bfloat16).constants["TOKENS"] < 64
    assert tiles.product_tile(90, 4096, torch.bfloat16).constants["TOKENS"] >= 128


def test_a_tiled_kernel_is_one_object() -> None:
    """Torch keeps every kernel that was ever traced."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from quaff_fx.kernels.cuda.transpose import transpose_kernel

    made = tiles.tiled(transpose_kernel, tiles.TRANSPOSE)
    assert made is tiles.tiled(transpose_kernel, tiles.TRANSPOSE)
    assert isinstance(made, triton.runtime.Autotuner)
    assert len(made.configs) == 1, "with one configuration nothing is tried out"
