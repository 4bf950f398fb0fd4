"""A frozen weight that was made int8 while it was loaded."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quaff_fx import numerics
from quaff_fx.weights.quantized import OutlierState, QuantizedWeight
from quaff_fx.weights.state import Int8State


class Source(Protocol):
    """Where the float values of a weight that was loaded as int8 can be read again."""

    def check_unchanged(self) -> None:
        """Raises `CheckpointError` if it cannot be read any more, or is not what it was."""

    def columns(self, channels: Tensor, in_dim: int, dtype: torch.dtype) -> Tensor:
        """Returns the columns `channels` of the matrix (N, K), (N, O) in `dtype`; raises as `check_unchanged`."""


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
