"""A frozen weight in int8, with the state of the activation that it multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quaff_fx import numerics, ops
from quaff_fx.weights import logits
from quaff_fx.weights.layout import as_matrix
from quaff_fx.weights.state import REPLACED, Int8State, KeepsFloat32


class OutlierState(KeepsFloat32):
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
        grad_outliers: how many values of a token's gradient are kept apart: of a head's, which is that of logits.
    """

    grad_outliers = 0
    _token_losses: Callable[..., Tensor] | None = None
    _is_gone_later: Callable[[], bool]

    def __init__(self, weight: Tensor, in_dim: int, outliers: OutlierState, activation_max: int, rotation: int) -> None:
        matrix = as_matrix(weight.detach(), in_dim)
        columns = matrix.index_select(1, outliers.outlier_channels)
        super().__init__(*numerics.quantize_weight(matrix, rotation), in_dim, rotation, weight.dtype)
        self._complete(columns, outliers, activation_max)

    @classmethod
    def of_loaded(
        cls, loaded: Int8State, columns: Tensor, outliers: OutlierState, activation_max: int
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
        return REPLACED

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

    def defer_logits(self, token_losses: Callable[..., Tensor], is_gone_later: Callable[[], bool]) -> None:
        """Makes products that train give `logits.Logits`, whose loss `token_losses` computes.

        Args:
            is_gone_later: tells whether the weight is there only while its module runs; then none does either.
        """
        self._token_losses, self._is_gone_later = token_losses, is_gone_later

    def token_losses(self, *arguments: Any) -> Tensor:
        """Returns what `logits.Head` says."""
        assert self._token_losses is not None
        return self._token_losses(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled belongs to this model: `Stages.install` gives a copy its own.
        return {name: value for name, value in self.__dict__.items() if name not in ("_token_losses", "_is_gone_later")}

    def __setstate__(self, values: dict[str, Any]) -> None:
        super().__setstate__(values)  # type: ignore[no-untyped-call]
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
            self.grad_outliers,
        )
        return weight

    def rows(self, indices: Tensor) -> Tensor:
        """Returns rows of the float weight (N, K), (..., K): a tied embedding looks tokens up."""
        at, w_scale = self._scales_at(indices)
        weight = (self.w_int8[at], w_scale, self.w_outlier[:, at])
        rows = numerics.dequantize_weight(*weight, self.outliers.outlier_channels, self.rotation)
        return rows.to(self.dtype).reshape(*indices.shape, -1)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns `product`, or of a head that trains `logits.Logits`, which compute it where they are read."""
        if self._token_losses is None or not logits.can_be_deferred(x, bias) or self._is_gone_later():
            return self.product(x, bias)
        return logits.logits(self, x, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x Wᵀ + bias through the int8 product, differentiable; in training writes the next smoothing scale."""
        outliers, numbers = self.outliers, (self.activation_max, self.rotation)
        channels, s = outliers.outlier_channels, outliers.smoothing_scale
        if self.training and outliers.momentum != ops.STATIC_MOMENTUM:
            state = (channels, outliers.outlier_w_absmax, s, outliers.momentum)
            with torch.no_grad():
                updated = torch.ops.quaff.update_smoothing_scale.default(x.detach(), *state)
                outliers.write_next(updated)
        parts = torch.ops.quaff.quantize_activation.default(x.detach(), channels, s, *numbers)
        weight = (self.w_int8, self.w_scale, self.w_outlier)
        y: Tensor = torch.ops.quaff.linear.default(x, *parts, *weight, bias, *numbers, self.grad_outliers)
        return y
