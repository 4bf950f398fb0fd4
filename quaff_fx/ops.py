"""The custom ops `quaff::*`: what a rewritten graph is made of.

A marker stands where a frozen weight is read; the other ops are what passes put in their place. Each op is declared
once (`_op`): its function, whose signature is its schema, with the check of its operands, what fake tensors give, what
Inductor sees in its place, and where it is differentiable its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quaff_fx import numerics
from quaff_fx.errors import ShapeError
from quaff_fx.kernels.dispatch import kernels_of

LIBRARY = torch.library.Library("quaff", "DEF")  # type: ignore[no-untyped-call]

STATIC_MOMENTUM = 1.0
"""A momentum that keeps the smoothing scale as it is: passes insert no update."""

IN_DIM_UNSEEN = -1
IN_DIM_CONFLICT = 2


class Operands(SimpleNamespace):
    """The operands of a call, by the names in the schema of its op."""


def operands(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Operands:
    """Returns the operands of a call of `target`, any op of torch; what is not given has its default."""
    schema = target._schema.arguments
    defaults = {entry.name: entry.default_value for entry in schema if entry.has_default_value()}
    given = dict(zip((entry.name for entry in schema), args, strict=False))
    return Operands(**{**defaults, **given, **(kwargs or {})})


def arguments(target: Any, **operands: Any) -> tuple[Any, ...]:
    """Returns operands in the order of the schema of `target`, as a call takes them; defaults at the end are left out.

    Raises:
        TypeError: one is missing that has no default, or there is no operand of that name.
    """
    schema = target._schema.arguments
    missing = {entry.name for entry in schema if not entry.has_default_value()} - operands.keys()
    unknown = operands.keys() - {entry.name for entry in schema}
    if missing or unknown:
        raise TypeError(f"{target}: lacks {sorted(missing)} and has no {sorted(unknown)}, expected {target._schema}.")
    given = [operands.get(entry.name, entry.default_value) for entry in schema]
    is_needed = [
        not entry.has_default_value() or value is not entry.default_value
        for entry, value in zip(schema, given, strict=True)
    ]
    return tuple(given[: max((index for index, needed in enumerate(is_needed) if needed), default=-1) + 1])


@dataclass(frozen=True, eq=False)
class Op:
    """A custom op, as `_op` declares it.

    Attributes:
        target: what graphs call. compute: the function itself, which a fake tensor may go through as well.
        verify: raises `ShapeError` unless operands, real or fake, fit each other.
        lowered: what Inductor sees in its place; None where it stays one op.
    """

    target: Any
    compute: Callable[..., Any]
    verify: Callable[[Operands], None]
    lowered: Callable[..., Any] | None


OPS: dict[Any, Op] = {}
"""Every op, by what graphs call."""

# flexible_layout lets Inductor keep one int8 buffer where two products read the same quantized activation; with a fixed
# layout it makes one copy per consumer.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

_ITSELF = object()


def _op(
    *,
    fake: Callable[[Operands], Any],
    verify: Callable[[Operands], None],
    lowered: Any = None,
    gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Declares the op of a function: its name and signature are those of the op.

    Args:
        fake: empty tensors like the results. verify, lowered: as of `Op`; `_ITSELF` lowers to the function.
        gradient: what is saved for backward, and backward, as `torch.library.register_autograd` takes them.
    """

    def declare(compute: Callable[..., Any]) -> Op:
        name = compute.__name__
        schema = torch.library.infer_schema(compute, mutates_args=()).replace("SymInt", "int")
        LIBRARY.define(name + schema, tags=_TAGS)  # type: ignore[no-untyped-call]
        target = getattr(torch.ops.quaff, name).default

        def verified_fake(*args: Any) -> Any:
            given = operands(target, args)
            verify(given)
            return fake(given)

        LIBRARY.impl(name, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"quaff::{name}", verified_fake, lib=LIBRARY)
        if gradient is not None:
            save, backward = gradient
            torch.library.register_autograd(f"quaff::{name}", backward, setup_context=save, lib=LIBRARY)
        OPS[target] = op = Op(target, compute, verify, compute if lowered is _ITSELF else lowered)
        return op

    return declare


