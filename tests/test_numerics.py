"""The formulas against float64, and what must hold for any input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quaff_fx import numerics
from quaff_fx.errors import ShapeError
from tests.data import dequantized_rows, normal, planted_outliers, quaff_error_bound, quaff_output, sqnr_db

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32_SLACK = 127 * 2.0**-21
"""Scale and its inverse are rounded to float32, a few ulps of at most 127 integer steps; in steps."""

deterministic = settings(derandomize=True, deadline=None, max_examples=60, database=None)


@st.composite
def matrices(draw: st.DrawFn, rows: st.SearchStrategy[int] | None = None, exponents: int = 10) -> Tensor:
    """Normal matrices (0 to 6, 1 to 33) of any magnitude and dtype, some rows zero, some channels larger."""
    shape = draw(rows if rows is not None else st.integers(0, 6)), draw(st.integers(1, 33))
    exponent, dtype = draw(st.integers(-exponents, 5)), draw(st.sampled_from(DTYPES))
    x = normal(*shape, seed=draw(st.integers(0, 2**31)), std=2.0**exponent)
    if draw(st.booleans()):
        x[:, draw(st.integers(0, shape[1] - 1))] *= 50
    x[draw(st.lists(st.integers(0, shape[0] - 1), max_size=2)) if shape[0] else []] = 0
    return x.to(dtype)


def assert_round_trip(original: Tensor, q: Tensor, scale: Tensor, limit: int) -> None:
    """Integers in ±limit, the largest of each row at the limit, and no value more than half a step away."""
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    absmax = original.double().abs().amax(dim=1)
    torch.testing.assert_close(scale.double(), absmax / limit, rtol=2e-7, atol=0)
    assert torch.equal(q.abs().amax(dim=1), torch.where(absmax > 0, limit, 0).to(torch.int8))
    error = (dequantized_rows(q, scale) - original.double()).abs()
    assert (error <= scale.double().unsqueeze(1) * (0.5 + FLOAT32_SLACK)).all()


# --- weights -----------------------------------------------------------------------------------------------------


@deterministic
@given(weight=matrices(rows=st.integers(1, 6)))
def test_weight_round_trip_is_within_half_a_scale(weight: Tensor) -> None:
    assert_round_trip(weight, *numerics.quantize_weight(weight), 127)


def test_weight_scale_is_per_out_feature() -> None:
    weight = torch.tensor([[1.0, -127.0], [2.0, 254.0], [0.0, 0.0]])
    w_int8, w_scale = numerics.quantize_weight(weight)
    assert w_int8.tolist() == [[1, -127], [1, 127], [0, 0]]
    assert w_scale.tolist() == [1.0, 2.0, 0.0]


def test_weight_takes_no_gradient_and_empty_sides() -> None:
    w_int8, w_scale = numerics.quantize_weight(torch.randn(3, 4, requires_grad=True))
    assert not w_int8.requires_grad
    assert not w_scale.requires_grad
    for shape in ((0, 4), (3, 0)):
        w_int8, w_scale = numerics.quantize_weight(torch.empty(shape))
        assert w_int8.shape == shape
        assert w_scale.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int8)])
def test_weight_that_is_no_floating_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"^weight: is torch\.\w+ of shape \(.*\), expected a floating matrix"):
        numerics.quantize_weight(weight)


def test_weight_too_long_for_int32_sums_is_refused_at_the_exact_limit() -> None:
    limit = numerics.INT32_MAX_REDUCTION
    assert limit * 127 * 127 <= 2**31 - 1 < (limit + 1) * 127 * 127
    numerics.quantize_weight(torch.ones(1, limit))
    with pytest.raises(ShapeError, match=f"expected at most {limit} in-features"):
        numerics.quantize_weight(torch.ones(1, 1).expand(1, limit + 1))
    w_int8, _ = numerics.quantize_weight(torch.ones(1, 1).expand(limit + 1, 1))  # backward multiplies in parts
    assert w_int8.shape == (limit + 1, 1)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_outlier_columns_are_kept_in_16_bits(dtype: torch.dtype, kept: torch.dtype) -> None:
    weight = normal(5, 7, seed=0).to(dtype)
    columns = numerics.outlier_rows(weight[:, [6, 0]])
    assert columns.dtype == kept
    assert columns.is_contiguous()
    torch.testing.assert_close(columns.double(), weight[:, [6, 0]].t().double(), rtol=2.0**-11, atol=2.0**-25)


def test_outlier_columns_beyond_float16_stay_in_float32() -> None:
    weight = normal(5, 7, seed=0)
    weight[2, 6] = 70000.0
    columns = numerics.outlier_rows(weight[:, [6, 0]])
    assert torch.equal(columns, weight[:, [6, 0]].t())
    assert numerics.outlier_rows(weight[:, :0]).shape == (0, 5)


def test_dequantized_weight_has_its_outlier_columns_exactly() -> None:
    weight, channels = normal(5, 9, seed=0), torch.tensor([7, 0])
    w_int8, w_scale = numerics.quantize_weight(weight)
    result = numerics.dequantize_weight(w_int8, w_scale, weight[:, channels].t().contiguous(), channels, 1)
    assert torch.equal(result[:, channels], weight[:, channels])
    others = [1, 2, 3, 4, 5, 6, 8]
    expected = dequantized_rows(w_int8, w_scale)[:, others]
    torch.testing.assert_close(result[:, others].double(), expected, rtol=2**-23, atol=0)


# --- rows --------------------------------------------------------------------------------------------------------


@deterministic
@given(x=matrices(), limit=st.sampled_from([63, 127]))
def test_row_round_trip_is_within_half_a_scale(x: Tensor, limit: int) -> None:
    assert_round_trip(x, *numerics.quantize_rows(x.float(), limit), limit)


@deterministic
@given(x=matrices(), limit=st.sampled_from([63, 127]), seed=st.integers(0, 1000))
def test_permuted_tokens_give_permuted_rows(x: Tensor, limit: int, seed: int) -> None:
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    q, scale = numerics.quantize_rows(x.float(), limit)
    permuted_q, permuted_scale = numerics.quantize_rows(x.float()[order], limit)
    assert torch.equal(permuted_q, q[order])
    assert torch.equal(permuted_scale, scale[order])


@deterministic
@given(x=matrices(), limit=st.sampled_from([63, 127]))
def test_negated_rows_give_negated_integers(x: Tensor, limit: int) -> None:
    q, scale = numerics.quantize_rows(x.float(), limit)
    negated_q, negated_scale = numerics.quantize_rows(-x.float(), limit)
    assert torch.equal(negated_q, -q)
    assert torch.equal(negated_scale, scale)


def test_rounding_is_half_to_even_and_reaches_the_limits() -> None:
    q, scale = numerics.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, -127.0]]), 127)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 0, -2, -127]]


def test_rows_of_zeros_have_scale_zero_and_stay_zero() -> None:
    q, scale = numerics.quantize_rows(torch.tensor([[0.0, -0.0], [1.0, 2.0]]), 127)
    assert scale.tolist() == [0.0, pytest.approx(2 / 127)]
    assert q[0].tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_rows_give_empty_results(shape: tuple[int, int]) -> None:
    q, scale = numerics.quantize_rows(torch.empty(shape), 127)
    assert q.shape == shape
    assert q.dtype == torch.int8
    assert scale.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [63, 127])
def test_a_non_finite_row_is_non_finite_and_touches_no_other(poison: float, limit: int) -> None:
    x = normal(4, 7, seed=1)
    clean_q, clean_scale = numerics.quantize_rows(x, limit)
    x[2, 3] = poison
    q, scale = numerics.quantize_rows(x, limit)
    assert scale[2].isnan()
    assert q[2].tolist() == [0] * 7
    others = [0, 1, 3]
    assert torch.equal(q[others], clean_q[others])
    assert torch.equal(scale[others], clean_scale[others])


@pytest.mark.parametrize("absmax", [1e-37, 1e-38, 1e-40, 1e-45])
def test_rows_near_the_smallest_floats_are_never_wrong_by_more_than_themselves(absmax: float) -> None:
    """There the inverse of the scale overflows: 0 · inf must not decide an integer."""
    x = torch.tensor([[absmax, 0.0, -absmax, 0.0] * 9, [1.0] * 36])
    q, scale = numerics.quantize_rows(x, 127)
    assert q[0, 1::2].tolist() == [0] * 18
    error = (dequantized_rows(q, scale) - x.double()).abs().amax(dim=1)
    assert error[0] <= x[0, 0].double()
    w_int8, w_scale = numerics.quantize_weight(x)
    assert w_int8[0, 1::2].tolist() == [0] * 18
    assert ((dequantized_rows(w_int8, w_scale) - x.double()).abs().amax(dim=1)[0] <= x[0, 0].double()).all()


@pytest.mark.parametrize("limit", [63, 127])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_subnormal_scale_is_a_scale_of_zero(limit: int, dtype: torch.dtype) -> None:
    """The first row's scale is the smallest normal float32, the others' the largest subnormal one and below."""
    smallest = numerics.SMALLEST_SCALE
    assert smallest == 2.0**-126
    x = torch.tensor([[1.01], [0.99], [1e-3], [1e-7]]) * limit * smallest * torch.tensor([[0.1, -1.0, 0.5]])
    for q, scale in (numerics.quantize_rows(x, limit), numerics.quantize_rows(x.double(), limit)):
        assert scale.dtype == torch.float32
        assert (scale[0] >= smallest, scale[1:].tolist()) == (True, [0.0] * 3)
        assert q[0, 1] == -limit
        assert not q[1:].any()
    q, scale = numerics.quantize_rows(x.to(dtype), limit)
    assert not q[2:].any()
    assert not scale[2:].any()
    if limit == numerics.WEIGHT_MAX:
        w_int8, w_scale = numerics.quantize_weight(x)
        assert (w_scale[0] >= smallest, w_scale[1:].tolist()) == (True, [0.0] * 3)
        assert w_int8[:, 1].tolist() == [-127, 0, 0, 0]
        assert not numerics.dequantize_rows(w_int8, w_scale)[1:].any()


def test_a_gradient_times_a_subnormal_weight_scale_is_zero() -> None:
    g_int8, g_scale = numerics.quantize_gradient(torch.ones(2, 5), torch.full((5,), 1e-40), 63)
    assert not g_int8.any()
    assert g_scale.tolist() == [0.0, 0.0]


def test_a_channel_of_subnormal_weights_is_not_smoothed() -> None:
    """1 / 1e-40 is infinite, and so is 1 / 1e-38 times a large activation."""
    target = numerics.smoothing_target(torch.tensor([0.0, 1.0, 1e30]), torch.tensor([1e-40, 1e-40, 1e-39]))
    assert target.tolist() == [1.0, 1.0, 1.0]


def test_rows_near_the_largest_floats_do_not_overflow() -> None:
    x = torch.tensor([[3e38, -1e38, 0.0]])
    q, scale = numerics.quantize_rows(x, 127)
    assert q.tolist() == [[127, -42, 0]]
    assert scale.isfinite().all()


# --- Quaff -------------------------------------------------------------------------------------------------------


@deterministic
@given(
    tokens=st.integers(0, 5),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 9),
    outliers=st.integers(0, 4),
    limit=st.sampled_from([63, 127]),
    dtype=st.sampled_from(DTYPES),
    is_split=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_quaff_is_the_linear_up_to_rounding(
    tokens: int,
    in_features: int,
    out_features: int,
    outliers: int,
    limit: int,
    dtype: torch.dtype,
    is_split: bool,
    seed: int,
) -> None:
    """x_scale w_scale (x_int8 w_int8ᵀ) + x_outlier W_Oᵀ ≈ x Wᵀ for every s ≥ 1, the infinite one too."""
    count = min(outliers, in_features)
    channels = torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))[:count]
    x = planted_outliers(tokens, in_features, channels.tolist(), 40.0, seed, dtype)
    weight = normal(out_features, in_features, seed=seed + 1, std=0.05)
    s = torch.full((count,), math.inf) if is_split else 1 + normal(count, seed=seed + 2, std=20).abs()

    w_int8, w_scale = numerics.quantize_weight(weight)
    w_outlier = weight[:, channels].t()
    x_int8, x_scale, x_outlier = numerics.quantize_activation(x, channels, s, limit, 1)
    assert (x_int8.dtype, x_scale.dtype, x_outlier.dtype) == (torch.int8, torch.float32, torch.float32)
    assert (x_int8.shape, x_scale.shape, x_outlier.shape) == (x.shape, (tokens,), (tokens, count))
    assert not x_int8.numel() or int(x_int8.abs().max()) <= limit

    y = quaff_output(x_int8, x_scale, x_outlier, w_int8, w_scale, w_outlier)
    error = (y - x.double() @ weight.double().t()).abs()
    assert (error <= quaff_error_bound(x, channels, s, x_scale, w_int8, w_scale)).all()


def test_smoothing_of_one_changes_nothing() -> None:
    x, channels = normal(3, 8, seed=4), torch.tensor([2, 5])
    plain_q, plain_scale = numerics.quantize_rows(x, 127)
    q, scale, x_outlier = numerics.quantize_activation(x, channels, torch.ones(2), 127, 1)
    assert torch.equal(q, plain_q)
    assert torch.equal(scale, plain_scale)
    assert torch.equal(x_outlier, torch.zeros(3, 2))


def test_infinite_smoothing_takes_the_channel_out_of_the_integers() -> None:
    x, channels = planted_outliers(3, 8, [2, 5], 100.0, seed=4), torch.tensor([5, 2])
    q, scale, x_outlier = numerics.quantize_activation(x, channels, torch.full((2,), math.inf), 127, 1)
    assert torch.equal(q[:, channels], torch.zeros(3, 2, dtype=torch.int8))
    assert torch.equal(x_outlier, x[:, channels])
    others = [0, 1, 3, 4, 6, 7]
    torch.testing.assert_close(scale, x[:, others].abs().amax(dim=1) / 127, rtol=2e-7, atol=0)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("channel", [1, 4], ids=["an outlier channel", "another channel"])
@pytest.mark.parametrize("s", [3.0, math.inf], ids=["smoothed", "split"])
def test_a_non_finite_token_stays_in_its_own_row(poison: float, channel: int, s: float) -> None:
    x, channels, weight = normal(4, 6, seed=5), torch.tensor([1]), normal(3, 6, seed=6)
    smoothing_scale = torch.tensor([s])
    w_int8, w_scale = numerics.quantize_weight(weight)

    def output() -> Tensor:
        parts = numerics.quantize_activation(x, channels, smoothing_scale, 127, 1)
        return quaff_output(*parts, w_int8, w_scale, weight[:, channels].t())

    clean = output()
    x[2, channel] = poison
    poisoned = output()
    assert not poisoned[2].isfinite().any()
    assert torch.equal(poisoned[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("limit", [127, 63])
@pytest.mark.parametrize("is_split", [False, True], ids=["momentum", "split"])
def test_quaff_beats_plain_int8_on_planted_outliers(limit: int, is_split: bool) -> None:
    """The margin follows from the steps: noise power is the square of the step.

    The planted channels are 100 times the others, so a plain per-token step is 100 times as coarse as one that they
    leave alone. Smoothing by sqrt(absmax x / absmax W) leaves them about as large as the other channels, splitting
    leaves them out; the activation noise falls by nearly 40 dB. Rounding the weights to 8 bits caps the gain at 7 or 8
    bits of activation alike; 20 dB must remain, ten times less error.
    """
    channels = torch.tensor([3, 77, 200, 411])
    x = planted_outliers(64, 512, channels.tolist(), 100.0, seed=7)
    weight = normal(96, 512, seed=8, std=0.02)
    w_int8, w_scale = numerics.quantize_weight(weight)
    exact = x.double() @ weight.double().t()

    none = torch.empty(0, dtype=torch.int64)
    plain = quaff_output(
        *numerics.quantize_activation(x, none, torch.empty(0), limit, 1), w_int8, w_scale, torch.empty(0, 96)
    )
    target = numerics.smoothing_target(x[:, channels].abs().amax(dim=0), weight[:, channels].abs().amax(dim=0))
    s = torch.full((4,), math.inf) if is_split else target
    parts = numerics.quantize_activation(x, channels, s, limit, 1)
    quaff = quaff_output(*parts, w_int8, w_scale, weight[:, channels].t())

    margin = sqnr_db(exact, quaff) - sqnr_db(exact, plain)
    assert margin > 20, margin


@deterministic
@given(grad=matrices(), limit=st.sampled_from([63, 127]))
def test_gradient_is_rounded_after_the_weight_scale(grad: Tensor, limit: int) -> None:
    w_scale = normal(grad.shape[1], seed=9).abs()
    g_int8, g_scale = numerics.quantize_gradient(grad, w_scale, limit)
    assert_round_trip(grad.float() * w_scale, g_int8, g_scale, limit)


# --- smoothing scale ---------------------------------------------------------------------------------------------


def test_smoothing_target_is_the_floored_square_root_of_the_ratio() -> None:
    x_absmax, w_absmax = torch.tensor([9.0, 1.0, 50.0, 0.0]), torch.tensor([1.0, 4.0, 0.5, 1.0])
    assert numerics.smoothing_target(x_absmax, w_absmax).tolist() == [3.0, 1.0, 10.0, 1.0]


def test_smoothing_target_of_a_channel_without_weights_is_one() -> None:
    assert numerics.smoothing_target(torch.tensor([7.0]), torch.tensor([0.0])).tolist() == [1.0]


def test_momentum_weighs_the_old_value() -> None:
    s, target = torch.tensor([10.0, 1.0]), torch.tensor([20.0, 1.0])
    torch.testing.assert_close(numerics.updated_smoothing_scale(s, target, 0.1), torch.tensor([19.0, 1.0]))
    torch.testing.assert_close(numerics.updated_smoothing_scale(s, target, 0.9), torch.tensor([11.0, 1.0]))
    assert torch.equal(numerics.updated_smoothing_scale(s, target, 0.0), target)


@deterministic
@given(momentum=st.floats(0, 1), old=st.floats(1, 1e4), new=st.floats(1, 1e4))
def test_the_updated_scale_lies_between_old_and_new(momentum: float, old: float, new: float) -> None:
    updated = float(numerics.updated_smoothing_scale(torch.tensor([old]), torch.tensor([new]), momentum))
    assert min(old, new) * (1 - 1e-6) <= updated <= max(old, new) * (1 + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_target_is_forgotten(bad: float) -> None:
    updated = numerics.updated_smoothing_scale(torch.tensor([3.0, 3.0]), torch.tensor([bad, 5.0]), 0.5)
    assert updated.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_absmax_is_exact_in_every_dtype(dtype: torch.dtype) -> None:
    x = normal(11, 5, seed=10, dtype=dtype)
    result = numerics.channel_absmax(x)
    assert result.dtype == torch.float32
    assert torch.equal(result.double(), x.double().abs().amax(dim=0))
    assert torch.equal(numerics.channel_absmax(x[:0]), torch.zeros(5))


# --- outlier channels --------------------------------------------------------------------------------------------


def test_hits_are_the_largest_channels_and_never_a_zero_one() -> None:
    absmax = torch.tensor([0.0, 5.0, 1.0, 0.0, 9.0])
    assert numerics.outlier_hits(absmax, 2).tolist() == [False, True, False, False, True]
    assert numerics.outlier_hits(absmax, 4).tolist() == [False, True, True, False, True]
    assert numerics.outlier_hits(absmax, 0).tolist() == [False] * 5


def test_stable_outliers_win_over_one_off_spikes() -> None:
    """Channel 9 has by far the largest mean absmax, from one spike; 2 and 6 are outliers step after step."""
    hits, absmax_sum, steps = torch.zeros(16), torch.zeros(16), 8
    for step in range(steps):
        x = planted_outliers(32, 16, [2, 6], 20.0, seed=step)
        if step == 3:
            x[0, 9] = 1e5
        absmax = numerics.channel_absmax(x)
        hits += numerics.outlier_hits(absmax, 2)
        absmax_sum += absmax
    assert int(absmax_sum.argmax()) == 9
    assert sorted(numerics.stable_outlier_channels(hits, absmax_sum / steps, 2).tolist()) == [2, 6]


def test_ties_of_hits_are_broken_by_absmax_then_by_index() -> None:
    hits, absmax = torch.tensor([1.0, 4.0, 4.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 3.0, 9.0, 2.0])
    assert numerics.stable_outlier_channels(hits, absmax, 5).tolist() == [2, 1, 0, 4, 3]
    assert numerics.stable_outlier_channels(hits, absmax, 3).tolist() == [2, 1, 0]
    assert numerics.stable_outlier_channels(hits, absmax, 0).tolist() == []


@deterministic
@given(in_features=st.integers(1, 5000), budget=st.floats(0.0, 0.25))
def test_outlier_count_is_within_the_budget_or_one(in_features: int, budget: float) -> None:
    count = numerics.outlier_count(in_features, budget)
    assert 0 <= count <= in_features
    assert (count == 0) == (budget == 0)
    assert count <= max(1, in_features * budget) < count + 1 or budget == 0


@pytest.mark.parametrize(
    ("in_features", "budget", "count"), [(1000, 0.01, 10), (99, 0.01, 1), (64, 0.0, 0), (2048, 0.01, 20), (7, 0.25, 1)]
)
def test_outlier_count_rounds_down_to_at_least_one(in_features: int, budget: float, count: int) -> None:
    assert numerics.outlier_count(in_features, budget) == count


def test_sqnr_in_decibel() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert sqnr_db(reference, reference + torch.tensor([0.3, 0.4])) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(reference, reference) == math.inf


class TestRotation:
    @pytest.mark.parametrize("block", [1, 2, 8, 64])
    def test_the_matrix_is_symmetric_and_orthogonal(self, block: int) -> None:
        h = numerics.rotate(torch.eye(block), block)
        assert torch.equal(h, h.t())
        torch.testing.assert_close(h @ h, torch.eye(block), rtol=0, atol=1e-6)
        torch.testing.assert_close(h.abs(), torch.full((block, block), 1 / math.sqrt(block)), rtol=0, atol=1e-7)

    def test_it_is_sylvesters(self) -> None:
        assert numerics.rotate(torch.eye(4), 4).mul(2).tolist() == [
            [1, 1, 1, 1],
            [1, -1, 1, -1],
            [1, 1, -1, -1],
            [1, -1, -1, 1],
        ]

    def test_a_row_comes_out_the_same_in_any_batch(self) -> None:
        x = normal(33, 576, seed=5)
        assert torch.equal(numerics.rotate(x, 64)[7:9], numerics.rotate(x[7:9], 64))

    @pytest.mark.parametrize(("features", "block"), [(12, 4), (96, 32), (192, 64), (512, 256)])
    def test_each_block_of_neighbours_meets_the_matrix_and_blocks_are_contiguous(
        self, features: int, block: int
    ) -> None:
        bits = [[(i & j).bit_count() for j in range(block)] for i in range(block)]
        h = (1.0 - 2.0 * (torch.tensor(bits) % 2)).double() / math.sqrt(block)
        x = normal(5, features, seed=4)
        expected = torch.cat([piece.double() @ h for piece in x.split(block, dim=1)], dim=1)
        torch.testing.assert_close(numerics.rotate(x, block).double(), expected, rtol=0, atol=1e-5)

    def test_features_that_meet_are_contiguous(self) -> None:
        x = torch.zeros(1, 12)
        x[0, 5] = 2.0
        assert numerics.rotate(x, 4).flatten().nonzero().flatten().tolist() == [4, 5, 6, 7]

    @pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96), (0, 96)])
    def test_it_is_its_own_inverse_and_leaves_products(self, shape: tuple[int, ...]) -> None:
        x, w = normal(*shape, seed=1), normal(7, 96, seed=2)
        rotated = numerics.rotate(x, 32)
        torch.testing.assert_close(numerics.rotate(rotated, 32), x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rotated @ numerics.rotate(w, 32).t(), x @ w.t(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("features", "largest", "block"), [(576, 64, 64), (96, 64, 32), (97, 64, 1), (64, 1, 1)])
    def test_the_block_divides_the_features(self, features: int, largest: int, block: int) -> None:
        assert numerics.rotation_block(features, largest) == block

    def test_an_activation_without_stable_outliers_gains_ten_decibels(self) -> None:
        """A different large channel in each token, as behind a gated activation: no set of channels helps there."""
        x = normal(64, 256, seed=3)
        x[torch.arange(64), torch.arange(64) * 4] *= 40
        none = torch.empty(0, dtype=torch.int64)

        def error(rotation: int) -> float:
            x_int8, x_scale, _ = numerics.quantize_activation(x, none, torch.empty(0), 127, rotation)
            return sqnr_db(x, numerics.dequantize_rows(x_int8, x_scale, rotation))

        assert error(64) > error(1) + 10


# --- the gradient of logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [40, 64, 1000, 33 * 64, 5001])
@pytest.mark.parametrize("count", [1, 8, 32])
def test_what_is_kept_apart_of_a_gradient_are_its_largest_values(classes: int, count: int) -> None:
    torch.manual_seed(0)
    grad, w_scale = torch.randn(7, classes).pow(5), torch.rand(classes) + 0.5
    g_int8, g_scale, index, rest = numerics.quantize_gradient_of_logits(grad, w_scale, 127, count)
    g = grad * w_scale
    assert torch.equal(index.sort().values, g.abs().topk(count).indices.sort().values)
    rebuilt = (g_int8 * g_scale.unsqueeze(1)).scatter_add(1, index, rest)
    torch.testing.assert_close(rebuilt.gather(1, index), g.gather(1, index))  # exact
    assert ((rebuilt - g).abs() <= 0.501 * g_scale.unsqueeze(1)).all()
    largest_of_the_rest = g.abs().scatter(1, index, 0.0).amax(dim=1)
    torch.testing.assert_close(g_scale, largest_of_the_rest / 127)


def test_rows_of_a_gradient_that_are_zero_or_not_finite_touch_no_other() -> None:
    grad = torch.randn(4, 5000)
    grad[1], grad[2, 7] = 0.0, torch.inf
    grad[3] = 0.0
    grad[3, 11] = -1.0
    g_int8, g_scale, index, rest = numerics.quantize_gradient_of_logits(grad, torch.ones(5000), 127, 8)
    alone = numerics.quantize_gradient_of_logits(grad[:1], torch.ones(5000), 127, 8)
    for part, expected in zip((g_int8, g_scale, index, rest), alone, strict=True):
        assert torch.equal(part[:1], expected)
    assert not g_int8[1].any()
    assert not rest[1].any()
    assert not torch.isfinite(rest[2]).all()
    assert not g_int8[3].any()
    assert rest[3].sum() == -1.0
    assert index[3][rest[3] != 0].tolist() == [11]
