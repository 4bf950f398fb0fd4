"""The int8 product of CUDA, through Triton's interpreter, against the formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import interpreted
from tests.data import integers, normal

pytest.importorskip("triton", reason="Triton is not installed; builds of torch for a CPU come without")

TRANSPOSES = pytest.mark.parametrize("transpose_w", [False, True], ids=["forward", "backward"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.install(monkeypatch)


def int8_linear(a: Tensor, w: Tensor, transpose_w: bool = False, **operands: Any) -> Tensor:
    from quaff_fx.kernels.cuda.product import int8_linear

    return int8_linear(a, w, transpose_w=transpose_w, activation_max=127, **operands)


def exact(a: Tensor, w: Tensor, transpose_w: bool) -> Tensor:
    return (a.double() @ (w.double() if transpose_w else w.double().t())).to(torch.int32)


def operands(t: int, c: int, o: int, r: int, dtype: torch.dtype, w_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """An epilogue with everything, x_outlier padded to sixteen as the row quantizer pads it."""
    a_outlier = torch.nn.functional.pad(normal(t, o, seed=2, dtype=dtype), (0, -o % 16))
    return {
        "a_scale": normal(t, seed=3).abs() * 1e-3,
        "w_scale": normal(c, seed=4).abs() * 1e-2,
        "a_outlier": a_outlier,
        "w_outlier": normal(o, c, seed=5, dtype=w_dtype or dtype),
        "a_low_rank": normal(t, r, seed=6, dtype=dtype),
        "w_low_rank": normal(c, r, seed=7, dtype=dtype).t(),
        "bias": normal(c, seed=8),
        "out_dtype": dtype,
    }


def assert_is_formula(a: Tensor, w: Tensor, transpose_w: bool, rotation: int = 1, **given: Any) -> None:
    """Compares with float64, within what the operands' rounding to the output's dtype allows."""
    dtype = given["out_dtype"]
    result = int8_linear(a, w, transpose_w, rotation=rotation, **given)
    expected = exact(a, w, transpose_w).double()
    for name, dim in (("a_scale", 1), ("w_scale", 0)):
        if given.get(name) is not None:
            expected = expected * given[name].double().unsqueeze(dim)
    # A rotated sum of B values, each rounded to the dtype, is off by no more than the sum of these roundings.
    rounding = HALF_ULP[dtype] * expected.abs().amax(1, keepdim=True) * math.sqrt(rotation) if rotation > 1 else 0.0
    expected = interpreted.rotated(expected, rotation)
    size = expected.abs()
    for left, right in (("a_outlier", "w_outlier"), ("a_low_rank", "w_low_rank")):
        if given.get(left) is not None:
            rank = given[right].shape[0]
            pair = given[left][:, :rank].double(), given[right].to(dtype).double()
            expected, size = expected + pair[0] @ pair[1], size + pair[0].abs() @ pair[1].abs()
    if given.get("bias") is not None:
        expected, size = expected + given["bias"].double(), size + given["bias"].double().abs()
    assert result.dtype == dtype
    assert result.shape == expected.shape
    bound = rounding + 16 * 2**-24 * size + 1.01 * HALF_ULP[dtype] * expected.abs() + torch.finfo(dtype).tiny
    assert ((result.double() - expected).abs() <= bound).all()


@TRANSPOSES
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 33, 130])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (131, 257), (40, 72), (1, 1), (0, 5), (5, 0)])
def test_integers_are_exact_for_any_size(tokens: int, n: int, k: int, transpose_w: bool) -> None:
    a, w = integers(tokens, n if transpose_w else k, seed=0), integers(n, k, seed=1)
    result = int8_linear(a, w, transpose_w)
    assert result.dtype == torch.int32
    assert torch.equal(result, exact(a, w, transpose_w))


def test_integers_are_exact_at_the_largest_values() -> None:
    a = torch.full((40, 1024), 127, dtype=torch.int8)
    assert (int8_linear(a, -a[:3]) == -127 * 127 * 1024).all()


def test_tiles_cover_more_than_one_group() -> None:
    a, w = integers(1200, 32, seed=0), integers(300, 32, seed=1)
    assert torch.equal(int8_linear(a, w), exact(a, w, False))


@TRANSPOSES
@DTYPES
@pytest.mark.parametrize("tokens", [9, 33])
def test_the_epilogue_is_the_formula(tokens: int, dtype: torch.dtype, transpose_w: bool) -> None:
    n, k = 128, 192
    a, w = integers(tokens, n if transpose_w else k, seed=0), integers(n, k, seed=1)
    given = operands(tokens, k if transpose_w else n, 5, 16, dtype)
    assert_is_formula(a, w, transpose_w, rotation=64, **given)


@DTYPES
@pytest.mark.parametrize("missing", ["a_scale", "w_scale", "outlier", "low_rank", "bias", "all"])
def test_what_is_not_given_is_left_out(missing: str, dtype: torch.dtype) -> None:
    given = operands(35, 61, 3, 4, dtype)
    gone = {"outlier": ["a_outlier", "w_outlier"], "low_rank": ["a_low_rank", "w_low_rank"]}
    names = [name for name in given if name != "out_dtype"] if missing == "all" else gone.get(missing, [missing])
    assert_is_formula(
        integers(35, 50, seed=0, limit=9), integers(61, 50, seed=1, limit=9), False, **given | dict.fromkeys(names)
    )


@pytest.mark.parametrize("rank", [1, 3, 8, 15, 16, 17, 32, 48, 57, 64])
def test_ranks(rank: int) -> None:
    given = operands(34, 131, rank, rank, torch.bfloat16)
    assert_is_formula(integers(34, 64, seed=0), integers(131, 64, seed=1), False, **given)


@pytest.mark.parametrize("outliers", [0, 79, 143])
def test_outliers_beyond_any_rank_and_none_at_all(outliers: int) -> None:
    given = operands(34, 64, outliers, 0, torch.float16)
    assert_is_formula(integers(34, 64, seed=0), integers(64, 64, seed=1), False, **given)


def test_padded_columns_meet_no_value_of_the_weight() -> None:
    """The row of the weight that is read in their place may be anything finite."""
    given = operands(20, 32, 2, 0, torch.bfloat16) | {"bias": None}
    given["w_outlier"][1] = 3e38
    given["a_outlier"][:, 1] = 0
    assert_is_formula(integers(20, 64, seed=0), integers(32, 64, seed=1), False, **given)


@TRANSPOSES
@DTYPES
@pytest.mark.parametrize("rotation", [2, 4, 8, 16, 32, 64])
def test_rotation_of_any_block(rotation: int, dtype: torch.dtype, transpose_w: bool) -> None:
    """C is an odd number of blocks, so the last tile is cut."""
    c = 5 * rotation
    a, w = integers(33, 96, seed=0), integers(*((96, c) if transpose_w else (c, 96)), seed=1)
    assert_is_formula(a, w, transpose_w, rotation, a_scale=normal(33, seed=2).abs() * 1e-3, out_dtype=dtype)


def test_operands_may_have_any_strides_and_other_dtypes() -> None:
    given = operands(40, 48, 4, 8, torch.bfloat16, w_dtype=torch.float16)
    expected = int8_linear(integers(40, 64, seed=0), integers(48, 64, seed=1), **given)
    strided = {
        "a_outlier": given["a_outlier"].float().t().contiguous().t(),
        "w_outlier": given["w_outlier"].repeat_interleave(2, dim=1)[:, ::2],
        "a_low_rank": given["a_low_rank"].t().contiguous().t(),
        "w_low_rank": given["w_low_rank"].contiguous(),
        "bias": given["bias"].double(),
    }
    a, w = integers(40, 64, seed=0).t().contiguous().t(), integers(48, 64, seed=1).repeat_interleave(2, dim=0)[::2]
    assert torch.equal(int8_linear(a, w, **given | strided), expected)


def test_a_nan_scale_stays_in_its_row() -> None:
    a, w, a_scale = integers(35, 64, seed=0), integers(64, 64, seed=1), torch.ones(35)
    a_scale[3] = math.nan
    result = int8_linear(a, w, a_scale=a_scale, rotation=64, out_dtype=torch.bfloat16)
    assert result[3].isnan().all()
    assert result[[row for row in range(35) if row != 3]].isfinite().all()
