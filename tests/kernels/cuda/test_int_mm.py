"""The product of `torch._int_mm`: its padding, and the layout of its operands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quaff_fx.kernels import cuda
from tests.data import integers

TRANSPOSES = pytest.mark.parametrize("transpose_w", [False, True], ids=["forward", "backward"])


def exact(a: Tensor, w: Tensor, transpose_w: bool) -> Tensor:
    return a.long() @ (w.long() if transpose_w else w.long().t())


@pytest.fixture
def int_mm_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """`torch._int_mm` on CPU with the size rules of CUDA (`aten/src/ATen/native/cuda/Blas.cpp`); records its sizes."""
    shapes: list[tuple[int, int, int]] = []

    def int_mm(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.int8
        assert a.shape[1] == b.shape[0]
        assert a.shape[0] > 16, "self.size(0) needs to be greater than 16"
        assert a.shape[1] % 8 == 0, "self.size(1) needs to be a multiple of 8"
        assert b.shape[1] % 8 == 0, "mat2.size(1) needs to be a multiple of 8"
        assert a.shape[1] > 0
        assert b.shape[1] > 0
        shapes.append((*a.shape, b.shape[1]))
        return (a.long() @ b.long()).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    yield shapes
    assert shapes, "torch._int_mm was never called"


@TRANSPOSES
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 33])
@pytest.mark.parametrize(("n", "k"), [(8, 16), (7, 16), (8, 15), (9, 23), (1, 1)])
def test_cuda_product_pads_to_what_int_mm_takes(
    tokens: int, n: int, k: int, transpose_w: bool, int_mm_shapes: list[tuple[int, int, int]]
) -> None:
    a, w = integers(tokens, n if transpose_w else k, seed=0), integers(n, k, seed=1)
    result = cuda.int8_matmul(a, w, transpose_w)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), exact(a, w, transpose_w))


def test_cuda_product_pads_nothing_that_fits(int_mm_shapes: list[tuple[int, int, int]]) -> None:
    cuda.int8_matmul(integers(17, 64, seed=0), integers(24, 64, seed=1), False)
    cuda.int8_matmul(integers(3, 60, seed=0), integers(24, 60, seed=1), False)
    assert int_mm_shapes == [(17, 64, 24), (17, 64, 24)]


def test_cuda_product_does_not_copy_a_weight_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column-major right operand is much faster: the forward weight must arrive as a view of the stored one."""
    w = integers(24, 64, seed=1)
    seen: list[Tensor] = []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append(b) or (a.long() @ b.long()).to(torch.int32))
    cuda.int8_matmul(integers(3, 64, seed=0), w, False)
    assert seen[0].data_ptr() == w.data_ptr()
    assert seen[0].stride() == (1, 64)


@TRANSPOSES
@pytest.mark.parametrize(("n", "k"), [(24, 64), (23, 61)])
def test_cuda_product_has_a_column_major_right_operand(
    n: int, k: int, transpose_w: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row-major one gave CUBLAS_STATUS_NOT_SUPPORTED for small shapes, and 6.5 times less speed for large ones."""
    seen: list[Tensor] = []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append(b) or (a.long() @ b.long()).to(torch.int32))
    a, w = integers(3, n if transpose_w else k, seed=0), integers(n, k, seed=1)
    assert torch.equal(cuda.int8_matmul(a, w, transpose_w).long(), exact(a, w, transpose_w))
    assert seen[0].stride() == (1, seen[0].shape[0])


@TRANSPOSES
def test_cuda_product_traces_with_meta_tensors(transpose_w: bool) -> None:
    """Torch's own shape check of `_int_mm` and of the padding."""
    a = torch.empty(3, 9 if transpose_w else 23, dtype=torch.int8, device="meta")
    result = cuda.int8_matmul(a, torch.empty(9, 23, dtype=torch.int8, device="meta"), transpose_w)
    assert result.shape == (3, 23 if transpose_w else 9)
    assert result.dtype == torch.int32