def tokens_of(x: Tensor) -> Tensor:
    """Returns x (..., K) as (T, K), one row per token."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


# --- verifiers: on real and fake operands, in what does not change with the number of tokens -------------------------


def _expect(is_met: bool, name: str, found: object, expected: object, way_out: str) -> None:
    if not is_met:
        raise ShapeError(f"{name}: is {found}, expected {expected}. {way_out}")


def _verify_tensor(o: Operands, name: str, dtype: torch.dtype | None, *shape: int | None) -> None:
    """Expects operand `name` to be a tensor of a dtype (None: floating) and shape (None: any size)."""
    tensor: Tensor = getattr(o, name)
    found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    is_dtype = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    is_shape = tensor.ndim == len(shape) and all(
        size is None or size == actual for size, actual in zip(shape, tensor.shape, strict=True)
    )
    _expect(is_dtype and is_shape, name, found, f"{dtype or 'floating'} of shape ({sizes})", "Pass one that fits.")


def _verify_weight(o: Operands) -> None:
    _verify_tensor(o, "w_int8", torch.int8, None, None)
    _verify_tensor(o, "w_scale", torch.float32, o.w_int8.shape[0])


def _verify_outliers(o: Operands) -> None:
    _verify_tensor(o, "outlier_channels", torch.int64, None)
    count = o.outlier_channels.shape[0]
    for name in ("outlier_w_absmax", "smoothing_scale", "next_smoothing_scale"):
        if hasattr(o, name):
            _verify_tensor(o, name, torch.float32, count)


def _verify_outlier_operand(o: Operands, name: str) -> None:
    """Expects the columns that the quantizer gave: those of the outlier channels, then zeros if it pads them."""
    operand: Tensor = getattr(o, name)
    _verify_tensor(o, name, None, None, None)
    count = o.w_outlier.shape[0]
    _expect(
        operand.shape[1] >= count, name, f"of {operand.shape[1]} columns", f"{count} or more", "Pass one that fits."
    )


def _verify_numbers(o: Operands, features: int) -> None:
    if hasattr(o, "activation_max"):
        _expect(o.activation_max in (63, 127), "activation_max", o.activation_max, "63 or 127", "Use one of these.")
    block = o.rotation
    is_block = block >= 1 and block & (block - 1) == 0 and features % block == 0
    divides = f"a power of two that divides {features} features"
    _expect(is_block, "rotation", block, divides, "Take numerics.rotation_block.")


def _verify_momentum(o: Operands) -> None:
    _expect(0 <= o.momentum <= 1, "momentum", o.momentum, "a share, 0 to 1", "Use one of these.")


def _verify_features(op: str, name: str, x: Tensor, features: int, of: str) -> None:
    if x.shape[-1] != features:
        raise ShapeError(
            f"quaff::{op}: {name} has {x.shape[-1]} features, expected {features}, the {of} of its weight. Pass an "
            "activation that fits."
        )


# --- marker ------------------------------------------------------------------------------------------------------


def _verify_dequantize_weight(o: Operands) -> None:
    _verify_weight(o)
    _verify_outliers(o)
    _verify_tensor(o, "w_outlier", None, o.outlier_channels.shape[0], o.w_int8.shape[0])
    _verify_numbers(o, o.w_int8.shape[1])
    _verify_momentum(o)


@_op(
    fake=lambda o: torch.empty_like(o.w_int8, dtype=o.dtype),
    verify=_verify_dequantize_weight,
    lowered=_ITSELF,
)
def dequantize_weight(
    w_int8: Tensor,
    w_scale: Tensor,
    w_outlier: Tensor,
    outlier_channels: Tensor,
    outlier_w_absmax: Tensor,
    smoothing_scale: Tensor,
    next_smoothing_scale: Tensor,
    momentum: float,
    activation_max: int,
    training: bool,
    dtype: torch.dtype,
    rotation: int,
    grad_outliers: int = 0,
) -> Tensor:
    """The marker: the float weight (N, K), with all that a pass needs to multiply by it in int8."""
    return numerics.dequantize_weight(w_int8, w_scale, w_outlier, outlier_channels, rotation).to(dtype)


# --- float activations ---------------------------------------------------------------------------------------------


def _parts(rows: int, columns: int) -> list[slice]:
    """Slices of the rows of a matrix, each of about 2^18 elements.

    Not for speed: the C library's heap is cut up by temporary tensors as large as a weight, and keeps the pieces. With
    16 MiB weights a calibration step took as much memory as the float model.
    """
    count = max(1, 2**18 // max(1, columns))
    return [slice(start, min(start + count, rows)) for start in range(0, rows, count)]


def _save_for_weight_only_grad(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    o = operands(weight_only_linear.target, inputs)
    ctx.save_for_backward(o.w_int8, o.w_scale)
    ctx.rotation = o.rotation


def _weight_only_grad(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
    w_int8, w_scale = ctx.saved_tensors
    needs = operands(weight_only_linear.target, ctx.needs_input_grad)
    grad_x = grad_bias = None
    if needs.x:
        grad_x = grad_output.new_empty(*grad_output.shape[:-1], w_int8.shape[1])
        for part in _parts(w_int8.shape[1], w_int8.shape[0]):
            weight = numerics.dequantize_rows(w_int8[:, part], w_scale).to(grad_output.dtype)
            grad_x[..., part] = grad_output @ weight
        grad_x = numerics.rotate(grad_x.float(), ctx.rotation).to(grad_output.dtype)
    if needs.bias:
        grad_bias = tokens_of(grad_output).sum(dim=0)
    nothing = dict.fromkeys(vars(needs))
    return arguments(weight_only_linear.target, **{**nothing, "x": grad_x, "bias": grad_bias})


def _verify_weight_only_linear(o: Operands) -> None:
    _verify_weight(o)
    _verify_features("weight_only_linear", "x", o.x, o.w_int8.shape[1], "in_features")
    _verify_numbers(o, o.w_int8.shape[1])


@_op(
    fake=lambda o: o.x.new_empty(*o.x.shape[:-1], o.w_int8.shape[0]),
    verify=_verify_weight_only_linear,
    gradient=(_save_for_weight_only_grad, _weight_only_grad),
)
def weight_only_linear(x: Tensor, w_int8: Tensor, w_scale: Tensor, bias: Tensor | None, rotation: int) -> Tensor:
    """X Wᵀ + bias of a weight whose outlier channels are not known yet, in float.

    The float weight exists in parts only, while they multiply: backward builds them anew.
    """
    x = numerics.rotate(x.float(), rotation).to(x.dtype)
    y = x.new_empty(*x.shape[:-1], w_int8.shape[0])
    for part in _parts(w_int8.shape[0], w_int8.shape[1]):
        weight = numerics.dequantize_rows(w_int8[part], w_scale[part]).to(x.dtype)
        y[..., part] = torch.nn.functional.linear(x, weight, None if bias is None else bias[part])
    return y


# --- quantize ----------------------------------------------------------------------------------------------------


def _verify_update(o: Operands) -> None:
    _verify_outliers(o)
    _verify_momentum(o)


@_op(fake=lambda o: torch.empty_like(o.smoothing_scale), verify=_verify_update, lowered=_ITSELF)
def update_smoothing_scale(
    x: Tensor, outlier_channels: Tensor, outlier_w_absmax: Tensor, smoothing_scale: Tensor, momentum: float
) -> Tensor:
    """The smoothing scale after a step that saw x (`numerics.updated_smoothing_scale`)."""
    x = tokens_of(x)
    if x.shape[0] == 0:
        return smoothing_scale.clone()
    absmax = numerics.channel_absmax(x.index_select(1, outlier_channels))
    target = numerics.smoothing_target(absmax, outlier_w_absmax)
    return numerics.updated_smoothing_scale(smoothing_scale, target, momentum)


def _verify_quantize_activation(o: Operands) -> None:
    _expect(o.x.is_floating_point() and o.x.ndim > 0, "x", o.x.dtype, "a floating activation (..., K)", "Pass one.")
    _verify_outliers(o)
    _verify_numbers(o, o.x.shape[-1])


def _fake_quantize_activation(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    x = tokens_of(o.x)
    dtype, columns = kernels_of(x.device).outlier_operand(x.dtype, o.outlier_channels.shape[0])
    return (
        torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], columns, dtype=dtype),
    )


def _lowered_quantize_activation(
    x: Tensor, outlier_channels: Tensor, smoothing_scale: Tensor, activation_max: int, rotation: int
) -> Any:
    kernels = kernels_of(x.device)
    owns = kernels.owns_quantizer or (rotation > 1 and kernels.owns_rotation)
    quantize = quantize_rows.target if owns else numerics.quantize_activation
    return quantize(tokens_of(x), outlier_channels, smoothing_scale, activation_max, rotation)


@_op(fake=_fake_quantize_activation, verify=_verify_quantize_activation, lowered=_lowered_quantize_activation)
def quantize_activation(
    x: Tensor, outlier_channels: Tensor, smoothing_scale: Tensor, activation_max: int, rotation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x_int8, x_scale and x_outlier of `numerics.quantize_activation`, of x as rows."""
    quantize = kernels_of(x.device).quantize_activation
    return quantize(tokens_of(x), outlier_channels, smoothing_scale, activation_max, rotation)


