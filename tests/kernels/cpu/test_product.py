"""The compiled product against integers and float64, in every variant that this CPU can run."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quaff_fx import numerics
from quaff_fx.errors import ShapeError
from quaff_fx.kernels import cpu
from quaff_fx.numerics import INT32_MAX_REDUCTION

FLOAT_EPS = 2.0**-24
"""Unit roundoff of float32; of the result types below, half an ulp."""
RESULT_EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLOATING = list(RESULT_EPS)


@pytest.fixture(params=list(cpu.VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    reason = cpu.reason_unavailable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    name: str = request.param
    return name


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def transpose_w(request: pytest.FixtureRequest) -> bool:
    is_backward: bool = request.param
    return is_backward


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def operands(tokens: int, n: int, k: int, transpose_w: bool, limit: int, is_extreme: bool) -> tuple[Tensor, Tensor]:
    """Random int8 operands; extreme ones hold only plus and minus the largest value, in long runs of one sign."""
    reduction = n if transpose_w else k
    if is_extreme:
        a = torch.where(torch.rand(tokens, 1) < 0.5, -limit, limit).expand(tokens, reduction).to(torch.int8)
        w = torch.where(torch.rand(n, k) < 0.1, -127, 127).to(torch.int8)
    else:
        a = torch.randint(-limit, limit + 1, (tokens, reduction), dtype=torch.int8)
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return a.contiguous(), w


def exact_product(a: Tensor, w: Tensor, transpose_w: bool) -> Tensor:
    """In float64, which holds all these integers; int64 has no fast product."""
    return (a.double() @ (w if transpose_w else w.t()).double()).to(torch.int64)


def assert_exact(variant: str, a: Tensor, w: Tensor, transpose_w: bool, activation_max: int) -> None:
    acc = cpu.int8_linear(a, w, transpose_w=transpose_w, activation_max=activation_max, variant=variant)
    assert acc.dtype == torch.int32
    torch.testing.assert_close(acc.to(torch.int64), exact_product(a, w, transpose_w), rtol=0, atol=0)


# --- integers ------------------------------------------------------------------------------------------------------


def test_forced_variant_has_its_name(variant: str) -> None:
    assert variant in {"native", cpu.instruction_set(variant)}


@pytest.mark.parametrize("activation_max", [63, 127])
@pytest.mark.parametrize("is_extreme", [False, True])
def test_accumulators_are_exact_for_every_number_of_tokens(
    variant: str, transpose_w: bool, activation_max: int, is_extreme: bool
) -> None:
    for tokens in (*range(41), 97, 130):
        a, w = operands(tokens, 75, 101, transpose_w, activation_max, is_extreme)
        assert_exact(variant, a, w, transpose_w, activation_max)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 40),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    activation_max=st.sampled_from([63, 127]),
    is_extreme=st.booleans(),
    threads=st.integers(1, 5),
)
def test_accumulators_are_exact_for_every_size(
    variant: str,
    transpose_w: bool,
    tokens: int,
    n: int,
    k: int,
    activation_max: int,
    is_extreme: bool,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    a, w = operands(tokens, n, k, transpose_w, activation_max, is_extreme)
    assert_exact(variant, a, w, transpose_w, activation_max)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 8192), (8192, 1), (61, 8191), (8191, 61), (576, 1536), (513, 2049)])
@pytest.mark.parametrize("activation_max", [63, 127])
def test_accumulators_are_exact_for_long_and_thin_weights(
    variant: str, transpose_w: bool, n: int, k: int, activation_max: int
) -> None:
    for tokens, is_extreme in [(1, True), (33, True), (150, False)]:
        a, w = operands(tokens, n, k, transpose_w, activation_max, is_extreme)
        assert_exact(variant, a, w, transpose_w, activation_max)


def test_longest_reduction_is_exact_and_a_longer_one_raises(variant: str, transpose_w: bool) -> None:
    for reduction in (INT32_MAX_REDUCTION, INT32_MAX_REDUCTION + 1):
        a = torch.full((2, reduction), 127, dtype=torch.int8)
        w = torch.full((reduction, 3) if transpose_w else (3, reduction), 127, dtype=torch.int8)
        if reduction == INT32_MAX_REDUCTION:
            assert_exact(variant, a, w, transpose_w, 127)
            assert_exact(variant, -a, w, transpose_w, 127)
        else:
            with pytest.raises(ShapeError, match=rf"a_int8: has {reduction} columns, expected at most"):
                cpu.int8_linear(a, w, transpose_w=transpose_w, activation_max=127, variant=variant)


def test_empty_reduction_gives_zeros(variant: str, transpose_w: bool) -> None:
    a, w = torch.zeros(3, 0, dtype=torch.int8), torch.zeros((0, 5) if transpose_w else (5, 0), dtype=torch.int8)
    bias = torch.randn(5)
    options = {"transpose_w": transpose_w, "activation_max": 127, "variant": variant}
    assert torch.equal(cpu.int8_linear(a, w, **options), torch.zeros(3, 5, dtype=torch.int32))
    assert torch.equal(cpu.int8_linear(a, w, bias=bias, out_dtype=torch.float32, **options), bias.expand(3, 5))


@pytest.mark.parametrize("shape", [(0, 7, 5), (4, 0, 5), (4, 7, 0)])
def test_empty_results_have_their_shape(variant: str, transpose_w: bool, shape: tuple[int, int, int]) -> None:
    tokens, n, k = shape
    a, w = operands(tokens, n, k, transpose_w, 127, False)
    acc = cpu.int8_linear(a, w, transpose_w=transpose_w, activation_max=127, variant=variant)
    assert acc.shape == (tokens, k if transpose_w else n)


def test_strided_operands_are_read_in_their_order(variant: str, transpose_w: bool) -> None:
    a, w = operands(21, 70, 90, transpose_w, 127, False)
    wanted = exact_product(a, w, transpose_w).to(torch.int32)
    options = {"transpose_w": transpose_w, "activation_max": 127, "variant": variant}
    a_wide = torch.stack([a, torch.full_like(a, 99)], dim=2)[:, :, 0]
    for a_view in (a, a.t().contiguous().t(), a_wide):
        for w_view in (w, w.t().contiguous().t(), torch.cat([w, w], dim=1)[:, : w.shape[1]]):
            assert torch.equal(cpu.int8_linear(a_view, w_view, **options), wanted)


def test_other_threads_and_thread_counts_change_nothing(variant: str, transpose_w: bool) -> None:
    a, w = operands(300, 200, 210, transpose_w, 127, False)
    wanted = exact_product(a, w, transpose_w).to(torch.int32)
    results: list[Tensor] = []

    def multiply() -> None:
        options = {"transpose_w": transpose_w, "activation_max": 127, "variant": variant}
        results.extend(cpu.int8_linear(a, w, **options) for _ in range(5))

    for count in (1, 2, 3):
        torch.set_num_threads(count)
        threads = [threading.Thread(target=multiply) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 45
    assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_child_of_a_fork_does_not_hang(variant: str) -> None:
    a, w = operands(300, 200, 210, False, 127, False)
    torch.set_num_threads(2)
    wanted = cpu.int8_linear(a, w, transpose_w=False, activation_max=127, variant=variant)
    child = os.fork()
    if child == 0:  # no pytest, no torch operators here: they might wait for threads that were not forked
        status = 1
        try:
            result = cpu.int8_linear(a, w, transpose_w=False, activation_max=127, variant=variant)
            status = 0 if result.numpy().tobytes() == wanted.numpy().tobytes() else 2
        finally:
            os._exit(status)
    waiter = threading.Thread(target=lambda: statuses.append(os.waitpid(child, 0)[1]), daemon=True)
    statuses: list[int] = []
    waiter.start()
    waiter.join(timeout=30)
    if not statuses:
        os.kill(child, 9)
    assert statuses == [0]


# --- scaled results ------------------------------------------------------------------------------------------------


def epilogue(tokens: int, columns: int, outliers: int) -> dict[str, Tensor]:
    return {
        "a_scale": torch.rand(tokens) * 1e-3,
        "w_scale": torch.rand(columns) + 0.5,
        "a_outlier": torch.randn(tokens, outliers),
        "w_outlier": torch.randn(outliers, columns),
        "bias": torch.randn(columns),
    }


@pytest.mark.parametrize("out_dtype", FLOATING)
@pytest.mark.parametrize(("tokens", "n", "k", "outliers"), [(1, 5, 7, 1), (29, 64, 96, 0), (45, 131, 150, 80)])
def test_scaled_results_are_within_rounding_of_float64(
    variant: str, transpose_w: bool, out_dtype: torch.dtype, tokens: int, n: int, k: int, outliers: int
) -> None:
    a, w = operands(tokens, n, k, transpose_w, 127, False)
    columns = k if transpose_w else n
    extra = epilogue(tokens, columns, outliers)
    y = cpu.int8_linear(
        a, w, transpose_w=transpose_w, activation_max=127, out_dtype=out_dtype, variant=variant, **extra
    )
    assert y.dtype == out_dtype
    wide = {name: tensor.double() for name, tensor in extra.items()}
    main = exact_product(a, w, transpose_w).double() * wide["a_scale"][:, None] * wide["w_scale"]
    wanted = main + wide["a_outlier"] @ wide["w_outlier"] + wide["bias"]
    # Each of the O + 5 operations in float32 rounds a partial sum, none larger than the sum of magnitudes.
    size = main.abs() + wide["a_outlier"].abs() @ wide["w_outlier"].abs() + wide["bias"].abs()
    bound = (outliers + 5) * FLOAT_EPS * 1.01 * size
    bound = bound + RESULT_EPS[out_dtype] * (wanted.abs() + bound) + 2.0**-25  # the last term: subnormal float16
    assert ((y.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("missing", ["a_scale", "w_scale", "outlier", "bias"])
def test_missing_operands_are_neutral(variant: str, transpose_w: bool, missing: str) -> None:
    a, w = operands(17, 40, 50, transpose_w, 127, False)
    extra = epilogue(17, 50 if transpose_w else 40, 3)
    neutral = {
        name: torch.ones_like(tensor) if "scale" in name else torch.zeros_like(tensor)
        for name, tensor in extra.items()
        if missing in name
    }
    given_ones = {name: tensor for name, tensor in extra.items() if missing not in name}
    assert neutral
    options = {"transpose_w": transpose_w, "activation_max": 127, "out_dtype": torch.float32, "variant": variant}
    without = cpu.int8_linear(a, w, **given_ones, **options)
    assert torch.equal(without, cpu.int8_linear(a, w, **{**extra, **neutral}, **options))
    assert not torch.equal(without, cpu.int8_linear(a, w, **extra, **options))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_half_results_are_the_rounded_float32_results(variant: str, out_dtype: torch.dtype) -> None:
    # Scales reach from subnormal results over infinity to NaN.
    a, w = operands(80, 37, 64, False, 127, False)
    a_scale = torch.cat([torch.logspace(-44, 34, 78), torch.tensor([float("inf"), float("nan")])])
    options = {"transpose_w": False, "activation_max": 127, "a_scale": a_scale, "variant": variant}
    wanted = cpu.int8_linear(a, w, out_dtype=torch.float32, **options).to(out_dtype)
    result = cpu.int8_linear(a, w, out_dtype=out_dtype, **options)
    torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)
    assert wanted.isinf().any()
    assert ((wanted != 0) & (wanted.abs() < torch.finfo(out_dtype).smallest_normal)).any()


def test_bad_and_zero_rows_touch_no_other(variant: str, transpose_w: bool) -> None:
    a, w = operands(40, 48, 56, transpose_w, 127, False)
    extra = epilogue(40, 56 if transpose_w else 48, 4)
    options = {"transpose_w": transpose_w, "activation_max": 127, "out_dtype": torch.float32, "variant": variant}
    clean = cpu.int8_linear(a, w, **extra, **options)
    a, a_scale, a_outlier = a.clone(), extra["a_scale"].clone(), extra["a_outlier"].clone()
    a[3], a_scale[3] = 0, float("nan")
    a_outlier[17, 2] = float("inf")
    a[29], a_scale[29], a_outlier[29] = 0, 0, 0
    y = cpu.int8_linear(a, w, **{**extra, "a_scale": a_scale, "a_outlier": a_outlier}, **options)
    assert not y[[3, 17]].isfinite().any()
    assert torch.equal(y[29], extra["bias"])
    others = [t for t in range(40) if t not in (3, 17, 29)]
    assert torch.equal(y[others], clean[others])


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [64, 100, 127, -65, -128])
def test_broken_promise_of_seven_bits_raises(variant: str, transpose_w: bool, value: int) -> None:
    a, w = operands(30, 40, 50, transpose_w, 63, False)
    a[29, 13] = value
    with pytest.raises(ShapeError, match="a_int8: has absolute values over 63, expected at most activation_max=63"):
        cpu.int8_linear(a, w, transpose_w=transpose_w, activation_max=63, variant=variant)
    assert_exact(variant, a, w, transpose_w, 127)


INT8 = torch.zeros(4, 6, dtype=torch.int8)
WEIGHT = torch.zeros(5, 6, dtype=torch.int8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a_int8": INT8[0]}, r"a_int8: has shape (6,), expected (any, any)"),
        ({"a_int8": INT8[:, :5]}, "a_int8: has 5 columns, expected 6 for a weight of shape (5, 6)"),
        ({"transpose_w": True}, "a_int8: has 6 columns, expected 5 for a weight of shape (5, 6)"),
        ({"a_int8": INT8.float()}, "a_int8: is torch.float32, expected torch.int8"),
        ({"w_int8": WEIGHT.to(torch.uint8)}, "w_int8: is torch.uint8, expected torch.int8"),
        ({"w_int8": WEIGHT.to("meta")}, "w_int8: is torch.strided on meta, expected a dense CPU tensor"),
        ({"activation_max": 128}, "activation_max: is 128, expected 127 or 63"),
        ({"out_dtype": torch.float64}, "out_dtype: is torch.float64, expected float32"),
        ({"a_scale": torch.ones(5)}, "a_scale: has shape (5,), expected (4)"),
        ({"a_scale": torch.ones(4).double()}, "a_scale: is torch.float64, expected torch.float32"),
        ({"w_scale": torch.ones(4)}, "w_scale: has shape (4,), expected (5)"),
        ({"bias": torch.ones(1, 5)}, "bias: has shape (1, 5), expected (5)"),
        ({"a_outlier": torch.ones(4, 2)}, "a_outlier: comes alone, expected together with w_outlier"),
        (
            {"a_outlier": torch.ones(4, 2), "w_outlier": torch.ones(3, 5)},
            "w_outlier: has shape (3, 5), expected (2, 5)",
        ),
        (
            {"a_scale": torch.ones(4), "out_dtype": torch.int32},
            "out_dtype: is torch.int32 with scales, outliers, a bias or a rotation",
        ),
    ],
)
def test_operands_that_do_not_fit_raise(changed: dict[str, object], message: str) -> None:
    arguments = {"a_int8": INT8, "w_int8": WEIGHT, "transpose_w": False, "activation_max": 127}
    with pytest.raises(ShapeError, match=re.escape(message)):
        cpu.int8_linear(**{**arguments, "out_dtype": torch.float32, **changed})


# --- quantizers ----------------------------------------------------------------------------------------------------


def assert_equal_bits(results: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    for result, right in zip(results, wanted, strict=True):
        assert result.dtype == right.dtype
        torch.testing.assert_close(result, right, rtol=0, atol=0, equal_nan=True)


def planted_activation(tokens: int, k: int, outliers: int) -> tuple[Tensor, Tensor, Tensor]:
    channels = torch.randperm(k)[:outliers]
    x = torch.randn(tokens, k)
    x[:, channels] *= 60
    return x, channels, 1 + 7 * torch.rand(outliers)


@pytest.mark.parametrize("activation_max", [63, 127])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("tokens", "k", "outliers"), [(0, 5, 1), (1, 1, 1), (3, 0, 0), (37, 1031, 20), (90, 2048, 0)])
def test_quantized_activation_equals_the_formula(
    variant: str, activation_max: int, dtype: torch.dtype, tokens: int, k: int, outliers: int
) -> None:
    x, channels, smoothing = planted_activation(tokens, k, outliers)
    x = x.to(dtype)
    x_int8, x_scale, x_outlier = cpu.quantize_activation(x, channels, smoothing, activation_max, 1, variant=variant)
    wanted = numerics.quantize_activation(x, channels, smoothing, activation_max, 1)
    assert_equal_bits((x_int8, x_scale, x_outlier), wanted)
    smooth = x.double()
    smooth[:, channels] /= smoothing.double()
    step = x_scale.double()[:, None]
    assert ((x_int8 * step - smooth).abs() <= step * (0.5 + 127 * 2.0**-21)).all()
    before = x[:, channels].double()
    error = (x_outlier - before * (1 - 1 / smoothing.double())).abs()
    assert (error <= 4 * FLOAT_EPS * before.abs()).all()  # 1 - 1 / s cancels near s = 1
    if tokens and k:
        assert x_int8.abs().amax() == activation_max


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 40),
    k=st.integers(1, 200),
    activation_max=st.sampled_from([63, 127]),
    exponent=st.integers(-44, 37),
)
def test_quantized_activation_equals_the_formula_at_every_size(
    variant: str, tokens: int, k: int, activation_max: int, exponent: int
) -> None:
    # Down to subnormal rows, whose scale is itself rounded to a few bits, and up to the largest floats.
    x = torch.randn(tokens, k).clamp(-3, 3) * 10.0**exponent
    nothing = (torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert_equal_bits(
        cpu.quantize_activation(x, *nothing, activation_max, 1, variant=variant),
        numerics.quantize_activation(x, *nothing, activation_max, 1),
    )


@pytest.fixture(scope="module")
def inductor() -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """What Inductor makes of the formulas, for sizes that vary."""
    options = {"dynamic": True, "fullgraph": True}
    return {
        "activation": torch.compile(numerics.quantize_activation, **options),
        "gradient": torch.compile(numerics.quantize_gradient, **options),
    }


SMALL = [0.0, 1e-45, 1e-40, 1e-38, 1.2e-38, 1e-37, 7.4e-37, 7.5e-37, 1.4e-36, 1.5e-36, 1e-35, 1e-30, 1.0]
"""Around the smallest normal scale, for 63 and for 127."""


@pytest.mark.compile
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("activation_max", [63, 127])
@pytest.mark.parametrize("w_scale", [1.0, 0.37, 1e-20, 1e-40])
def test_a_subnormal_scale_is_a_scale_of_zero_in_the_kernel_and_compiled(
    variant: str,
    inductor: dict[str, Callable[..., tuple[Tensor, ...]]],
    activation_max: int,
    dtype: torch.dtype,
    w_scale: float,
) -> None:
    """Training at 7 bits with gradients below 4e-37 ended with "absolute values over 63"."""
    g = torch.zeros(len(SMALL) + 3, 66)
    g[: len(SMALL), 5], g[: len(SMALL), 64] = torch.tensor(SMALL), -0.5 * torch.tensor(SMALL)
    g[-3:, 5] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    g, scales = g.to(dtype), torch.full((66,), w_scale)
    wanted = numerics.quantize_gradient(g, scales, activation_max)
    subnormal = (g.float() * w_scale).abs().amax(dim=1) / activation_max < numerics.SMALLEST_SCALE
    assert subnormal.any()
    assert not wanted[1][subnormal].any()
    assert not wanted[0][subnormal].any()
    assert int(wanted[0].abs().max()) <= activation_max
    assert_equal_bits(inductor["gradient"](g, scales, activation_max), wanted)
    w = torch.ones(66, 7, dtype=torch.int8)
    y = cpu.int8_linear(
        wanted[0],
        w,
        transpose_w=True,
        activation_max=activation_max,
        a_scale=wanted[1],
        out_dtype=torch.float32,
        variant=variant,
    )
    assert not y[subnormal].any()


@pytest.mark.compile
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("activation_max", [63, 127])
@pytest.mark.parametrize("exponent", [-44, -38, -36, -3, 4, 37])
def test_the_compiled_formula_gives_the_bits_of_the_kernel(
    variant: str,
    inductor: dict[str, Callable[..., tuple[Tensor, ...]]],
    activation_max: int,
    dtype: torch.dtype,
    exponent: int,
) -> None:
    x, channels, smoothing = planted_activation(19, 200, 3)
    smoothing[1] = torch.inf
    x = (x * 10.0**exponent).to(dtype)
    got = cpu.quantize_activation(x, channels, smoothing, activation_max, 1, variant=variant)
    assert_equal_bits(inductor["activation"](x, channels, smoothing, activation_max, 1), got)
    assert_equal_bits(numerics.quantize_activation(x, channels, smoothing, activation_max, 1), got)


def test_halves_are_rounded_to_even(variant: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    x_int8, x_scale, _ = cpu.quantize_activation(x, torch.zeros(0, dtype=torch.int64), torch.zeros(0), 127, 1)
    assert x_scale.tolist() == [1.0]
    assert x_int8.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]


def test_bad_and_zero_rows_are_defined_and_alone(variant: str) -> None:
    x, channels, smoothing = planted_activation(12, 77, 5)
    clean = cpu.quantize_activation(x, channels, smoothing, 127, 1, variant=variant)
    bad = x.clone()
    bad[2, 76] = float("nan")
    bad[5, channels[1]] = float("inf")
    bad[8, 0] = float("-inf")
    bad[10] = 0
    x_int8, x_scale, x_outlier = cpu.quantize_activation(bad, channels, smoothing, 127, 1, variant=variant)
    assert x_scale[[2, 5, 8]].isnan().all()
    assert x_scale[10] == 0
    assert not x_int8[[2, 5, 8, 10]].any()
    assert not x_outlier[10].any()
    others = [t for t in range(12) if t not in (2, 5, 8, 10)]
    for result, wanted in zip((x_int8, x_scale, x_outlier), clean, strict=True):
        assert torch.equal(result[others], wanted[others])


def test_infinite_smoothing_takes_a_channel_out(variant: str) -> None:
    x, channels, smoothing = planted_activation(6, 70, 4)
    smoothing[2] = float("inf")
    x_int8, x_scale, x_outlier = cpu.quantize_activation(x, channels, smoothing, 127, 1, variant=variant)
    x_without = x.index_fill(1, channels[2:3], 0)
    wanted = cpu.quantize_activation(x_without, channels, smoothing, 127, 1, variant=variant)
    assert torch.equal(x_int8, wanted[0])
    assert torch.equal(x_scale, wanted[1])
    assert torch.equal(x_outlier[:, 2], x[:, channels[2]])


def test_strided_rows_are_read_in_their_order(variant: str) -> None:
    x, channels, smoothing = planted_activation(9, 66, 3)
    wanted = cpu.quantize_activation(x, channels, smoothing, 127, 1, variant=variant)
    wide = torch.cat([x, torch.full((9, 7), 1e6)], dim=1)
    for view in (wide[:, :66], x.t().contiguous().t(), torch.stack([x, x * 9], dim=2)[:, :, 0]):
        for result, right in zip(
            cpu.quantize_activation(view, channels, smoothing, 127, 1, variant=variant), wanted, strict=True
        ):
            assert torch.equal(result, right)
    one = x[:1].expand(4, 66)
    assert torch.equal(cpu.quantize_activation(one, channels, smoothing, 127, 1)[0], wanted[0][:1].expand(4, 66))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 6).double()}, "x: is torch.float64, expected float32, bfloat16 or float16"),
        ({"x": torch.zeros(6)}, "x: has shape (6,), expected (any, any)"),
        ({"x": torch.zeros(4, 6, device="meta")}, "x: is torch.strided on meta"),
        ({"outlier_channels": torch.tensor([0, 6])}, "outlier_channels: has an index outside the 6 columns of x"),
        ({"outlier_channels": torch.tensor([-1, 0])}, "outlier_channels: has an index outside the 6 columns of x"),
        ({"outlier_channels": torch.tensor([0, 1]).int()}, "outlier_channels: is torch.int32, expected torch.int64"),
        ({"smoothing_scale": torch.ones(3)}, "smoothing_scale: has shape (3,), expected (2)"),
        ({"activation_max": 15}, "activation_max: is 15, expected 127 or 63"),
    ],
)
def test_activations_that_do_not_fit_raise(changed: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(4, 6), "outlier_channels": torch.tensor([1, 5]), "smoothing_scale": torch.ones(2)}
    with pytest.raises(ShapeError, match=re.escape(message)):
        cpu.quantize_activation(**{**arguments, "activation_max": 127, "rotation": 1, **changed})


ROTATIONS = [(576, 64), (96, 32), (40, 8), (6, 2), (100, 4), (64, 64), (2048, 16), (384, 128), (512, 256), (1024, 1024)]
"""Width and block: shorter than a vector, whole or not, of several vectors, and longer than what stays in registers."""


@pytest.mark.parametrize("activation_max", [63, 127])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("k", "rotation"), ROTATIONS)
def test_rotated_activation_is_the_formula_bit_for_bit(
    variant: str, dtype: torch.dtype, k: int, rotation: int, activation_max: int
) -> None:
    x, channels, smoothing = planted_activation(37, k, 2)
    x, smoothing[1] = x.to(dtype), torch.inf
    got = cpu.quantize_activation(x, channels, smoothing, activation_max, rotation, variant=variant)
    assert_equal_bits(got, numerics.quantize_activation(x, channels, smoothing, activation_max, rotation))


@pytest.mark.parametrize("out_dtype", FLOATING)
@pytest.mark.parametrize("tokens", [1, 3, 37])
@pytest.mark.parametrize(("k", "rotation"), ROTATIONS)
def test_rotated_results_are_within_rounding_of_float64(
    variant: str, out_dtype: torch.dtype, tokens: int, k: int, rotation: int
) -> None:
    a, w = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((tokens, 24), (24, k)))
    a_scale, a_outlier = 0.01 * torch.rand(tokens), torch.randn(tokens, 5)
    w_outlier, bias = torch.randn(5, k), torch.randn(k)
    result = cpu.int8_linear(
        a,
        w,
        transpose_w=True,
        activation_max=127,
        a_scale=a_scale,
        a_outlier=a_outlier,
        w_outlier=w_outlier,
        bias=bias,
        out_dtype=out_dtype,
        rotation=rotation,
        variant=variant,
    )
    product = numerics.rotate((a.double() @ w.double()) * a_scale.double().unsqueeze(1), rotation)
    exact = product + a_outlier.double() @ w_outlier.double() + bias.double()
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[out_dtype]
    assert (result.double() - exact).norm() < bound * exact.norm()


def test_what_is_too_large_for_float16_before_the_rotation_may_fit_after_it(variant: str) -> None:
    a, w = torch.tensor([[100]], dtype=torch.int8), torch.zeros(1, 64, dtype=torch.int8)
    w[0, 5] = 100
    options = {"transpose_w": True, "activation_max": 127, "rotation": 64, "variant": variant}
    result = cpu.int8_linear(a, w, a_scale=torch.tensor([20.0]), out_dtype=torch.float16, **options)
    assert torch.equal(result.abs(), torch.full((1, 64), 25_000.0, dtype=torch.float16))  # 200,000 / sqrt(64)


@pytest.mark.parametrize("rotation", [0, 3, 4, -2])
def test_a_rotation_that_does_not_divide_the_features_raises(rotation: int) -> None:
    message = re.escape(f"rotation: is {rotation}, expected a power of two that divides the 6 features")
    with pytest.raises(ShapeError, match=message):
        cpu.quantize_activation(torch.zeros(4, 6), torch.tensor([1]), torch.ones(1), 127, rotation)
    a, w = torch.zeros(2, 5, dtype=torch.int8), torch.zeros(5, 6, dtype=torch.int8)
    with pytest.raises(ShapeError, match=message):
        cpu.int8_linear(a, w, transpose_w=True, activation_max=127, out_dtype=torch.float32, rotation=rotation)


# --- other processors ----------------------------------------------------------------------------------------------
