"""What a frozen weight is: a float parameter, or what stands in its place once it is int8, loaded so or quantized.

A module that owns an int8 weight keeps its place in the model, its name and its class as a base class. Reading the
weight calls the state's `read`, which emits a marker op with all the state as arguments (`docs/architecture.md`).
One class per kind of base module is shared by all instances, so that layers share compiled graphs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from quaff_fx import numerics, ops
from quaff_fx.errors import CheckpointError, WeightError
from quaff_fx.int8_weight import Int8Weight
from quaff_fx.layout import as_matrix, from_matrix, swapped_shape

SLOT_PREFIX = "quaff_"
"""The state of parameter `weight` is the submodule `quaff_weight`."""


ROTATED = "contiguous"
"""Which features `numerics.rotate` mixes; what a pickle, and the metadata of a state dict, say of `w_int8`. Without it
they are of an earlier version, which mixed features that lie far apart: they would be rotated back to other weights.
"""


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


_REPLACED = "weight was replaced while it was observed"


class Source(Protocol):
    """Where the float values of a weight that was loaded as int8 can be read again."""

    def check_unchanged(self) -> None:
        """Raises `CheckpointError` if it cannot be read any more, or is not what it was."""

    def columns(self, channels: Tensor, in_dim: int, dtype: torch.dtype) -> Tensor:
        """Returns the columns `channels` of the matrix (N, K), (N, O) in `dtype`; raises as `check_unchanged`."""


@dataclass(frozen=True)
class FloatWeight:
    """A frozen weight that is a float parameter; it answers what the int8 ones answer.

    Attributes:
        parameter: None if the module has none of the name any more.
    """

    parameter: nn.Parameter | None

    is_int8 = False
    in_dims: ClassVar[tuple[int, ...]] = (0, 1)
    activation_bits: ClassVar[int | None] = None
    outlier_channels: ClassVar[tuple[int, ...]] = ()

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter, which has to be there."""
        assert self.parameter is not None
        return self.parameter

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold the values."""
        return (self.tensor,)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameter."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.tensor.device

    def form(self, is_observed: bool) -> str:
        """Returns what `explain` calls it."""
        return "observed" if is_observed else "float"

    def reason_not_observable(self) -> str:
        """Why it can be observed no more: it is to be trained, or is another module's now; empty if it can."""
        if self.parameter is None:
            return _REPLACED
        return "weight is trainable" if self.parameter.requires_grad else ""

    def check_source(self) -> None:
        """Raises nothing: all there is of it is in memory."""

    def is_finite(self) -> bool:
        """Tells whether it has neither NaN nor infinite values."""
        return bool(torch.isfinite(self.tensor).all())

    def columns(self, channels: Tensor, in_dim: int) -> Tensor:
        """Returns the columns `channels` of the matrix (N, K), (N, O)."""
        return as_matrix(self.tensor.detach(), in_dim).index_select(1, channels)

    def quantized(
        self, in_dim: int, outliers: OutlierState, activation_max: int, rotation: int, columns: Tensor | None
    ) -> QuantizedWeight:
        """Returns what it becomes; `columns` are not needed."""
        return QuantizedWeight(self.tensor, in_dim, outliers, activation_max, rotation)

    def is_made_from(self, stored: Tensor) -> bool:
        """Tells whether it has the values of `stored`, on the CPU, in its own dtype."""
        value = self.tensor.detach().to("cpu")
        return torch.equal(value, stored.to(value.dtype))


