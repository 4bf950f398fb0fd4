"""The plain product, and the epilogue that devices share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quaff_fx.kernels import reference
from quaff_fx.numerics import INT32_MAX_REDUCTION
from tests.data import integers, normal

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
