"""Every custom op: what torch demands of it, its numbers, its gradient, and its shapes under fake tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quaff_fx import numerics, ops
from quaff_fx.errors import ShapeError
from quaff_fx.kernels import cpu, dispatch
from tests.data import dequantized_rows, integers, normal, planted_outliers, quaff_output, sqnr_db

Q = torch.ops.quaff
FLOATS = [torch.float32, torch.bfloat16]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=["compiled kernel", "plain torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that a CPU can take; without a compiler only the second is left."""
    name: str = request.param
    if name == "plain torch":
        monkeypatch.setattr(ops, "kernels_of", lambda _: dispatch._REFERENCE)
    elif (reason := cpu.reason_unavailable()) is not None:
        pytest.skip(f"no compiled kernel: {reason}")
    return name


class Layer:
    """A quantized linear with everything that the ops take, and the float weight it was made from."""

    def __init__(
        self, tokens: int = 5, in_features: int = 24, out_features: int = 10, outliers: int = 3, **options: Any
    ) -> None:
        dtype = options.get("dtype", torch.float32)
        self.channels = torch.tensor([7, 0, 13, 20][:outliers], dtype=torch.int64)
        self.x = planted_outliers(tokens, in_features, self.channels.tolist(), 30.0, seed=0, dtype=dtype)
        self.weight = normal(out_features, in_features, seed=1, std=0.1)
        self.rotation = options.get("rotation", 1)
        self.w_int8, self.w_scale = numerics.quantize_weight(self.weight, self.rotation)
        self.w_outlier = self.weight[:, self.channels].t().contiguous()
        self.w_absmax = self.weight[:, self.channels].abs().amax(dim=0)
        self.s = torch.tensor([4.0, 9.0, math.inf, 1.0][:outliers])
        self.bias = normal(out_features, seed=2, dtype=dtype) if options.get("bias", True) else None
        self.q = options.get("activation_max", 127)
        self.numbers = (self.q, self.rotation)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return numerics.quantize_activation(self.x, self.channels, self.s, *self.numbers)

    def linear_arguments(self, *parts: Tensor) -> tuple[Any, ...]:
        parts = parts or self.parts()
        return (self.x, *parts, self.w_int8, self.w_scale, self.w_outlier, self.bias, *self.numbers)

    def marker_arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        state = (self.channels, self.w_absmax, self.s, self.s.clone())
        return (self.w_int8, self.w_scale, self.w_outlier, *state, 0.1, self.q, True, dtype, self.rotation)


# --- opcheck -----------------------------------------------------------------------------------------------------