class Int8State(_KeepsFloat32):
    """A frozen weight that is int8.

    Attributes:
        w_int8: (N, K) int8. w_scale: (N,) float32.
        in_dim: the layout of the original parameter (`layout.py`).
        rotation: the block B that `w_int8` is rotated with, along K (`numerics.rotate`). rotated: how, `ROTATED`.
        dtype: of the original parameter; follows `.to(dtype)`.
    """

    is_int8 = True

    def __init__(self, w_int8: Tensor, w_scale: Tensor, in_dim: int, rotation: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.w_int8 = _frozen(w_int8)
        self.w_scale = _frozen(w_scale)
        self.in_dim = in_dim
        self.rotation = rotation
        self.rotated = ROTATED
        self.dtype = dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold the values."""
        return (self.w_int8, self.w_scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original parameter."""
        return swapped_shape(self.w_int8.shape, self.in_dim)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.w_int8.device

    def read(self) -> Tensor:
        """Returns the weight in the layout of the original parameter: an `Int8Weight`, or operations while traced."""
        if not torch.compiler.is_dynamo_compiling():  # unlike `is_compiling`, not while another thread compiles
            return Int8Weight(self)
        return self.float_values()

    def dequantized(self) -> Tensor:
        """Returns the float weight (N, K)."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x Wᵀ + bias, differentiable."""
        raise NotImplementedError

    def float_values(self) -> Tensor:
        """Returns the float weight in the layout of the original parameter."""
        return from_matrix(self.dequantized(), self.in_dim)

    def is_made_from(self, stored: Tensor) -> bool:
        """Tells whether it is as near to `stored`, a parameter on the CPU, row by row, as rounding allows.

        An int8 value is off by at most half a scale, a row of K of them by sqrt(K) halves; the dtypes of both add
        theirs.
        """
        matrix = as_matrix(stored, self.in_dim).float()
        dequantized = self.dequantized().to("cpu", torch.float32)
        eps = max(torch.finfo(self.dtype).eps, torch.finfo(stored.dtype).eps)
        bound = 0.505 * self.w_scale.cpu() * matrix.shape[1] ** 0.5 + 2 * eps * matrix.norm(dim=1)
        return bool(((matrix - dequantized).norm(dim=1) <= bound).all())

    def weight_bytes(self) -> int:
        """Bytes of everything kept for this weight; state shared with other sites counts in each."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.parameters(), *self.buffers()))

    def __setstate__(self, values: dict[str, Any]) -> None:
        if values["rotation"] > 1 and values.get("rotated") != ROTATED:
            raise CheckpointError(f"pickled model: {_ROTATED_FAR_APART}")
        super().__setstate__(values)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["rotated"] = ROTATED

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # A dict that somebody put together has no metadata, and says nothing.
        if self.rotation > 1 and "version" in local_metadata and local_metadata.get("rotated") != ROTATED:
            rest[-1].append(f"{prefix}w_int8: {_ROTATED_FAR_APART}")  # `load_state_dict` raises it
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.w_int8.device)).dtype
        return super()._apply(fn, recurse)


_ROTATED_FAR_APART = (
    "has int8 weights of an earlier quaff_fx, which rotated features that lie far apart, expected contiguous blocks. "
    "Load the base model and the adapter, and compile them anew."
)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


class LoadedWeight(Int8State):
    """A frozen weight that was made int8 while it was loaded, until its outlier channels are known.

    Attributes:
        source: where its float columns can be read again. loaded_dtype: what their values were rounded to.
    """

    activation_bits: ClassVar[int | None] = None
    outlier_channels: ClassVar[tuple[int, ...]] = ()

    def __init__(
        self, w_int8: Tensor, w_scale: Tensor, in_dim: int, rotation: int, dtype: torch.dtype, source: Source
    ) -> None:
        super().__init__(w_int8, w_scale, in_dim, rotation, dtype)
        self.loaded_dtype = dtype
        self.source = source

    @property
    def in_dims(self) -> tuple[int, ...]:
        """The dimensions that linears may reduce over."""
        return (self.in_dim,)

    def form(self, is_observed: bool) -> str:
        """Returns what `explain` calls it."""
        return "observed (int8)" if is_observed else "int8 weight"

    def reason_not_observable(self) -> str:
        """Returns nothing: it can be neither trained nor replaced."""
        return ""

    def check_source(self) -> None:
        """Raises `CheckpointError` if its columns cannot be read any more."""
        self.source.check_unchanged()

    def is_finite(self) -> bool:
        """Returns True: another one stays in float when it is loaded."""
        return True

    def columns(self, channels: Tensor, in_dim: int) -> Tensor:
        """Returns the float columns (N, O) from the file; raises `CheckpointError` as `check_source`."""
        return self.source.columns(channels, self.in_dim, self.loaded_dtype)

    def quantized(
        self, in_dim: int, outliers: OutlierState, activation_max: int, rotation: int, columns: Tensor | None
    ) -> QuantizedWeight:
        """Returns what it becomes with these float columns (N, O): the int8 values stay, and their rotation."""
        assert columns is not None
        return QuantizedWeight.of_loaded(self, columns, outliers, activation_max)

    def dequantized(self) -> Tensor:
        """Returns the float weight (N, K)."""
        return numerics.dequantize_rows(self.w_int8, self.w_scale, self.rotation).to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x Wᵀ + bias, differentiable, with x in float: its outlier channels are not known yet."""
        y: Tensor = torch.ops.quaff.weight_only_linear.default(x, self.w_int8, self.w_scale, bias, self.rotation)
        return y


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


class QuantizedWeight(Int8State):
    """A frozen weight in int8, its scales, its outlier columns, and the state of the activation it multiplies.

    Attributes:
        w_outlier: (O, N), row j is column ``outlier_channels[j]``, in 16 bits (`numerics.outlier_rows`).
        outliers: the `OutlierState` of its activation, which is rotated as the weight is.
        activation_max: Q, 127 or 63.
    """

    def __init__(self, weight: Tensor, in_dim: int, outliers: OutlierState, activation_max: int, rotation: int) -> None:
        matrix = as_matrix(weight.detach(), in_dim)
        columns = matrix.index_select(1, outliers.outlier_channels)
        super().__init__(*numerics.quantize_weight(matrix, rotation), in_dim, rotation, weight.dtype)
        self._complete(columns, outliers, activation_max)

    @classmethod
    def of_loaded(
        cls, loaded: LoadedWeight, columns: Tensor, outliers: OutlierState, activation_max: int
    ) -> QuantizedWeight:
        """Returns what `loaded` becomes, its int8 values reused, with the outlier columns (N, O) in float."""
        made = cls.__new__(cls)
        Int8State.__init__(made, loaded.w_int8, loaded.w_scale, loaded.in_dim, loaded.rotation, loaded.dtype)
        made._complete(columns, outliers, activation_max)
        return made

    def _complete(self, columns: Tensor, outliers: OutlierState, activation_max: int) -> None:
        self.w_outlier = nn.Parameter(numerics.outlier_rows(columns), requires_grad=False)
        self.outliers = outliers
        self.activation_max = activation_max
        self.remember_values()

    @property
    def activation_bits(self) -> int:
        """Of the activation, 8 or 7."""
        return 8 if self.activation_max == 127 else 7

    @property
    def outlier_channels(self) -> tuple[int, ...]:
        """Of the activation, the most stable first."""
        return tuple(self.outliers.outlier_channels.tolist())

    def form(self, is_observed: bool) -> str:
        """Returns what `explain` calls it."""
        return "int8"

    def reason_not_observable(self) -> str:
        """Why it cannot be observed: another model, which shares the weight, has made it int8."""
        return _REPLACED

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
        super().__setstate__(values)
        self._version = -1  # a copy counts its own, from zero: an edit of before would look like none

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


WeightState = LoadedWeight | QuantizedWeight
Weight = FloatWeight | WeightState

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


def quantized_in(module: nn.Module) -> dict[str, QuantizedWeight]:
    """Returns those of `states_of` that are quantized."""
    return {name: weight for name, weight in states_of(module).items() if isinstance(weight, QuantizedWeight)}


def weights_in(module: nn.Module) -> dict[str, nn.Parameter | WeightState]:
    """Returns what holds each weight that `module` owns, by parameter name; one object where modules share a weight."""
    if isinstance(module, Int8State):
        return {}
    plain = {name: weight for name, weight in module._parameters.items() if weight is not None}
    return plain | states_of(module)


def weight_of(module: nn.Module, name: str) -> Weight:
    """Returns the weight that `module` has under the name of a parameter."""
    return states_of(module).get(name) or FloatWeight(module._parameters.get(name))


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
    weight = plain[0] if plain else _float_parameter(states_of(int8[0][0])[int8[0][1]])
    for module, name in int8:
        states = states_of(module)
        del states[name]
        attach(module, states, **{name: weight})


@torch.inference_mode(False)
@torch.no_grad()
def _float_parameter(state: WeightState) -> nn.Parameter:
    return nn.Parameter(state.float_values().contiguous(), requires_grad=False)


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
