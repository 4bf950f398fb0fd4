"""The row quantizer of CUDA, through Triton's interpreter, against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quaff_fx import numerics
from tests import interpreted
from tests.data import dequantized_rows, planted_outliers

pytest.importorskip("triton", reason="Triton is not installed; builds of torch for a CPU come without")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
SPLIT = [math.inf, math.inf, math.inf]
SMOOTH = [1.0, 2.5, 7.0]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.install(monkeypatch)


def quantize(x: Tensor, channels: Tensor, s: Tensor, q: int = 127, rotation: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    from quaff_fx.kernels.cuda.rows import quantize_activation

    return quantize_activation(x, channels, s, q, rotation)


def smoothed(x: Tensor, channels: Tensor, s: Tensor, rotation: int) -> Tensor:
    """What is rounded to integers, in float64."""
    factor = torch.ones(x.shape[1]).index_copy(0, channels, 1.0 / s)
    x_hat = x.float() * factor
    if rotation > 1:
        x_hat = x_hat.to(x.dtype)  # what tensor cores take
    return interpreted.rotated(x_hat.double(), rotation)


def assert_quantizes(x: Tensor, channels: list[int], s: list[float], q: int, rotation: int) -> None:
    o, scale = torch.tensor(channels, dtype=torch.int64), torch.tensor(s)
    x_int8, x_scale, x_outlier = quantize(x, o, scale, q, rotation)
    expected = smoothed(x, o, scale, rotation)
    absmax = expected.abs().amax(1) if x.shape[1] else expected.new_zeros(x.shape[0])
    assert (x_int8.dtype, x_scale.dtype, x_int8.shape) == (torch.int8, torch.float32, x.shape)
    assert (x_int8.long().abs() <= q).all()
    torch.testing.assert_close(x_scale.double(), absmax / q, rtol=1e-6, atol=0)
    # Half a step, and what float32 sums of 64 and the scale itself leave.
    slack = 0.5 + 1e-6 * q
    assert ((dequantized_rows(x_int8, x_scale) - expected).abs() <= slack * x_scale.double().unsqueeze(1)).all()
    columns = -(-len(channels) // 16) * 16
    assert x_outlier.shape == (x.shape[0], columns)
    assert x_outlier.dtype == x.dtype
    correction = x.double()[:, o] * (1 - 1 / scale.double())
    torch.testing.assert_close(x_outlier[:, : len(channels)], correction.to(x.dtype), rtol=1e-6, atol=0)
    assert (x_outlier[:, len(channels) :] == 0).all()


@DTYPES
@pytest.mark.parametrize("rotation", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("s", [SPLIT, SMOOTH], ids=["split", "smooth"])
def test_rows_are_rounded_to_the_nearest_step(dtype: torch.dtype, rotation: int, s: list[float]) -> None:
    x = planted_outliers(6, 320, [3, 64, 319], 30.0, seed=0, dtype=dtype)
    assert_quantizes(x, [64, 3, 319], s, 127, rotation)


@pytest.mark.parametrize(("tokens", "features"), [(0, 64), (1, 1), (1, 127), (9, 31), (5, 1027), (2, 0)])
@pytest.mark.parametrize("q", [127, 63])
def test_rows_of_any_size(tokens: int, features: int, q: int) -> None:
    x = planted_outliers(tokens, features, [], 1.0, seed=1, dtype=torch.bfloat16)
    assert_quantizes(x, [], [], q, 1)


@pytest.mark.parametrize("outliers", [1, 15, 16, 17, 70])
def test_the_correction_is_padded_to_sixteen(outliers: int) -> None:
    channels = list(range(128))[::-1][:outliers]
    assert_quantizes(planted_outliers(3, 128, channels, 20.0, seed=2), channels, [math.inf] * outliers, 127, 16)


@pytest.mark.parametrize(
    ("features", "dtype"), [(32768, torch.bfloat16), (28672, torch.float16), (9000, torch.float32)]
)
def test_a_row_that_does_not_fit_is_read_in_chunks(features: int, dtype: torch.dtype) -> None:
    x = planted_outliers(2, features, [5, features - 1], 50.0, seed=3, dtype=dtype)
    assert_quantizes(x, [features - 1], [math.inf], 127, 8)


@DTYPES
def test_without_rotation_all_bits_are_the_contracts(dtype: torch.dtype) -> None:
    x = planted_outliers(40, 200, [7, 50], 30.0, seed=4, dtype=dtype)
    o, s = torch.tensor([50, 7]), torch.tensor([2.5, math.inf])
    expected = numerics.quantize_activation(x, o, s, 127, 1)
    for result, contract in zip(quantize(x, o, s)[:2], expected[:2], strict=True):
        assert torch.equal(result, contract)


def test_halves_go_to_the_even_integer() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    x_int8, x_scale, _ = quantize(x, torch.tensor([], dtype=torch.int64), torch.tensor([]))
    assert x_scale.tolist() == [1.0]
    assert x_int8.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("rotation", [1, 2, 64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_comes_out_as_nan_and_touches_no_other(bad: float, rotation: int) -> None:
    x = planted_outliers(7, 64, [], 1.0, seed=5, dtype=torch.bfloat16)
    x[2, 33] = bad
    nothing = torch.tensor([], dtype=torch.int64), torch.tensor([])
    x_int8, x_scale, _ = quantize(x, *nothing, rotation=rotation)
    assert x_scale[2].isnan()
    assert (x_int8[2] == 0).all()
    others = [row for row in range(7) if row != 2]
    expected = quantize(x[others], *nothing, rotation=rotation)
    assert torch.equal(x_int8[others], expected[0])
    assert torch.equal(x_scale[others], expected[1])


@pytest.mark.parametrize("size", [0.0, 1e-39, 127 * 1.1e-38])
def test_a_subnormal_scale_is_zero(size: float) -> None:
    x = torch.full((2, 33), size)
    x_int8, x_scale, _ = quantize(x, torch.tensor([], dtype=torch.int64), torch.tensor([]))
    assert (x_int8 == 0).all()
    assert x_scale.tolist() == [0.0, 0.0]


def test_rows_may_have_any_strides() -> None:
    whole = planted_outliers(130, 12, [], 1.0, seed=6, dtype=torch.bfloat16)
    o, s = torch.tensor([100, 3]), torch.tensor([math.inf, 2.0])
    for x in (whole.t(), whole[:128].reshape(12, 128)[::3], whole[:128].reshape(6, 256)[:, 1::2]):
        for result, expected in zip(
            quantize(x, o, s, rotation=2), quantize(x.contiguous(), o, s, rotation=2), strict=True
        ):
            assert torch.equal(result, expected)