def _verify_linear(o: Operands) -> None:
    _verify_weight(o)
    n, k = o.w_int8.shape
    _verify_features("linear", "x", o.x, k, "in_features")
    _verify_tensor(o, "x_int8", torch.int8, None, k)
    _verify_tensor(o, "x_scale", torch.float32, None)
    _verify_outlier_operand(o, "x_outlier")
    _verify_tensor(o, "w_outlier", None, None, n)
    if o.bias is not None:
        _verify_tensor(o, "bias", None, n)
    _verify_numbers(o, k)


def _save_for_linear_grad(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    o = operands(linear.target, inputs)
    ctx.save_for_backward(o.w_int8, o.w_scale)
    ctx.numbers = (o.activation_max, o.rotation, o.grad_outliers)


def _linear_grad(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
    w_int8, w_scale = ctx.saved_tensors
    needs = operands(linear.target, ctx.needs_input_grad)
    grad_x = grad_bias = None
    if needs.x:
        grad_x = linear_grad_input.target(grad_output, w_int8, w_scale, *ctx.numbers)
    if needs.bias:
        grad_bias = tokens_of(grad_output).sum(dim=0)
    return arguments(linear.target, **{**dict.fromkeys(vars(needs)), "x": grad_x, "bias": grad_bias})


@_op(
    fake=lambda o: o.x.new_empty(*o.x.shape[:-1], o.w_int8.shape[0]),
    verify=_verify_linear,
    lowered=_ITSELF,
    gradient=(_save_for_linear_grad, _linear_grad),
)
def linear(
    x: Tensor,
    x_int8: Tensor,
    x_scale: Tensor,
    x_outlier: Tensor,
    w_int8: Tensor,
    w_scale: Tensor,
    w_outlier: Tensor,
    bias: Tensor | None,
    activation_max: int,
    rotation: int,
    grad_outliers: int = 0,
) -> Tensor:
    """X Wᵀ + bias from the quantized form of x; the gradient of x needs neither that form nor x."""
    y = _int8_product(
        a_int8=x_int8,
        w_int8=w_int8,
        transpose_w=False,
        a_scale=x_scale,
        w_scale=w_scale,
        a_outlier=x_outlier,
        w_outlier=w_outlier,
        bias=bias,
        out_dtype=x.dtype,
        activation_max=activation_max,
    )
    # Not `reshape`: autograd forbids to edit the view that a custom op returns in place, as AdaLoRA does.
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], w_int8.shape[0]])  # type: ignore[no-any-return]


