"""A frozen weight that is a float parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quaff_fx.weights.layout import as_matrix
from quaff_fx.weights.quantized import OutlierState, QuantizedWeight
from quaff_fx.weights.state import REPLACED


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
            return REPLACED
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
