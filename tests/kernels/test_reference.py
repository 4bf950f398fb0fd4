"""The plain product, the CUDA product's padding, and the epilogue both share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quaff_fx.kernels import cuda, reference
from quaff_fx.numerics import INT32_MAX_REDUCTION
from tests.data import integers, normal

TRANSPOSES = pytest.mark.parametrize("transpose_w", [False, True], ids=["forward", "backward"])
deterministic = settings(derandomize=True, deadline=None, max_examples=40, database=None)


def exact(a: Tensor, w: Tensor, transpose_w: bool) -> Tensor:
    return a.long() @ (w.long() if transpose_w else w.long().t())


# --- reference ---------------------------------------------------------------------------------------------------


@deterministic
@given(st.integers(0, 5), st.integers(0, 40), st.integers(0, 40), st.booleans(), st.integers(0, 2**31))
def test_reference_is_exact_for_any_size(tokens: int, n: int, k: int, transpose_w: bool, seed: int) -> None:
    a, w = integers(tokens, n if transpose_w else k, seed=seed), integers(n, k, seed=seed + 1)
    result = reference.int8_matmul(a, w, transpose_w)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), exact(a, w, transpose_w))


def test_reference_is_exact_at_the_longest_reduction() -> None:
    a = torch.full((1, INT32_MAX_REDUCTION), 127, dtype=torch.int8)
    assert reference.int8_matmul(a, -a, False).tolist() == [[-127 * 127 * INT32_MAX_REDUCTION]]


def test_reference_is_exact_under_autocast_and_reduced_precision() -> None:
    a, w = integers(4, 600, seed=0), integers(5, 600, seed=1)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = reference.int8_matmul(a, w, False)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(result.long(), exact(a, w, False))


# --- cuda --------------------------------------------------------------------------------------------------------


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
def test_cuda_product_traces_with_meta_tensors(transpose_w: bool) -> None:
    """Torch's own shape check of `_int_mm` and of the padding."""
    a = torch.empty(3, 9 if transpose_w else 23, dtype=torch.int8, device="meta")
    result = cuda.int8_matmul(a, torch.empty(9, 23, dtype=torch.int8, device="meta"), transpose_w)
    assert result.shape == (3, 23 if transpose_w else 9)
    assert result.dtype == torch.int32


# --- epilogue ----------------------------------------------------------------------------------------------------


def epilogue(accumulator: torch.Tensor, **operands: Any) -> torch.Tensor:
    """What the contract makes of the integers that some device has added up."""
    nothing = torch.empty(0, dtype=torch.int8)
    product = {"transpose_w": False, "activation_max": 127, "int8_matmul": lambda *_: accumulator}
    return reference.int8_linear(nothing, nothing, **product, **operands)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("missing", ["nothing", "a_scale", "w_scale", "outlier", "bias", "all"])
def test_dequantized_is_the_formula_in_float64(missing: str, out_dtype: torch.dtype) -> None:
    accumulator = torch.randint(-30000, 30000, (6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    a_scale, w_scale, bias = normal(6, seed=1).abs() * 1e-3, normal(5, seed=2).abs() * 1e-1, normal(5, seed=3)
    a_outlier, w_outlier = normal(6, 2, seed=4), normal(2, 5, seed=5)
    expected = accumulator.double()
    size = expected.abs()
    if missing not in ("a_scale", "all"):
        expected, size = expected * a_scale.double().unsqueeze(1), size * a_scale.double().unsqueeze(1)
    if missing not in ("w_scale", "all"):
        expected, size = expected * w_scale.double(), size * w_scale.double()
    if missing not in ("outlier", "all"):
        correction = a_outlier.double() @ w_outlier.double()
        expected, size = expected + correction, size + a_outlier.double().abs() @ w_outlier.double().abs()
    if missing not in ("bias", "all"):
        expected, size = expected + bias.double(), size + bias.double().abs()
    result = epilogue(
        accumulator,
        a_scale=None if missing in ("a_scale", "all") else a_scale,
        w_scale=None if missing in ("w_scale", "all") else w_scale,
        a_outlier=None if missing in ("outlier", "all") else a_outlier,
        w_outlier=None if missing in ("outlier", "all") else w_outlier,
        bias=None if missing in ("bias", "all") else bias,
        out_dtype=out_dtype,
    )
    half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[out_dtype]
    assert result.dtype == out_dtype
    finite = expected.abs() < 65504
    error = (result.double() - expected).abs()
    assert (error <= 8 * 2**-24 * size + half_ulp * 1.01 * expected.abs())[finite].all()


def test_dequantized_int32_is_the_accumulator_itself() -> None:
    accumulator = torch.tensor([[2**31 - 1, -(2**31)]], dtype=torch.int32)
    assert epilogue(accumulator) is accumulator


def test_dequantized_keeps_a_nan_scale_in_its_row() -> None:
    a_scale = torch.tensor([math.nan, 1.0])
    result = epilogue(torch.zeros(2, 3, dtype=torch.int32), a_scale=a_scale, out_dtype=torch.float32)
    assert result[0].isnan().all()
    assert torch.equal(result[1], torch.zeros(3))
