"""The transposed weight, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests import interpreted
from tests.data import integers

pytest.importorskip("triton", reason="Triton is not installed; builds of torch for a CPU come without")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.install(monkeypatch)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 256), (131, 257), (7, 300), (0, 5), (5, 0)])
def test_transpose_is_torchs(n: int, k: int) -> None:
    from quaff_fx.kernels.cuda.transpose import transpose

    w = integers(n, k, seed=0)
    result = transpose(w)
    assert torch.equal(result, w.t())
    assert result.is_contiguous()


def test_transpose_takes_any_strides() -> None:
    from quaff_fx.kernels.cuda.transpose import transpose

    w = integers(300, 131, seed=0).t()[:, ::2]
    assert torch.equal(transpose(w), w.t())
