"""The rotation inside a kernel, interpreted, beside the matrix it is defined by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quaff_fx import numerics
from tests import interpreted

triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.install(monkeypatch)


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 22), (torch.float16, 11), (torch.bfloat16, 8)])
def test_rotated_is_the_contract(block: int, dtype: torch.dtype, bits: int) -> None:
    from tests.kernels.cuda.kernels import rotate_kernel

    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(block)).to(dtype)
    out = torch.empty(4, 256)
    kernel: Any = rotate_kernel
    kernel[(1,)](x, out, block, 4, 256)
    expected = numerics.rotate(x.float(), block)
    torch.testing.assert_close(out, expected, rtol=0, atol=4 * 2.0**-bits * expected.abs().max().item())
