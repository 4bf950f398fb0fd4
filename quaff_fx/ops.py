"""The custom ops `quaff::*`: what a rewritten graph is made of.

A marker stands where a frozen weight is read; the other ops are what passes put in their place. Each op has a real
implementation, a fake one, and where it is differentiable a gradient; `decompositions.py` says what Inductor sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quaff_fx import numerics
from quaff_fx.errors import ShapeError
from quaff_fx.kernels import product

LIBRARY = torch.library.Library("quaff", "DEF")  # type: ignore[no-untyped-call]

_SCHEMAS = {
    # marker
    "dequantize_weight": (
        "(Tensor w_int8, Tensor w_scale, Tensor w_outlier, Tensor outlier_channels, Tensor outlier_w_absmax, "
        "Tensor smoothing_scale, Tensor next_smoothing_scale, float momentum, int activation_max, bool training, "
        "ScalarType dtype, int rotation) -> Tensor"
    ),
    # of weights whose outlier channels are not known yet
    "weight_only_linear": "(Tensor x, Tensor w_int8, Tensor w_scale, Tensor? bias, int rotation) -> Tensor",
    # quantize
    "update_smoothing_scale": (
        "(Tensor x, Tensor outlier_channels, Tensor outlier_w_absmax, Tensor smoothing_scale, float momentum) -> Tensor"
    ),
    "quantize_activation": (
        "(Tensor x, Tensor outlier_channels, Tensor smoothing_scale, int activation_max, int rotation) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "linear": (
        "(Tensor x, Tensor x_int8, Tensor x_scale, Tensor x_outlier, Tensor w_int8, Tensor w_scale, Tensor w_outlier, "
        "Tensor? bias, int activation_max, int rotation) -> Tensor"
    ),
    "linear_grad_input": (
        "(Tensor grad_output, Tensor w_int8, Tensor w_scale, int activation_max, int rotation) -> Tensor"
    ),
    # lower
    "quantize_rotated": (
        "(Tensor x, Tensor outlier_channels, Tensor smoothing_scale, int activation_max, int rotation) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "int8_linear": (
        "(Tensor a_int8, Tensor w_int8, bool transpose_w, Tensor? a_scale, Tensor? w_scale, Tensor? a_outlier, "
        "Tensor? w_outlier, Tensor? bias, ScalarType out_dtype, int activation_max, int rotation) -> Tensor"
    ),
}

STATIC_MOMENTUM = 1.0
"""A momentum that keeps the smoothing scale as it is: passes insert no update."""

IN_DIM_UNSEEN = -1
IN_DIM_CONFLICT = 2

# flexible_layout lets Inductor keep one int8 buffer where two products read the same quantized activation; with a fixed
# layout it makes one copy per consumer.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=_TAGS)  # type: ignore[no-untyped-call]


def tokens_of(x: Tensor) -> Tensor:
    """Returns x (..., K) as (T, K), one row per token."""
    return x.reshape(-1, x.shape[-1])


# --- marker ------------------------------------------------------------------------------------------------------


def _dequantize_weight(
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
) -> Tensor:
    return numerics.dequantize_weight(w_int8, w_scale, w_outlier, outlier_channels, rotation).to(dtype)


# --- float activations ---------------------------------------------------------------------------------------------


def _weight_only_linear(x: Tensor, w_int8: Tensor, w_scale: Tensor, bias: Tensor | None, rotation: int) -> Tensor:
    """The float weight exists in parts only, while they multiply: backward builds them anew."""
    x = numerics.rotate(x.float(), rotation).to(x.dtype)
    y = x.new_empty(*x.shape[:-1], w_int8.shape[0])
    for part in _parts(w_int8.shape[0], w_int8.shape[1]):
        weight = numerics.dequantize_rows(w_int8[part], w_scale[part]).to(x.dtype)
        y[..., part] = torch.nn.functional.linear(x, weight, None if bias is None else bias[part])
    return y


def _parts(rows: int, columns: int) -> list[slice]:
    """Slices of the rows of a matrix, each of about 2^18 elements.

    Not for speed: the C library's heap is cut up by temporary tensors as large as a weight, and keeps the pieces. With
    16 MiB weights a calibration step took as much memory as the float model.
    """
    count = max(1, 2**18 // max(1, columns))
    return [slice(start, min(start + count, rows)) for start in range(0, rows, count)]


def _save_for_weight_only_grad(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, w_int8, w_scale, _, rotation = inputs
    ctx.save_for_backward(w_int8, w_scale)
    ctx.rotation = rotation


def _weight_only_grad(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
    w_int8, w_scale = ctx.saved_tensors
    needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
    grad_input = grad_bias = None
    if needs_x:
        grad_input = grad_output.new_empty(*grad_output.shape[:-1], w_int8.shape[1])
        for part in _parts(w_int8.shape[1], w_int8.shape[0]):
            weight = numerics.dequantize_rows(w_int8[:, part], w_scale).to(grad_output.dtype)
            grad_input[..., part] = grad_output @ weight
        grad_input = numerics.rotate(grad_input.float(), ctx.rotation).to(grad_output.dtype)
    if needs_bias:
        grad_bias = tokens_of(grad_output).sum(dim=0)
    return grad_input, None, None, grad_bias, None


# --- quantize ----------------------------------------------------------------------------------------------------


def _int8_product(a_int8: Tensor, w_int8: Tensor, transpose_w: bool, *rest: Any) -> Tensor:
    """On a CPU the op, one kernel with its epilogue; elsewhere plain aten, whose epilogue Inductor fuses."""
    if a_int8.device.type == "cpu":
        return torch.ops.quaff.int8_linear.default(a_int8, w_int8, transpose_w, *rest)  # type: ignore[no-any-return]
    return _int8_linear(a_int8, w_int8, transpose_w, *rest)


def _update_smoothing_scale(
    x: Tensor, outlier_channels: Tensor, outlier_w_absmax: Tensor, smoothing_scale: Tensor, momentum: float
) -> Tensor:
    x = tokens_of(x)
    if x.shape[0] == 0:
        return smoothing_scale.clone()
    absmax = numerics.channel_absmax(x.index_select(1, outlier_channels))
    target = numerics.smoothing_target(absmax, outlier_w_absmax)
    return numerics.updated_smoothing_scale(smoothing_scale, target, momentum)


def _quantize_activation(
    x: Tensor, outlier_channels: Tensor, smoothing_scale: Tensor, activation_max: int, rotation: int
) -> tuple[Tensor, Tensor, Tensor]:
    return product.quantize_activation(tokens_of(x), outlier_channels, smoothing_scale, activation_max, rotation)


def _linear(
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
) -> Tensor:
    correction = (x_outlier, w_outlier.float())
    y = _int8_product(x_int8, w_int8, False, x_scale, w_scale, *correction, bias, x.dtype, activation_max, 1)
    # Not `reshape`: autograd forbids to edit the view that a custom op returns in place, as AdaLoRA does.
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], w_int8.shape[0]])  # type: ignore[no-any-return]


def _linear_grad_input(
    grad_output: Tensor, w_int8: Tensor, w_scale: Tensor, activation_max: int, rotation: int
) -> Tensor:
    g_int8, g_scale = numerics.quantize_gradient(tokens_of(grad_output), w_scale, activation_max)
    epilogue = (g_scale, None, None, None, None, grad_output.dtype)
    grad_input = _int8_product(g_int8, w_int8, True, *epilogue, activation_max, rotation)
    return grad_input.reshape(*grad_output.shape[:-1], w_int8.shape[1])


def _save_for_linear_grad(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, _, _, w_int8, w_scale, _, _, activation_max, rotation = inputs
    ctx.save_for_backward(w_int8, w_scale)
    ctx.numbers = (activation_max, rotation)


def _linear_grad(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
    w_int8, w_scale = ctx.saved_tensors
    needs_x, *_, needs_bias, _, _ = ctx.needs_input_grad
    grad_input = grad_bias = None
    if needs_x:
        grad_input = torch.ops.quaff.linear_grad_input.default(grad_output, w_int8, w_scale, *ctx.numbers)
    if needs_bias:
        grad_bias = tokens_of(grad_output).sum(dim=0)
    return grad_input, None, None, None, None, None, None, grad_bias, None, None


# --- lower -------------------------------------------------------------------------------------------------------


def _int8_linear(
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
) -> Tensor:
    return product.int8_linear(
        a_int8,
        w_int8,
        transpose_w=transpose_w,
        activation_max=activation_max,
        a_scale=a_scale,
        w_scale=w_scale,
        a_outlier=a_outlier,
        w_outlier=w_outlier,
        bias=bias,
        out_dtype=out_dtype,
        rotation=rotation,
    )


# --- fake implementations: shapes, dtypes and devices ---------------------------------------------------------------


def _fake_weight_only_linear(x: Tensor, w_int8: Tensor, w_scale: Tensor, bias: Tensor | None, rotation: int) -> Tensor:
    if x.shape[-1] != w_int8.shape[1]:
        raise ShapeError(
            f"quaff::weight_only_linear: x has {x.shape[-1]} features, expected {w_int8.shape[1]}, the in_features of "
            "its weight. Pass an activation that fits."
        )
    return x.new_empty(*x.shape[:-1], w_int8.shape[0])


def _fake_dequantize_weight(w_int8: Tensor, *state: object) -> Tensor:
    dtype = state[-2]
    assert isinstance(dtype, torch.dtype)
    return torch.empty_like(w_int8, dtype=dtype)


def _fake_update_smoothing_scale(
    x: Tensor, outlier_channels: Tensor, outlier_w_absmax: Tensor, smoothing_scale: Tensor, momentum: float
) -> Tensor:
    return torch.empty_like(smoothing_scale)


def _fake_quantize_activation(
    x: Tensor, outlier_channels: Tensor, smoothing_scale: Tensor, activation_max: int, rotation: int
) -> tuple[Tensor, Tensor, Tensor]:
    x = tokens_of(x)
    return (
        torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], outlier_channels.shape[0], dtype=torch.float32),
    )


def _fake_linear(
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
) -> Tensor:
    if x.shape[-1] != w_int8.shape[1]:
        raise ShapeError(
            f"quaff::linear: x has {x.shape[-1]} features, expected {w_int8.shape[1]}, the in_features of its weight. "
            "Pass an activation that fits."
        )
    return x.new_empty(*x.shape[:-1], w_int8.shape[0])


def _fake_linear_grad_input(
    grad_output: Tensor, w_int8: Tensor, w_scale: Tensor, activation_max: int, rotation: int
) -> Tensor:
    return grad_output.new_empty(*grad_output.shape[:-1], w_int8.shape[1])


def _fake_int8_linear(
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
) -> Tensor:
    return a_int8.new_empty(a_int8.shape[0], w_int8.shape[1 if transpose_w else 0], dtype=out_dtype)


for _name, _real, _fake in (
    ("dequantize_weight", _dequantize_weight, _fake_dequantize_weight),
    ("weight_only_linear", _weight_only_linear, _fake_weight_only_linear),
    ("update_smoothing_scale", _update_smoothing_scale, _fake_update_smoothing_scale),
    ("quantize_activation", _quantize_activation, _fake_quantize_activation),
    ("quantize_rotated", _quantize_activation, _fake_quantize_activation),
    ("linear", _linear, _fake_linear),
    ("linear_grad_input", _linear_grad_input, _fake_linear_grad_input),
    ("int8_linear", _int8_linear, _fake_int8_linear),
):
    LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"quaff::{_name}", _fake, lib=LIBRARY)

torch.library.register_autograd("quaff::linear", _linear_grad, setup_context=_save_for_linear_grad, lib=LIBRARY)
torch.library.register_autograd(
    "quaff::weight_only_linear", _weight_only_grad, setup_context=_save_for_weight_only_grad, lib=LIBRARY
)
