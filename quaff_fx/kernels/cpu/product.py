"""The int8 product and the row quantizer for CPUs: checks operands and calls the compiled library (`build`)."""

from __future__ import annotations

import torch
from torch import Tensor

from quaff_fx.errors import ShapeError
from quaff_fx.kernels.cpu.build import DEFAULT_VARIANT, library
from quaff_fx.numerics import INT32_MAX_REDUCTION

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}  # quaff::Kind in int8_isa.h
_ACTIVATION_TOO_LARGE, _NO_MEMORY, _BAD_CHANNEL = 1, 2, 3  # quaff::Status in int8_gemm.cpp


def int8_linear(
    a_int8: Tensor,
    w_int8: Tensor,
    *,
    transpose_w: bool,
    activation_max: int,
    a_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    a_outlier: Tensor | None = None,
    w_outlier: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.int32,
    rotation: int = 1,
    a_low_rank: Tensor | None = None,
    w_low_rank: Tensor | None = None,
    variant: str = DEFAULT_VARIANT,
) -> Tensor:
    """Returns `reference.int8_linear` of CPU tensors, in the compiled kernel; operands and result are those there.

    The integers are added up exactly in int32; the rest happens in float32 before the result leaves the registers.

    Args:
        activation_max: a promise about `a_int8`. With 63 an AVX2 machine uses an instruction that would saturate with
            larger values.
        variant: a key of `build.VARIANTS`.

    Raises:
        ShapeError: a shape, dtype or device does not fit, the reduction is so long that int32 could overflow, or
            `a_int8` breaks the promise of ``activation_max=63``.
        RuntimeError: the library cannot be built (`reason_unavailable`), or no memory is left.
    """
    a_int8 = _checked("a_int8", a_int8, torch.int8, (None, None))
    w_int8 = _checked("w_int8", w_int8, torch.int8, (None, None))
    tokens, reduction = a_int8.shape
    w_reduction, columns = w_int8.shape if transpose_w else reversed(w_int8.shape)
    if w_reduction != reduction:
        raise ShapeError(
            f"a_int8: has {reduction} columns, expected {w_reduction} for a weight of shape "
            f"{tuple(w_int8.shape)} with transpose_w={transpose_w}. Pass operands that fit."
        )
    if reduction > INT32_MAX_REDUCTION:
        raise ShapeError(
            f"a_int8: has {reduction} columns, expected at most {INT32_MAX_REDUCTION}. "
            "An int32 accumulator could overflow; split the reduction."
        )
    _check_activation_max(activation_max)
    if out_dtype not in _KINDS:
        raise ShapeError(
            f"out_dtype: is {out_dtype}, expected float32, bfloat16, float16 or int32. Convert the result afterwards."
        )
    if (a_outlier is None) != (w_outlier is None):
        raise ShapeError("a_outlier: comes alone, expected together with w_outlier. Pass both or neither.")
    if a_low_rank is not None and w_low_rank is not None:
        # Lowered graphs come with both terms joined (`passes/join.py`).
        a_outlier = a_low_rank.float() if a_outlier is None else torch.cat([a_outlier, a_low_rank.float()], dim=1)
        w_outlier = w_low_rank.float() if w_outlier is None else torch.cat([w_outlier, w_low_rank.float()])
    extras = (a_scale, w_scale, a_outlier, w_outlier, bias)
    _check_rotation(rotation, columns)
    if out_dtype == torch.int32 and (rotation > 1 or any(extra is not None for extra in extras)):
        raise ShapeError(
            "out_dtype: is torch.int32 with scales, outliers, a bias or a rotation, expected a floating dtype. "
            "Integer results are bare accumulators; leave the rest out."
        )
    outliers = 0 if a_outlier is None else a_outlier.shape[-1]
    # Names keep what the pointers point to alive.
    a_scale = None if a_scale is None else _checked("a_scale", a_scale, torch.float32, (tokens,))
    w_scale = None if w_scale is None else _checked("w_scale", w_scale, torch.float32, (columns,))
    a_outlier = _as_float32(a_outlier)
    a_outlier = None if a_outlier is None else _checked("a_outlier", a_outlier, torch.float32, (tokens, outliers))
    w_outlier = _as_float32(w_outlier)
    w_outlier = None if w_outlier is None else _checked("w_outlier", w_outlier, torch.float32, (outliers, columns))
    bias = _as_float32(bias)
    bias = None if bias is None else _checked("bias", bias, torch.float32, (columns,))

    out = torch.empty(tokens, columns, dtype=out_dtype, device="cpu")
    status = library(variant).quaff_int8_linear(
        _address("a_int8", a_int8),
        _address("w_int8", w_int8),
        tokens,
        reduction,
        columns,
        transpose_w,
        activation_max,
        _address("a_scale", a_scale),
        _address("w_scale", w_scale),
        _address("a_outlier", a_outlier),
        _address("w_outlier", w_outlier),
        outliers,
        _address("bias", bias),
        _address("out", out),
        _KINDS[out_dtype],
        rotation,
        torch.get_num_threads(),
    )
    if status == _ACTIVATION_TOO_LARGE:
        raise ShapeError(
            "a_int8: has absolute values over 63, expected at most activation_max=63. "
            "Quantize and multiply with the same activation_max."
        )
    _raise_for(status)
    return out


