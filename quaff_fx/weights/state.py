"""What stands in the place of a frozen weight that is int8, as far as it is loaded so and quantized alike.

Reading the weight calls its `read`, which emits a marker op with all its state as arguments (`docs/architecture.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quaff_fx import numerics
from quaff_fx.weights.int8_weight import Int8Weight
from quaff_fx.weights.layout import as_matrix, from_matrix, swapped_shape

REPLACED = "weight was replaced while it was observed"
"""Why a weight is left alone that is no longer what was observed."""


ROTATED = "contiguous"
"""Which features `numerics.rotate` mixes, which the metadata of a state dict says of `w_int8`. One without it is of an
earlier version, which mixed features that lie far apart: it would be rotated back to other weights.
"""


class KeepsFloat32(nn.Module):
    """A module whose float32 tensors stay float32 under `.half()`, `.to(torch.bfloat16)` and the like."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


class Int8State(KeepsFloat32):
    """A frozen weight that is int8.

    Attributes:
        w_int8: (N, K) int8. w_scale: (N,) float32.
        in_dim: the layout of the original parameter (`layout.py`).
        rotation: the block B that `w_int8` is rotated with, along K (`numerics.rotate`).
        dtype: of the original parameter; follows `.to(dtype)`.
    """

    is_int8 = True

    def __init__(self, w_int8: Tensor, w_scale: Tensor, in_dim: int, rotation: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.w_int8 = _frozen(w_int8)
        self.w_scale = _frozen(w_scale)
        self.in_dim = in_dim
        self.rotation = rotation
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

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.w_int8.shape[0])

    def rows(self, indices: Tensor) -> Tensor:
        """Returns rows of the float weight (N, K), (..., K): a tied embedding looks tokens up."""
        at, w_scale = self._scales_at(indices)
        rows = numerics.dequantize_rows(self.w_int8[at], w_scale, self.rotation)
        return rows.to(self.dtype).reshape(*indices.shape, -1)

    def _scales_at(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns indices (T,) and the scales of their rows, (T,); raises torch's own error if there is no such row."""
        at = indices.reshape(-1)
        return at, nn.functional.embedding(at, self.w_scale.unsqueeze(1)).squeeze(1)

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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["rotated"] = ROTATED

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # A dict that somebody put together has no metadata, and says nothing.
        if self.rotation > 1 and "version" in local_metadata and local_metadata.get("rotated") != ROTATED:
            rest[-1].append(  # `load_state_dict` raises it
                f"{prefix}w_int8: is of an earlier quaff_fx, which rotated features that lie far apart, expected "
                "contiguous blocks. Load the base model and the adapter, and compile them anew."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.w_int8.device)).dtype
        return super()._apply(fn, recurse)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
