"""What eager code gets when it reads a quantized weight: products in int8, reads dequantized, edits refused."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quaff_fx.errors import WeightError


class LinearState(Protocol):
    """What an `Int8Weight` needs of a `weights.Int8State`."""

    in_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original parameter."""

    @property
    def device(self) -> torch.device:
        """Where the int8 values are."""

    def float_values(self) -> Tensor:
        """Returns the float weight in the layout of the original parameter."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x Wᵀ + bias through the int8 product."""

    def rows(self, indices: Tensor) -> Tensor:
        """Returns rows of the float weight (N, K), (..., K)."""


class Int8Weight(Tensor):
    """A quantized weight as eager code sees it; it has no float data until something needs them.

    Products that are a linear run in int8 (generation with a KV cache does not go through compiled blocks). Anything
    else sees the dequantized weight. Editing it would be lost, so every way of editing, through a view as well, raises
    `WeightError`: PEFT's ``merge`` does ``weight.data += delta``, which would change a temporary copy without an error.
    """

    _state: LinearState

    @staticmethod
    def __new__(cls, state: LinearState) -> Int8Weight:
        """Makes a view of `state`, in the layout of the original parameter."""
        view = Tensor._make_wrapper_subclass(cls, state.shape, dtype=state.dtype, device=state.device)
        view._state = state
        return view

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is Tensor.data:
            if func.__name__ == "__get__":  # what only reads the values may have them (the norm of DoRA)
                return _dequantized(args[0]).as_subclass(ReadOnlyView)
            raise _edit_error(args[0])
        if func is Tensor.__setitem__ and isinstance(args[0], cls):
            raise _edit_error(args[0])
        if (operands := _linear_operands(func, args, kwargs)) is not None:
            x, weight, bias = operands
            return weight._state.linear(_as_autocast_casts(x), bias)
        if func is nn.functional.embedding and (lookup := _lookup(*args, **kwargs)) is not None:
            indices, weight = lookup
            return weight._state.rows(indices)
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, value in _arguments(func, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for edited in pytree.tree_leaves(value):
                    if isinstance(edited, cls):
                        raise _edit_error(edited)
        args, kwargs = pytree.tree_map_only(cls, _dequantized, (args, kwargs))
        result = func(*args, **kwargs)
        return result.as_subclass(ReadOnlyView) if func.is_view and isinstance(result, Tensor) else result


class ReadOnlyView(Tensor):
    """A view of a dequantized weight: reads as a plain tensor; an edit would be lost and raises `WeightError`."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_edit = (name.endswith("_") and not name.endswith("__")) or name in _EDITING_OPERATORS
        if (is_edit and args and isinstance(args[0], cls)) or isinstance(kwargs.get("out"), cls):
            raise _edit_error(kwargs["out"] if "out" in kwargs else args[0])
        if getattr(func, "__self__", None) is Tensor.data and name == "__set__":
            raise _edit_error(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        # Nor can a view of it be edited.
        is_view = type(result) is Tensor and args and isinstance(args[0], cls) and _shares_memory(result, args[0])
        return result.as_subclass(cls) if is_view else result


def _shares_memory(left: Tensor, right: Tensor) -> bool:
    return not left.is_meta and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr() != 0


_EDITING_OPERATORS = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow"))}


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The arguments of a call to an op, each with its entry in the op's schema."""
    positional = zip(func._schema.arguments, args, strict=False)
    return [*positional, *((entry, kwargs[entry.name]) for entry in func._schema.arguments if entry.name in kwargs)]


def _dequantized(weight: Int8Weight) -> Tensor:
    return weight._state.float_values()


def product_operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, Tensor | None, int] | None:
    """Returns x, weight, bias of a product, and the dimension of the weight that it reduces over; None of all else."""
    if func is nn.functional.linear:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        return given["input"], given["weight"], given.get("bias"), 1
    if func in (torch.addmm, Tensor.addmm) and len(args) == 3 and not kwargs and args[0].ndim == 1:
        return args[1], args[2], args[0], 0
    if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm) and len(args) == 2 and not kwargs:
        return args[0], args[1], None, 0
    return None


def _linear_operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Int8Weight, Tensor | None] | None:
    """The operands of a product that is a linear over the weight's in-features, None of anything else."""
    if (operands := product_operands(func, args, kwargs)) is None:
        return None
    x, weight, bias, in_dim = operands
    is_linear = isinstance(weight, Int8Weight) and not isinstance(x, Int8Weight) and weight._state.in_dim == in_dim
    return (x, weight, bias) if is_linear else None


def _lookup(
    input: Tensor,  # noqa: A002  # torch's name
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Int8Weight] | None:
    """The indices and the table of an embedding; None if it edits the table. All else matters to trained ones only."""
    if not isinstance(weight, Int8Weight) or max_norm is not None or weight._state.in_dim != 1:
        return None
    return input, weight


def _as_autocast_casts(x: Tensor) -> Tensor:
    """Returns x in the dtype in which autocast would multiply it: as it is if there is no autocast, or in float64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _edit_error(weight: Tensor) -> WeightError:
    return WeightError(
        f"weight of shape {tuple(weight.shape)}: is int8 and rebuilt at each read, expected no code that edits it. "
        "Call quaff_fx.dequantize(model) first. Add an adapter that edits weights when it is added (PiSSA, OLoRA, "
        "LoftQ) before quaff_fx.compile."
    )