def _verify_linear_grad_input(o: Operands) -> None:
    _verify_weight(o)
    _verify_features("linear_grad_input", "grad_output", o.grad_output, o.w_int8.shape[0], "out_features")
    _verify_numbers(o, o.w_int8.shape[1])
    is_count = 0 <= o.grad_outliers < max(1, o.w_int8.shape[0])
    _expect(is_count, "grad_outliers", o.grad_outliers, "fewer than the out_features", "Use fewer, or 0.")


@_op(
    fake=lambda o: o.grad_output.new_empty(*o.grad_output.shape[:-1], o.w_int8.shape[1]),
    verify=_verify_linear_grad_input,
    lowered=_ITSELF,
)
def linear_grad_input(
    grad_output: Tensor, w_int8: Tensor, w_scale: Tensor, activation_max: int, rotation: int, grad_outliers: int = 0
) -> Tensor:
    """The gradient of x from that of x Wᵀ, whose largest values are kept apart if it is that of logits."""
    dtype = grad_output.dtype
    if grad_outliers == 0:
        g_int8, g_scale = numerics.quantize_gradient(tokens_of(grad_output), w_scale, activation_max)
        grad_input = _grad_product(g_int8, g_scale, w_int8, activation_max, rotation, dtype)
    else:
        g_int8, g_scale, index, rest = numerics.quantize_gradient_of_logits(
            tokens_of(grad_output), w_scale, activation_max, grad_outliers
        )
        apart = (rest.unsqueeze(2) * w_int8[index]).sum(dim=1)
        product = _grad_product(g_int8, g_scale, w_int8, activation_max, rotation, torch.float32)
        grad_input = (product + numerics.rotate(apart, rotation)).to(dtype)
    return grad_input.reshape(*grad_output.shape[:-1], w_int8.shape[1])