def quantize_activation(
    x: Tensor,
    outlier_channels: Tensor,
    smoothing_scale: Tensor,
    activation_max: int,
    rotation: int,
    *,
    variant: str = DEFAULT_VARIANT,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the smoothed and rotated activation in int8, its scale per token, and the operand of the correction.

    ``x̂ = rotated(x / s)`` with s_i = 1 outside the outlier channels, ``x_scale = absmax of the row of x̂ / Q``,
    ``x_int8 = round(x̂ Q / absmax)``, half to even, and ``x_outlier = x̂_O (s_O - 1) = x_O (1 - 1 / s_O)``. All of it is,
    bit for bit, what `numerics.quantize_activation` gives, rows of zeros, subnormal and non-finite ones too.

    Args:
        x: (T, K) float32, bfloat16 or float16, rows at any distance from each other.
        outlier_channels: (O,) int64, distinct, in [0, K). smoothing_scale: (O,) float32, at least 1;
            infinity takes a channel out of the int8 product.
        activation_max: Q, 127 or 63. rotation: B of `numerics.rotate`, a power of two that divides K; 1 is none.
        variant: a key of `VARIANTS`.

    Returns:
        x_int8 (T, K) int8 in ±Q; x_scale (T,) float32; x_outlier (T, O) float32.

    Raises:
        ShapeError: a shape, dtype or device does not fit, or a channel is out of range.
        RuntimeError: the library cannot be built (`reason_unavailable`), or no memory is left.
    """
    channels = _checked("outlier_channels", outlier_channels, torch.int64, (None,))
    smoothing = _checked("smoothing_scale", smoothing_scale, torch.float32, tuple(channels.shape))
    if x.dtype not in _KINDS or x.dtype == torch.int32:
        raise ShapeError(f"x: is {x.dtype}, expected float32, bfloat16 or float16. Convert it first.")
    if not (x.ndim == 2 and x.is_cpu and x.layout == torch.strided):
        raise _misfit("x", x, x.dtype, (None, None))
    _check_activation_max(activation_max)
    tokens, width = x.shape
    _check_rotation(rotation, width)
    x = x.resolve_neg()
    if x.stride(1) != 1:
        x = x.contiguous()
    outliers = channels.shape[0]
    x_int8 = torch.empty(tokens, width, dtype=torch.int8, device="cpu")
    x_scale = torch.empty(tokens, dtype=torch.float32, device="cpu")
    x_outlier = torch.empty(tokens, outliers, dtype=torch.float32, device="cpu")
    status = library(variant).quaff_quantize_rows(
        _address("x", x),
        _KINDS[x.dtype],
        tokens,
        width,
        x.stride(0),
        _address("outlier_channels", channels),
        _address("smoothing_scale", smoothing),
        outliers,
        activation_max,
        rotation,
        _address("x_int8", x_int8),
        _address("x_scale", x_scale),
        _address("x_outlier", x_outlier),
        torch.get_num_threads(),
    )
    if status == _BAD_CHANNEL:
        raise ShapeError(
            f"outlier_channels: has an index outside the {width} columns of x, expected 0 to {width - 1}. "
            "Pass channels of this activation."
        )
    _raise_for(status)
    return x_int8, x_scale, x_outlier


def _as_float32(tensor: Tensor | None) -> Tensor | None:
    return tensor.float() if tensor is not None and tensor.is_floating_point() else tensor


def _checked(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    """Returns a tensor made contiguous; raises unless it is a dense CPU tensor of `dtype` and `shape`, None is any."""
    is_shape = tensor.shape == shape if None not in shape else _fits(tensor, shape)
    if not (is_shape and tensor.dtype == dtype and tensor.is_cpu and tensor.layout == torch.strided):
        raise _misfit(name, tensor, dtype, shape)
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()


def _address(name: str, tensor: Tensor | None) -> int | None:
    """Returns where a tensor's values lie, None for None; raises unless its memory holds all of them.

    A tensor may have a CPU device, a shape and a dtype, and no memory: a fake one, one that `torch.func` wraps, one of
    a wrapper subclass, a parameter whose storage FSDP has freed.
    """
    if tensor is None:
        return None
    try:
        address, held = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    except RuntimeError:  # a NotImplementedError is one
        address, held = 0, 0
    extent = tensor.numel()
    if extent == 0:
        return address
    if not tensor.is_contiguous():
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + extent) * tensor.itemsize
    if address == 0 or held < needed:
        raise ShapeError(
            f"{name}: is a {type(tensor).__name__} of shape {tuple(tensor.shape)} with {held} bytes of memory, "
            f"expected at least {needed}. Pass a plain tensor that holds its values."
        )
    return address


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    return tensor.ndim == len(shape) and all(s is None or s == t for s, t in zip(shape, tensor.shape, strict=True))


def _misfit(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> ShapeError:
    if not tensor.is_cpu or tensor.layout != torch.strided:
        return ShapeError(f"{name}: is {tensor.layout} on {tensor.device}, expected a dense CPU tensor. Move it first.")
    if tensor.dtype != dtype:
        return ShapeError(f"{name}: is {tensor.dtype}, expected {dtype}. Convert it first.")
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    return ShapeError(f"{name}: has shape {tuple(tensor.shape)}, expected ({wanted}). Pass a tensor that fits.")


def _check_activation_max(activation_max: int) -> None:
    if activation_max not in (63, 127):
        raise ShapeError(f"activation_max: is {activation_max}, expected 127 or 63. Use one of these.")


def _check_rotation(rotation: int, features: int) -> None:
    if rotation < 1 or rotation & (rotation - 1) or features % rotation or rotation > max(1, features):
        raise ShapeError(
            f"rotation: is {rotation}, expected a power of two that divides the {features} features. "
            "Take numerics.rotation_block."
        )


def _raise_for(status: int) -> None:
    if status == _NO_MEMORY:
        raise RuntimeError("int8 product: no memory for packed operands, expected a few MiB. Free some memory.")
    assert status == 0, status