SHAPES = {
    "plain": {},
    "no outliers": {"outliers": 0},
    "empty batch": {"tokens": 0},
    "no bias": {"bias": False},
    "rotated": {"rotation": 8},
    "one token, odd sizes, 7 bits": {"tokens": 1, "in_features": 23, "out_features": 7, "activation_max": 63},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_opcheck_of_the_quantize_ops(options: dict[str, Any], dtype: torch.dtype) -> None:
    layer = Layer(dtype=dtype, **options)
    torch.library.opcheck(Q.quantize_rows.default, (layer.x, layer.channels, layer.s, *layer.numbers))
    torch.library.opcheck(Q.quantize_activation.default, (layer.x, layer.channels, layer.s, *layer.numbers))
    arguments = (layer.x, layer.channels, layer.w_absmax, layer.s, 0.1)
    torch.library.opcheck(Q.update_smoothing_scale.default, arguments)
    parts = layer.parts()
    layer.x.requires_grad_()
    if layer.bias is not None:
        layer.bias.requires_grad_()
    torch.library.opcheck(Q.linear.default, layer.linear_arguments(*parts))
    grad = normal(layer.x.shape[0], layer.w_int8.shape[0], seed=3, dtype=dtype)
    torch.library.opcheck(Q.linear_grad_input.default, (grad, layer.w_int8, layer.w_scale, *layer.numbers))


@pytest.mark.parametrize("out_dtype", [torch.int32, *FLOATS])
@pytest.mark.parametrize("transpose_w", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck_of_int8_linear(tokens: int, transpose_w: bool, out_dtype: torch.dtype) -> None:
    layer = Layer(tokens=tokens)
    a_int8 = integers(tokens, 10 if transpose_w else 24, seed=4)
    if out_dtype == torch.int32:
        epilogue: tuple[Tensor | None, ...] = (None,) * 5
    elif transpose_w:
        epilogue = (torch.rand(tokens), None, None, None, None)
    else:
        epilogue = (torch.rand(tokens), layer.w_scale, torch.rand(tokens, 3), layer.w_outlier, layer.bias)
    numbers = (127, 8 if transpose_w and out_dtype != torch.int32 else 1)
    torch.library.opcheck(Q.int8_linear.default, (a_int8, layer.w_int8, transpose_w, *epilogue, out_dtype, *numbers))


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_of_the_marker(dtype: torch.dtype) -> None:
    layer = Layer()
    torch.library.opcheck(Q.dequantize_weight.default, layer.marker_arguments(dtype))
    torch.library.opcheck(Q.dequantize_weight.default, Layer(outliers=0).marker_arguments(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [{}, {"tokens": 0}, {"bias": False}, {"rotation": 8}],
    ids=["plain", "empty batch", "no bias", "rotated"],
)
def test_opcheck_of_the_weight_only_linear(options: dict[str, Any], dtype: torch.dtype) -> None:
    layer = Layer(dtype=dtype, **options)
    x = layer.x.requires_grad_()
    bias = None if layer.bias is None else layer.bias.requires_grad_()
    torch.library.opcheck(Q.weight_only_linear.default, (x, layer.w_int8, layer.w_scale, bias, layer.rotation))


@pytest.mark.parametrize("rotation", [1, 8])
def test_the_weight_only_linear_has_the_gradients_of_the_dequantized_one_and_keeps_no_float_weight(
    rotation: int,
) -> None:
    layer = Layer(rotation=rotation)
    x, bias = layer.x.unsqueeze(0).requires_grad_(), layer.bias.requires_grad_()  # type: ignore[union-attr]
    saved: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, t.ndim)) or t, lambda t: t):
        y = Q.weight_only_linear.default(x, layer.w_int8, layer.w_scale, bias, layer.rotation)
    assert saved == [(torch.int8, 2), (torch.float32, 1)]
    weight = numerics.dequantize_rows(layer.w_int8, layer.w_scale, rotation)
    expected = torch.nn.functional.linear(x, weight, bias)
    dy = normal(*y.shape, seed=7)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, bias), dy), torch.autograd.grad(expected, (x, bias), dy), rtol=1e-5, atol=1e-5
    )


def test_a_weight_only_linear_refuses_an_x_that_does_not_fit() -> None:
    layer = Layer()
    with pytest.raises(ShapeError, match="x has 7 features, expected 24"), FakeTensorMode(allow_non_fake_inputs=True):
        Q.weight_only_linear.default(torch.empty(2, 7), layer.w_int8, layer.w_scale, None, 1)


def test_every_op_is_checked_above() -> None:
    """A new op must be added to the checks, then to this list."""
    assert {op.compute.__name__ for op in ops.OPS.values()} == {
        *("dequantize_weight", "weight_only_linear", "update_smoothing_scale"),
        *("quantize_activation", "quantize_rows", "linear", "linear_grad_input", "int8_linear"),
    }