def _grad_product(
    g_int8: Tensor, g_scale: Tensor, w_int8: Tensor, activation_max: int, rotation: int, dtype: torch.dtype
) -> Tensor:
    """Returns ``g_scale (g_int8 w_int8)`` rotated back, in parts that int32 sums can hold if N is too long for one."""
    parts = range(0, max(1, w_int8.shape[0]), numerics.INT32_MAX_REDUCTION)
    products = [
        _int8_product(
            a_int8=g_int8 if len(parts) == 1 else g_int8[:, rows].contiguous(),
            w_int8=w_int8 if len(parts) == 1 else w_int8[rows],
            transpose_w=True,
            a_scale=g_scale,
            out_dtype=dtype if len(parts) == 1 else torch.float32,
            activation_max=activation_max,
            rotation=rotation,
        )
        for rows in (slice(start, start + numerics.INT32_MAX_REDUCTION) for start in parts)
    ]
    return products[0] if len(parts) == 1 else sum(products[1:], products[0]).to(dtype)


# --- lower -------------------------------------------------------------------------------------------------------


def _int8_product(**given: Any) -> Tensor:
    """Where the kernel owns the epilogue the op, one node; elsewhere plain aten, whose epilogue Inductor fuses.

    What is not given of the epilogue is left out.
    """
    nothing = {"w_scale": None, "a_outlier": None, "w_outlier": None, "bias": None, "rotation": 1}
    call = int8_linear.target if kernels_of(given["a_int8"].device).owns_epilogue else int8_linear.compute
    return call(*arguments(int8_linear.target, **{**nothing, **given}))  # type: ignore[no-any-return]


@_op(fake=_fake_quantize_activation, verify=_verify_quantize_activation)
def quantize_rows(
    x: Tensor, outlier_channels: Tensor, smoothing_scale: Tensor, activation_max: int, rotation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_activation` as one op, where it is a kernel's."""
    return quantize_activation.compute(  # type: ignore[no-any-return]
        x, outlier_channels, smoothing_scale, activation_max, rotation
    )


def _verify_int8_linear(o: Operands) -> None:
    _verify_tensor(o, "w_int8", torch.int8, None, None)
    reduction, columns = o.w_int8.shape if o.transpose_w else reversed(o.w_int8.shape)
    _verify_tensor(o, "a_int8", torch.int8, None, reduction)
    if o.a_scale is not None:
        _verify_tensor(o, "a_scale", torch.float32, None)
    if o.w_scale is not None:
        _verify_tensor(o, "w_scale", torch.float32, columns)
    if o.bias is not None:
        _verify_tensor(o, "bias", None, columns)
    for term in ("outlier", "low_rank"):
        a, w = getattr(o, f"a_{term}"), getattr(o, f"w_{term}")
        names, way_out = f"a_{term} and w_{term}", "Pass both or neither."
        _expect((a is None) == (w is None), names, "one of them None", "both or neither", way_out)
        if w is not None:
            _verify_tensor(o, f"w_{term}", None, None, columns)
            _verify_tensor(o, f"a_{term}", None, None, None if term == "outlier" else w.shape[0])
    if o.w_outlier is not None:
        _verify_outlier_operand(o, "a_outlier")
    _verify_numbers(o, columns)


@_op(
    fake=lambda o: o.a_int8.new_empty(o.a_int8.shape[0], o.w_int8.shape[1 if o.transpose_w else 0], dtype=o.out_dtype),
    verify=_verify_int8_linear,
)
def int8_linear(
    a_int8: Tensor,
    w_int8: Tensor,
    transpose_w: bool,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    a_outlier: Tensor | None,
    w_outlier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation_max: int,
    rotation: int,
    a_low_rank: Tensor | None = None,
    w_low_rank: Tensor | None = None,
) -> Tensor:
    """`kernels.reference.int8_linear` on the device of its operands."""
    return kernels_of(a_int8.device).int8_linear(
        a_int8,
        w_int8,
        transpose_w=transpose_w,
        a_scale=a_scale,
        w_scale=w_scale,
        a_outlier=a_outlier,
        w_outlier=w_outlier,
        bias=bias,
        out_dtype=out_dtype,
        activation_max=activation_max,
        rotation=rotation,
        a_low_rank=a_low_rank,
        w_low_rank=w_low_rank,
    )
