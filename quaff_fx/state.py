"""What stands in the place of a frozen weight: loaded as int8 or observed, then quantized.

A module that owns a frozen weight keeps its place in the model, its name and its class as a base class. Reading the
weight calls the state's `read`, which emits a marker op with all the state as arguments (`docs/architecture.md`).
One class per kind of base module is shared by all instances, so that layers share compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quaff_fx import numerics, ops
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


class ObservedWeight(_KeepsFloat32):
    """The statistics of the activation that a frozen weight multiplies; the float weight stays where it is.

    Attributes:
        step_absmax, step_count: what the current step saw per channel, written by the graph; sized for either
            orientation of the weight.
        in_dim_seen: which dimension of the weight the traced linears reduce over; -1 unseen, 2 not only linears.
        hits: steps (or values) in which a channel was an outlier. absmax_sum: sum over steps of its absmax.
        steps: number of steps folded in.
    """

    step_absmax: Tensor
    step_count: Tensor
    in_dim_seen: Tensor
    hits: Tensor
    absmax_sum: Tensor

    def __init__(self, weight: Tensor, threshold: float) -> None:
        super().__init__()
        size = max(weight.shape)
        for name in ("step_absmax", "step_count"):
            self.register_buffer(name, torch.zeros(size, device=weight.device), persistent=False)
        # No buffers: DDP would overwrite what a rank has counted by the counts of rank 0 before each forward.
        self.hits, self.absmax_sum = torch.zeros(2, size, device=weight.device)
        seen = torch.full((), ops.IN_DIM_UNSEEN, dtype=torch.int64, device=weight.device)
        self.register_buffer("in_dim_seen", seen, persistent=False)
        self.threshold = threshold
        self.steps = 0

    def read(self, weight: nn.Parameter) -> Tensor:
        """Returns the weight: itself in eager code, a marker for the passes while being traced."""
        if not torch.compiler.is_compiling():
            return weight
        marker: Tensor = torch.ops.quaff.observe_weight.default(
            weight, self.step_absmax, self.step_count, self.in_dim_seen
        )
        return marker

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.hits, self.absmax_sum = (tensor.to(self.step_absmax.device) for tensor in (self.hits, self.absmax_sum))
        return self

    def start_step(self) -> None:
        """Forgets what a replayed or evaluated forward has written since the last step."""
        self.step_absmax.zero_()
        self.step_count.zero_()

    def finish_step(self, outliers: int) -> None:
        """Folds the step into the statistics; `outliers` channels count as hits when ranked by absmax."""
        if self.threshold > 0:
            self.hits += self.step_count
        else:
            self.hits += numerics.outlier_hits(self.step_absmax, outliers)
        self.absmax_sum += self.step_absmax
        self.steps += 1


class LoadedWeight(_KeepsFloat32):
    """A frozen weight that was made int8 while it was loaded: before and while its activation is observed.

    Attributes:
        w_int8: (N, K) int8. w_scale: (N,) float32.
        in_dim: the dimension of the original parameter that the product reduces over: 1 for `nn.Linear`, 0 for Conv1D.
        rotation: the block B that `w_int8` is rotated with, along K (`numerics.rotate`).
        dtype: of the original parameter; follows `.to(dtype)`. loaded_dtype: what its values were rounded to.
        source: where its float columns can be read again.
        observer: the statistics of its activation, None while nothing observes.
    """

    observer: ObservedWeight | None

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
        self.observer = None

    def observe(self, threshold: float) -> None:
        """Starts to keep the statistics of the activation, over columns of `w_int8`."""
        self.observer = ObservedWeight(self.w_int8, threshold)

    def read(self, _: object = None) -> Tensor:
        """Returns the weight in the layout of the original parameter: an `Int8Weight` in eager code, a marker for the
        passes while being traced; plain operations if nothing observes.
        """
        if not torch.compiler.is_compiling():
            return Int8Weight(self)
        if self.observer is None:
            weight = self.dequantized()
        else:
            seen = (self.observer.step_absmax, self.observer.step_count, self.observer.in_dim_seen)
            weight = torch.ops.quaff.observe_int8_weight.default(
                self.w_int8, self.w_scale, *seen, self.dtype, self.rotation
            )
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
        """Bytes of the weight itself, without the statistics."""
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

    def read(self, _: object = None) -> Tensor:
        """Returns the weight in the layout of the original parameter: a marker while traced, else an `Int8Weight`."""
        if not torch.compiler.is_compiling():
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
        """Returns x Wᵀ + bias through the int8 product, differentiable, with the smoothing scale as it is."""
        channels, s = self.outliers.outlier_channels, self.outliers.smoothing_scale
        numbers = (self.activation_max, self.rotation)
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


WeightState = ObservedWeight | LoadedWeight | QuantizedWeight

_MARKED_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _marked_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Returns the class of modules like `base` whose parameters `names` are read through their states."""
    if (base, names) in _MARKED_CLASSES:
        return _MARKED_CLASSES[base, names]

    def reader(name: str) -> property:
        def read(module: nn.Module) -> Tensor:
            return module._modules[SLOT_PREFIX + name].read(module._parameters.get(name))  # type: ignore[union-attr,operator,no-any-return]

        return property(read)

    def reduce(module: nn.Module, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (base, names), module.__getstate__()  # type: ignore[no-untyped-call]

    body = {name: reader(name) for name in names} | {"__reduce_ex__": reduce, "__module__": __name__}
    marked = type(f"Quaff{base.__name__}", (base,), {**body, "quaff_base": base, "quaff_names": names})
    _MARKED_CLASSES[base, names] = marked
    return marked


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _marked_class(base, names)
    return cls.__new__(cls)


def states_of(module: nn.Module) -> dict[str, WeightState]:
    """Returns the state of each frozen weight that `module` owns, by parameter name."""
    names = getattr(type(module), "quaff_names", ())
    return {name: module._modules[SLOT_PREFIX + name] for name in names}  # type: ignore[misc]


def attach(module: nn.Module, states: dict[str, WeightState]) -> None:
    """Gives `module` exactly these states, by parameter name; an empty mapping gives it back its own class."""
    base = getattr(type(module), "quaff_base", type(module))
    for name in states_of(module):
        if name not in states:
            del module._modules[SLOT_PREFIX + name]
    module.__class__ = _marked_class(base, tuple(sorted(states))) if states else base
    for name, state in states.items():
        module._modules[SLOT_PREFIX + name] = state.train(module.training)
        if not isinstance(state, ObservedWeight):
            module._parameters.pop(name, None)


def restore(module: nn.Module, name: str) -> None:
    """Makes the weight `name` of `module` a plain float parameter again; dequantized if it was int8."""
    states = states_of(module)
    state = states.pop(name)
    if not isinstance(state, ObservedWeight):
        weight = state.dequantized() if state.in_dim == 1 else state.dequantized().t().contiguous()
        attach(module, states)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    else:
        attach(module, states)