@pytest.mark.parametrize("transform", [lambda x: x.t().contiguous().t(), lambda x: x[:, ::2], lambda x: x[:1]])
def test_fake_strides_are_the_real_ones_for_any_layout_of_x(
    transform: Callable[[Tensor], Tensor], implementation: str
) -> None:
    """Inductor trusts the strides of the fake implementation."""
    x = transform(planted_outliers(6, 24, [1], 9.0, seed=0))
    arguments = (x, torch.tensor([1]), torch.tensor([2.0]), 127, 1)
    real = Q.quantize_activation.default(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = Q.quantize_activation.default(mode.from_tensor(x), *arguments[1:])
    assert [t.stride() for t in fake] == [t.stride() for t in real]


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose_w", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("activation_max", [127, 63])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 1), (3, 17, 65), (0, 4, 8), (40, 96, 130)])
def test_int8_linear_adds_integers_exactly(
    tokens: int, n: int, k: int, activation_max: int, transpose_w: bool, implementation: str
) -> None:
    a = integers(tokens, n if transpose_w else k, seed=5, limit=activation_max)
    w = integers(n, k, seed=6)
    result = Q.int8_linear.default(a, w, transpose_w, None, None, None, None, None, torch.int32, activation_max, 1)
    exact = a.long() @ (w.long() if transpose_w else w.long().t())
    assert result.dtype == torch.int32
    torch.testing.assert_close(result.long(), exact, rtol=0, atol=0)


def test_int8_linear_is_exact_at_the_largest_sums(implementation: str) -> None:
    """127 · 127 · 65536 is over 2²⁹: float32 could not hold it, and saturating instructions would show."""
    k = 65536
    a, w = torch.full((2, k), 127, dtype=torch.int8), torch.full((3, k), 127, dtype=torch.int8)
    w[1], w[2, ::2] = -127, -126
    result = Q.int8_linear.default(a, w, False, None, None, None, None, None, torch.int32, 127, 1)
    expected = [127 * 127 * k, -127 * 127 * k, 127 * k // 2]
    assert result.tolist() == [expected, expected]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16])
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_linear_is_the_formula_in_float64(options: dict[str, Any], dtype: torch.dtype, implementation: str) -> None:
    """Integers are exact, so only the float32 epilogue and the result's dtype round: some ulps of the terms' size."""
    layer = Layer(dtype=dtype, **options)
    y = Q.linear.default(*layer.linear_arguments())
    assert y.dtype == dtype
    x_int8, x_scale, x_outlier = layer.parts()
    exact = quaff_output(x_int8, x_scale, x_outlier, layer.w_int8, layer.w_scale, layer.w_outlier)
    terms = exact.abs() + x_outlier.double().abs() @ layer.w_outlier.double().abs()
    if layer.bias is not None:
        exact = exact + layer.bias.double()
        terms = terms + layer.bias.double().abs()
    assert ((y.double() - exact).abs() <= 8 * 2**-24 * terms + HALF_ULP[dtype] * exact.abs() * 1.01).all()


def test_linear_keeps_leading_dimensions() -> None:
    layer = Layer(tokens=6)
    y = Q.linear.default(*layer.linear_arguments())
    layer_3d = Layer(tokens=6)
    layer_3d.x = layer.x.reshape(2, 3, 24)
    assert torch.equal(Q.linear.default(*layer_3d.linear_arguments(*layer.parts())), y.reshape(2, 3, 10))


