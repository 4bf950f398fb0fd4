"""What stands in the place of a frozen weight that is int8: loaded so, or quantized.

A module that owns an int8 weight keeps its place in the model, its name and its class as a base class. Reading the
weight calls the state's `read`, which emits a marker op with all the state as arguments (`docs/architecture.md`).
One class per kind of base module is shared by all instances, so that layers share compiled graphs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quaff_fx import numerics, ops
from quaff_fx.errors import WeightError
from quaff_fx.int8_weight import Int8Weight
from quaff_fx.stored_tensor import StoredTensor

SLOT_PREFIX = "quaff_"
"""The state of parameter `weight` is the submodule `quaff_weight`."""


class _KeepsFloat32(nn.Module):
    """A module whose float32 tensors stay float32 under `.half()`, `.to(torch.bfloat16)` and the like."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


class LoadedWeight(_KeepsFloat32):
    """A frozen weight that was made int8 while it was loaded, until its outlier channels are known.

    Attributes:
        w_int8: (N, K) int8. w_scale: (N,) float32.
        in_dim: the dimension of the original parameter that the product reduces over: 1 for `nn.Linear`, 0 for Conv1D.
        rotation: the block B that `w_int8` is rotated with, along K (`numerics.rotate`).
        dtype: of the original parameter; follows `.to(dtype)`. loaded_dtype: what its values were rounded to.
        source: where its float columns can be read again.
    """

    def __init__(
        self,
        w_int8: Tensor,
        w_scale: Tensor,
        in_dim: int,
        rotation: int,
        dtype: torch.dtype,
        source: StoredTensor,
    ) -> None:
        super().__init__()
        self.w_int8 = nn.Parameter(w_int8, requires_grad=False)
        self.w_scale = nn.Parameter(w_scale, requires_grad=False)
        self.in_dim = in_dim
        self.rotation = rotation
        self.dtype = self.loaded_dtype = dtype
        self.source = source

    def read(self) -> Tensor:
        """Returns the weight in the layout of the original parameter: an `Int8Weight`, or operations while traced."""
        if not torch.compiler.is_dynamo_compiling():  # unlike `is_compiling`, not while another thread compiles
            return Int8Weight(self)
        weight = self.dequantized()
        return weight.t() if self.in_dim == 0 else weight

    def dequantized(self) -> Tensor:
        """Returns the float weight (N, K)."""
        return numerics.dequantize_rows(self.w_int8, self.w_scale, self.rotation).to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x Wᵀ + bias, differentiable, with x in float: its outlier channels are not known yet."""
        y: Tensor = torch.ops.quaff.weight_only_linear.default(x, self.w_int8, self.w_scale, bias, self.rotation)
        return y

    def columns(self, channels: Tensor) -> Tensor:
        """Returns the float columns (N, O) from the file.

        Raises:
            CheckpointError: the file cannot be read or is not the one of before.
        """
        return self.source.columns(channels, self.in_dim, self.loaded_dtype)

    def weight_bytes(self) -> int:
        """Bytes of the weight and its scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.w_int8, self.w_scale))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.w_int8.device)).dtype
        return super()._apply(fn, recurse)


class OutlierState(_KeepsFloat32):
    """The outlier channels of an activation and their smoothing scale, shared by the sites that read it.

    Attributes:
        outlier_channels: (O,) int64. outlier_w_absmax: (O,) float32, absmax of those weight columns.
        smoothing_scale: (O,) float32, what the graph reads; infinite where the channels are computed in float alone.
        next_smoothing_scale: (O,), what the graph writes; `commit` copies one to the other between steps, so a
            replayed forward reads what the first one read.
        momentum: γ; with `ops.STATIC_MOMENTUM` the graph writes nothing.
    """

    outlier_channels: Tensor
    outlier_w_absmax: Tensor
    smoothing_scale: Tensor
    next_smoothing_scale: Tensor

    def __init__(
        self, outlier_channels: Tensor, outlier_w_absmax: Tensor, smoothing_scale: Tensor, momentum: float
    ) -> None:
        super().__init__()
        self.register_buffer("outlier_channels", outlier_channels)
        self.register_buffer("outlier_w_absmax", outlier_w_absmax)
        self.register_buffer("smoothing_scale", smoothing_scale)
        self.register_buffer("next_smoothing_scale", smoothing_scale.clone())
        self.momentum = momentum

    def write_next(self, smoothing_scale: Tensor) -> None:
        """Keeps what a training forward wrote outside any graph."""
        if self.next_smoothing_scale.is_inference():  # a copy that was made in inference mode
            self.next_smoothing_scale = smoothing_scale
        else:
            self.next_smoothing_scale.copy_(smoothing_scale)

    def commit(self) -> None:
        """Makes the smoothing scale that the last training forward wrote the one that the next forward reads."""
        self.smoothing_scale.copy_(self.next_smoothing_scale)


class QuantizedWeight(_KeepsFloat32):
    """A frozen weight in int8, its scales, its outlier columns, and the state of the activation it multiplies.

    Attributes:
        w_int8: (N, K) int8. w_scale: (N,) float32. w_outlier: (O, N), row j is column ``outlier_channels[j]``, in 16
            bits (`numerics.outlier_rows`).
        outliers: the `OutlierState` of its activation.
        in_dim: the dimension of the original parameter that the product reduces over: 1 for `nn.Linear`, 0 for Conv1D.
        rotation: the block B that `w_int8` and the activation are rotated with, along K (`numerics.rotate`).
        activation_max: Q, 127 or 63. dtype: of the original parameter; follows `.to(dtype)`.
    """

    def __init__(self, weight: Tensor, in_dim: int, outliers: OutlierState, activation_max: int, rotation: int) -> None:
        matrix = weight.detach() if in_dim == 1 else weight.detach().t()
        columns = matrix.index_select(1, outliers.outlier_channels)
        parts = numerics.quantize_weight(matrix, rotation)
        w_int8, w_scale = (nn.Parameter(part, requires_grad=False) for part in parts)
        self._fill(w_int8, w_scale, columns, in_dim, outliers, activation_max, rotation, weight.dtype)

    @classmethod
    def of_loaded(
        cls, loaded: LoadedWeight, columns: Tensor, outliers: OutlierState, activation_max: int
    ) -> QuantizedWeight:
        """Returns what `loaded` becomes, its int8 values reused, with the outlier columns (N, O) in float."""
        quantized = cls.__new__(cls)
        numbers = (activation_max, loaded.rotation, loaded.dtype)
        quantized._fill(loaded.w_int8, loaded.w_scale, columns, loaded.in_dim, outliers, *numbers)
        return quantized

    def _fill(
        self,
        w_int8: nn.Parameter,
        w_scale: nn.Parameter,
        columns: Tensor,
        in_dim: int,
        outliers: OutlierState,
        activation_max: int,
        rotation: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.w_int8 = w_int8
        self.w_scale = w_scale
        self.w_outlier = nn.Parameter(numerics.outlier_rows(columns), requires_grad=False)
        self.outliers = outliers
        self.in_dim = in_dim
        self.activation_max = activation_max
        self.rotation = rotation
        self.dtype = dtype
        self.remember_values()

    def remember_values(self) -> None:
        """Takes the values as they are for the right ones, by which `reason_unusable` tells an edit later."""
        self._version = self._current_version()
        self._sums = self._current_sums()

    def reason_unusable(self) -> str:
        """Why the weight must not be multiplied: it was edited, or a part of it is to be trained; empty if neither.

        An average of weights edits all parameters alike, and rounds int8 values towards zero while it does.
        """
        # Not as attributes, which cost ten times as much: every weight is asked before every forward.
        parts = self._parameters
        if parts["w_scale"].requires_grad or parts["w_outlier"].requires_grad:  # type: ignore[union-attr]
            return "is to be trained (requires_grad)"
        if self._version != (version := self._current_version()) and type(self.w_int8) is nn.Parameter:
            if self._current_sums() != self._sums:
                return "was edited in place"
            self._version = version  # the same values were written: DDP does so, and loading a state
        return ""

    def _current_version(self) -> int:
        """Grows with every edit in place. Of weights that FSDP2 sharded it says nothing: no rank sees them whole."""
        try:
            return sum(part._version for part in self._parameters.values() if part is not None)
        except RuntimeError:  # inference tensors, of a copy that was made in inference mode: they count none
            return 0

    @torch.no_grad()
    def _current_sums(self) -> list[int]:
        parts = (self.w_int8, self.w_scale.view(torch.int32), self.w_outlier.view(torch.int16))
        return [int(part.sum(dtype=torch.int64)) for part in parts]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.remember_values()

    def __setstate__(self, values: dict[str, Any]) -> None:
        super().__setstate__(values)  # type: ignore[no-untyped-call]
        self._version = -1  # a copy counts its own, from zero: an edit of before would look like none

    def read(self) -> Tensor:
        """Returns the weight in the layout of the original parameter: a marker while traced, else an `Int8Weight`."""
        if not torch.compiler.is_dynamo_compiling():  # unlike `is_compiling`, not while another thread compiles
            return Int8Weight(self)
        weight = self.dequantized()
        return weight.t() if self.in_dim == 0 else weight

    def dequantized(self) -> Tensor:
        """Returns the marker: the float weight (N, K) rebuilt, with all state of its activation as arguments."""
        outliers = self.outliers
        weight: Tensor = torch.ops.quaff.dequantize_weight.default(
            self.w_int8,
            self.w_scale,
            self.w_outlier,
            outliers.outlier_channels,
            outliers.outlier_w_absmax,
            outliers.smoothing_scale,
            outliers.next_smoothing_scale,
            outliers.momentum,
            self.activation_max,
            self.training,
            self.dtype,
            self.rotation,
        )
        return weight

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x Wᵀ + bias through the int8 product, differentiable; in training writes the next smoothing scale."""
        outliers, numbers = self.outliers, (self.activation_max, self.rotation)
        channels, s = outliers.outlier_channels, outliers.smoothing_scale
        if self.training and outliers.momentum != ops.STATIC_MOMENTUM:
            state = (channels, outliers.outlier_w_absmax, s, outliers.momentum)
            with torch.no_grad():
                updated = torch.ops.quaff.update_smoothing_scale.default(x.detach(), *state)
                outliers.write_next(updated)
        parts = torch.ops.quaff.quantize_activation.default(x.detach(), channels, s, *numbers)
        y: Tensor = torch.ops.quaff.linear.default(x, *parts, self.w_int8, self.w_scale, self.w_outlier, bias, *numbers)
        return y

    def weight_bytes(self) -> int:
        """Bytes of everything kept for this weight; state shared with other sites counts in each."""
        tensors = [*self.parameters(), *self.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.w_int8.device)).dtype
        return super()._apply(fn, recurse)


WeightState = LoadedWeight | QuantizedWeight

_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]] = {}

RUN = "_quaff_run"
"""A block runs its forward through the function that it has under this name, ``(block, args, kwargs)``."""


def _class_of(base: type[nn.Module], names: tuple[str, ...], is_block: bool) -> type[nn.Module]:
    """Returns the class of modules like `base` whose parameters `names` are int8, or that are compiled blocks."""
    if (base, names, is_block) in _CLASSES:
        return _CLASSES[base, names, is_block]

    def reader(name: str) -> property:
        def read(module: nn.Module) -> Tensor:
            return module._modules[SLOT_PREFIX + name].read()  # type: ignore[union-attr,operator,no-any-return]

        return property(read)

    def reduce(module: nn.Module, protocol: object) -> tuple[Any, ...]:
        kept = {name: value for name, value in module.__getstate__().items() if name != RUN}  # type: ignore[no-untyped-call]
        return _rebuild, (base, names, is_block), kept

    body: dict[str, Any] = {
        **{name: reader(name) for name in names},
        "quaff_base": base,
        "quaff_names": names,
        "quaff_is_block": is_block,
        "__reduce_ex__": reduce,
        "__module__": __name__,
        "__doc__": base.__doc__,
    }
    if names:

        def assign(module: nn.Module, name: str, value: Any) -> None:
            if name in names and not _is_own_weight(module, name, value):
                raise WeightError(
                    f"{name} of {base.__name__}: is int8, expected no other tensor in its place. Call "
                    "quaff_fx.dequantize(model) first."
                )
            if name not in names:
                base.__setattr__(module, name, value)

        def load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            base._load_from_state_dict(module, state_dict, prefix, *rest)
            for name in names:
                if prefix + name in state_dict:
                    rest[-1].append(  # the errors, which `load_state_dict` raises whatever ``strict`` says
                        f"{prefix}{name}: is a float weight for one that is int8, expected the int8 one. Call "
                        "quaff_fx.dequantize(model) before loading, or load before quaff_fx.compile."
                    )

        body |= {"__setattr__": assign, "_load_from_state_dict": load}
    if is_block:
        forward = base.forward

        @functools.wraps(forward)
        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            through = module.__dict__.get(RUN)
            return forward(module, *args, **kwargs) if through is None else through(module, args, kwargs)

        # Looked at by name: accelerate's and FSDP's policies, the list of classes in a saved config.
        body |= {
            "forward": run,
            "quaff_forward": forward,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
        }
    made = type(base.__name__ if is_block else f"Quaff{base.__name__}", (base,), body)
    _CLASSES[base, names, is_block] = made
    return made


def _rebuild(base: type[nn.Module], names: tuple[str, ...], is_block: bool) -> nn.Module:
    cls = _class_of(base, names, is_block)
    return cls.__new__(cls)


def base_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module had before this package gave it one."""
    return getattr(type(module), "quaff_base", type(module))


def _is_own_weight(module: nn.Module, name: str, value: object) -> bool:
    """Tells whether `value` is what reading the weight gave: PEFT assigns it back when it unloads an adapter."""
    state: object = module._modules[SLOT_PREFIX + name]
    return isinstance(value, Int8Weight) and value._state is state


def states_of(module: nn.Module) -> dict[str, WeightState]:
    """Returns the state of each int8 weight that `module` owns, by parameter name."""
    names = getattr(type(module), "quaff_names", ())
    return {name: module._modules[SLOT_PREFIX + name] for name in names}  # type: ignore[misc]


def _set_class(module: nn.Module, names: tuple[str, ...], is_block: bool) -> None:
    base = base_class(module)
    # Past `__setattr__` of the module's class, which may be anyone's.
    object.__setattr__(module, "__class__", _class_of(base, names, is_block) if names or is_block else base)


def set_block(module: nn.Module, is_block: bool) -> None:
    """Makes `module` a block, whose forward runs through its `RUN`, or none any more."""
    _set_class(module, getattr(type(module), "quaff_names", ()), is_block)


def attach(module: nn.Module, states: dict[str, WeightState], **weights: nn.Parameter) -> None:
    """Gives `module` exactly these states, by parameter name, and these float weights in the place of former ones.

    Without a state it gets its own class back. Whatever interrupts it, the module is as it was or as it is to be.
    """
    cls, modules, parameters = type(module), dict(module._modules), dict(module._parameters)
    try:
        for name in states_of(module):
            if name not in states:
                del module._modules[SLOT_PREFIX + name]
        _set_class(module, tuple(sorted(states)), getattr(cls, "quaff_is_block", False))
        for name, state in states.items():
            module._modules[SLOT_PREFIX + name] = state.train(module.training)
            module._parameters.pop(name, None)
        module._parameters.update(weights)
    except BaseException:
        object.__setattr__(module, "__class__", cls)
        for here, before in ((module._modules, modules), (module._parameters, parameters)):
            here.clear()
            here.update(before)  # type: ignore[arg-type]
        raise


def restore(places: list[tuple[nn.Module, str]]) -> None:
    """Makes the int8 weight that these modules share one plain float parameter of all of them again, dequantized."""
    int8 = [(module, name) for module, name in places if name in states_of(module)]
    if not int8:
        return
    # An interrupted call has left a part of them in float.
    plain = [weight for module, name in places if (weight := module._parameters.get(name)) is not None]
    weight = plain[0] if plain else nn.Parameter(_float_weight(states_of(int8[0][0])[int8[0][1]]), requires_grad=False)
    for module, name in int8:
        states = states_of(module)
        del states[name]
        attach(module, states, **{name: weight})


@torch.inference_mode(False)
@torch.no_grad()
def _float_weight(state: WeightState) -> Tensor:
    """Returns the dequantized weight in the layout of the original parameter."""
    return state.dequantized() if state.in_dim == 1 else state.dequantized().t().contiguous()


def int8_places(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Returns where the int8 weights of a model are: for each weight the modules that own it, with its name there."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, state in states_of(module).items():
            places.setdefault(id(state), []).append((module, name))
    return list(places.values())


def float_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of `module` in which no weight is int8."""
    copied = copy.deepcopy(module)
    for places in int8_places(copied):
        restore(places)
    return copied