def test_linear_of_an_x_that_does_not_fit_is_refused_while_tracing() -> None:
    layer = Layer()
    parts = layer.parts()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ShapeError, match="x has 25 features, expected 24"):
        Q.linear.default(torch.empty(5, 25), *parts, *layer.linear_arguments()[4:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_activation_is_the_formula_whatever_computes_it(dtype: torch.dtype, implementation: str) -> None:
    """A division may round a value that lies between two integers either way, so a step of 1 is allowed, rarely."""
    layer = Layer(tokens=64, dtype=dtype)
    x_int8, x_scale, x_outlier = Q.quantize_activation.default(layer.x, layer.channels, layer.s, 127, 1)
    smoothing = torch.ones(24, dtype=torch.float64)
    smoothing[layer.channels] = layer.s.double()
    x_hat = layer.x.double() / smoothing
    scale = x_hat.abs().amax(dim=1) / 127
    torch.testing.assert_close(x_scale.double(), scale, rtol=1e-6, atol=0)
    assert ((x_int8.double() - x_hat / scale.unsqueeze(1)).abs() <= 0.5 + 1e-4).all()
    outlier = layer.x.double()[:, layer.channels] * (1 - 1 / layer.s.double())
    torch.testing.assert_close(x_outlier.double(), outlier, rtol=1e-6, atol=0)


def test_dequantize_weight_is_the_reference() -> None:
    layer = Layer()
    expected = dequantized_rows(layer.w_int8, layer.w_scale)
    expected[:, layer.channels] = layer.weight[:, layer.channels].double()
    for dtype, ulp in HALF_ULP.items():
        result = Q.dequantize_weight.default(*layer.marker_arguments(dtype))
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=2 * ulp, atol=1e-7)


def test_update_smoothing_scale_is_the_formula_and_edits_nothing() -> None:
    layer = Layer(outliers=2)
    before = layer.s.clone()
    updated = Q.update_smoothing_scale.default(layer.x, layer.channels, layer.w_absmax, layer.s, 0.1)
    absmax = layer.x[:, layer.channels].double().abs().amax(dim=0)
    target = (absmax / layer.weight[:, layer.channels].double().abs().amax(dim=0)).sqrt().clamp(min=1)
    torch.testing.assert_close(updated.double(), 0.1 * before.double() + 0.9 * target, rtol=1e-6, atol=0)
    assert torch.equal(layer.s, before)


def test_update_smoothing_scale_of_an_empty_batch_is_a_copy_of_the_old_one() -> None:
    layer = Layer(tokens=0, outliers=2)
    updated = Q.update_smoothing_scale.default(layer.x, layer.channels, layer.w_absmax, layer.s, 0.1)
    assert torch.equal(updated, layer.s)
    assert updated.data_ptr() != layer.s.data_ptr()


# --- gradients ---------------------------------------------------------------------------------------------------


def gradients(layer: Layer, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    layer.x.requires_grad_()
    if layer.bias is not None:
        layer.bias.requires_grad_()
    parts = Q.quantize_activation.default(layer.x.detach(), layer.channels, layer.s, *layer.numbers)
    Q.linear.default(*layer.linear_arguments(*parts)).backward(grad_output)
    return layer.x.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_grad_input_is_dy_w_within_rounding(options: dict[str, Any], dtype: torch.dtype, implementation: str) -> None:
    """dx = g_scale (g_int8 w_int8): half a g_scale for each g, half a w_scale for each w, then the result's dtype."""
    layer = Layer(dtype=dtype, **options)
    grad_output = normal(layer.x.shape[0], layer.w_int8.shape[0], seed=7, dtype=dtype)
    grad_input, grad_bias = gradients(layer, grad_output)
    assert grad_input is not None
    assert grad_input.dtype == dtype
    assert grad_input.shape == layer.x.shape

    dy = grad_output.double()
    exact = dy @ layer.weight.double()
    g_scale = (dy * layer.w_scale.double()).abs().amax(dim=1, keepdim=True) / layer.q
    from_gradient = g_scale / 2 * layer.w_int8.double().abs().sum(dim=0)
    from_weight = dy.abs() @ layer.w_scale.double().unsqueeze(1) / 2
    bound = 1.001 * (from_gradient + from_weight) + HALF_ULP[dtype] * 1.01 * (exact.abs() + from_gradient)
    assert ((grad_input.double() - exact).abs() <= bound + 1e-30).all()
    if layer.bias is not None:
        assert grad_bias is not None
        torch.testing.assert_close(grad_bias, grad_output.sum(dim=0))


def test_grad_input_of_integers_is_exact() -> None:
    """With scales that are powers of two and integers that fit, nothing rounds at all."""
    g = integers(4, 6, seed=8, limit=127).float()
    g[:, 0] = 127
    w_int8, w_scale = integers(6, 9, seed=9), torch.full((6,), 0.5)
    grad_input = Q.linear_grad_input.default(g, w_int8, w_scale, 127, 1)
    torch.testing.assert_close(grad_input.double(), g.double() @ w_int8.double() * 0.5, rtol=2**-22, atol=0)


def test_nothing_but_x_and_bias_gets_a_gradient() -> None:
    layer = Layer()
    x_int8, *floats = layer.parts()
    inputs = [t.clone().requires_grad_() for t in (layer.x, *floats, layer.w_scale, layer.w_outlier, layer.bias)]
    x, x_scale, x_outlier, w_scale, w_outlier, bias = inputs
    y = Q.linear.default(x, x_int8, x_scale, x_outlier, layer.w_int8, w_scale, w_outlier, bias, 127, 1)
    found = torch.autograd.grad(y.sum(), inputs, allow_unused=True)
    assert [g is not None for g in found] == [True, False, False, False, False, True]


@pytest.mark.parametrize(("wants_x", "wants_bias"), [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_computed(wants_x: bool, wants_bias: bool) -> None:
    layer = Layer()
    assert layer.bias is not None
    arguments = layer.linear_arguments()
    layer.x.requires_grad_(wants_x)
    layer.bias.requires_grad_(wants_bias)
    y = Q.linear.default(*arguments)
    assert y.requires_grad == (wants_x or wants_bias)
    if y.requires_grad:
        y.sum().backward()
    assert (layer.x.grad is not None) == wants_x
    assert (layer.bias.grad is not None) == wants_bias


def test_backward_keeps_only_the_int8_weight_and_its_scale() -> None:
    """The activation is what costs memory; dx = dy W needs neither it nor the smoothing scale."""
    layer = Layer()
    arguments = layer.linear_arguments()
    layer.x.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Q.linear.default(*arguments)
    assert {t.data_ptr() for t in saved} == {layer.w_int8.data_ptr(), layer.w_scale.data_ptr()}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_tokens_stay_in_their_row_forward_and_backward(poison: float, implementation: str) -> None:
    def run(is_poisoned: bool) -> tuple[Tensor, Tensor]:
        layer = Layer(tokens=4)
        if is_poisoned:
            layer.x[2, 11] = poison
        grad_output = normal(4, 10, seed=7)
        if is_poisoned:
            grad_output[1, 3] = poison
        layer.x.requires_grad_()
        parts = Q.quantize_activation.default(layer.x.detach(), layer.channels, layer.s, 127, 1)
        y = Q.linear.default(*layer.linear_arguments(*parts))
        y.backward(grad_output)
        assert layer.x.grad is not None
        return y.detach(), layer.x.grad

    (clean_y, clean_grad), (y, grad) = run(False), run(True)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3]], clean_y[[0, 1, 3]])
    assert not grad[1].isfinite().any()
    assert torch.equal(grad[[0, 2, 3]], clean_grad[[0, 2, 3]])


def test_zero_tokens_give_the_bias_and_a_zero_gradient(implementation: str) -> None:
    layer = Layer(tokens=2)
    layer.x.zero_()
    grad_input, _ = gradients(layer, torch.zeros(2, 10))
    assert grad_input is not None
    assert torch.equal(grad_input, torch.zeros(2, 24))
    parts = Q.quantize_activation.default(layer.x.detach(), layer.channels, layer.s, 127, 1)
    y = Q.linear.default(*layer.linear_arguments(*parts))
    assert torch.equal(y.detach(), layer.bias.detach().expand(2, 10))  # type: ignore[union-attr]


# --- fake tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_results_have_the_shapes_and_dtypes_of_real_ones(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = Layer()
    layer.x = normal(*lead, 24, seed=0, dtype=dtype)
    grad = normal(*lead, 10, seed=0, dtype=dtype)
    state = (layer.w_int8, layer.w_scale)

    def results(x: Tensor, grad: Tensor) -> list[tuple[torch.Size, torch.dtype, tuple[int, ...]]]:
        parts = Q.quantize_activation.default(x, layer.channels, layer.s, 127, 1)
        y = Q.linear.default(x, *parts, *state, layer.w_outlier, None, 127, 1)
        grad_input = Q.linear_grad_input.default(grad, *state, 127, 1)
        s = Q.update_smoothing_scale.default(x, layer.channels, layer.w_absmax, layer.s, 0.1)
        tensors = [*parts, y, grad_input, s, Q.dequantize_weight.default(*layer.marker_arguments(dtype))]
        return [(t.shape, t.dtype, t.stride()) for t in tensors]

    real = results(layer.x, grad)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = results(mode.from_tensor(layer.x), mode.from_tensor(grad))
    assert fake == real


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_rotated_linear_and_its_gradient_are_the_linear_of_the_dequantized_weight(
    dtype: torch.dtype, implementation: str
) -> None:
    """The rotation cancels, forward and backward: what is left is the rounding of the activation."""
    layer = Layer(tokens=40, in_features=96, out_features=32, outliers=0, bias=False, dtype=dtype, rotation=32)
    x = layer.x.requires_grad_()
    y = Q.linear.default(
        x,
        *Q.quantize_activation.default(x.detach(), layer.channels, layer.s, *layer.numbers),
        *(
            layer.w_int8,
            layer.w_scale,
            layer.w_outlier,
            None,
            *layer.numbers,
        ),
    )
    weight = numerics.dequantize_rows(layer.w_int8, layer.w_scale, layer.rotation).double()
    dy = normal(*y.shape, seed=8, dtype=dtype)
    (grad_input,) = torch.autograd.grad(y, x, dy)
    # 8 bits over a row of 96 normal values: about 45 dB; bfloat16 results: 2^-9 of a value, 53 dB.
    assert sqnr_db(x.detach().double() @ weight.t(), y) > 40
    assert sqnr_db(dy.double() @ weight, grad_input) > 40


@pytest.mark.parametrize("activation_max", [127, 63])
def test_the_gradient_of_logits_is_near_that_in_float(activation_max: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2500, 64) + 1  # small values of the gradient count together
    grad = (2 * torch.randn(2, 5, 2500)).softmax(-1) - torch.nn.functional.one_hot(torch.randint(2500, (2, 5)), 2500)
    w_int8, w_scale = numerics.quantize_weight(weight, 64)
    found = Q.linear_grad_input.default(grad, w_int8, w_scale, activation_max, 64, 32)
    plain = Q.linear_grad_input.default(grad, w_int8, w_scale, activation_max, 64)
    expected = grad @ weight
    assert found.shape == (2, 5, 64)
    assert (found - expected).norm() < 0.2 * (plain - expected).norm()
    torch.library.opcheck(Q.linear_grad_input.default, (grad, w_int8, w_scale, activation_max, 64, 32))


@pytest.mark.parametrize("outliers", [0, 4])
def test_more_out_features_than_int32_sums_hold_are_multiplied_in_parts(
    monkeypatch: pytest.MonkeyPatch, outliers: int
) -> None:
    torch.manual_seed(0)
    w_int8, w_scale = numerics.quantize_weight(torch.randn(1000, 32), 32)
    grad = torch.randn(3, 1000)
    whole = Q.linear_grad_input.default(grad, w_int8, w_scale, 127, 32, outliers)
    monkeypatch.setattr(numerics, "INT32_MAX_REDUCTION", 300)
    torch.testing.assert_close(Q.linear_grad_input.default(grad, w_int8, w_scale, 127, 32, outliers), whole)


def test_as_many_kept_apart_as_there_are_out_features_are_refused() -> None:
    w_int8, w_scale = numerics.quantize_weight(torch.randn(8, 4))
    with pytest.raises(ShapeError, match="grad_outliers: is 8, expected fewer"):
        torch.ops.quaff.linear_grad_input(
            torch.randn(2, 8, device="meta"), w_int8.to("meta"), w_scale.to("meta"), 127, 1, 8
        )
