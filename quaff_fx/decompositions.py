"""What Inductor sees of each `quaff` op: pointwise aten that it fuses, around one int8 product per direction.

The decompositions are registered in Inductor's own table (read in torch 2.13): a table passed to `compile_fx` makes
the graph cache unusable. The caches do not look at decompositions, so `cache_salt` goes into their key.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import decompositions, fast_random_decomps

from quaff_fx import numerics, ops
from quaff_fx.kernels import cuda, product


def _quantize_activation(
    x: Tensor, outlier_channels: Tensor, smoothing_scale: Tensor, activation_max: int, rotation: int
) -> Any:
    if rotation > 1 and x.device.type == "cpu":  # stays one op: its kernel rotates a row while it is in the cache
        return torch.ops.quaff.quantize_rotated.default(
            ops.tokens_of(x), outlier_channels, smoothing_scale, activation_max, rotation
        )
    return numerics.quantize_activation(ops.tokens_of(x), outlier_channels, smoothing_scale, activation_max, rotation)


def register() -> None:
    """Puts the decompositions into Inductor's table. Idempotent."""
    for op, decomposition in (
        (torch.ops.quaff.dequantize_weight.default, ops._dequantize_weight),
        (torch.ops.quaff.update_smoothing_scale.default, ops._update_smoothing_scale),
        (torch.ops.quaff.quantize_activation.default, _quantize_activation),
        (torch.ops.quaff.linear.default, ops._linear),
        (torch.ops.quaff.linear_grad_input.default, ops._linear_grad_input),
    ):
        decompositions[op] = decomposition
    # Inductor keeps a copy of its table from the first time that anything was compiled. Without these entries it would
    # leave the ops as they are: right, slow, and without a word.
    if torch.ops.quaff.linear.default not in fast_random_decomps():
        fast_random_decomps.cache_clear()


def cache_salt() -> str:
    """Returns a hash of the sources that decide what a cached graph computes.

    backend.py is one of them: Inductor's key says nothing of donated buffers, and a cached backward that writes into
    what forward saved gives wrong gradients where it runs twice.
    """
    digest = hashlib.sha256()
    for module in (numerics, ops, product, cuda):
        digest.update(Path(str(module.__file__)).read_bytes())
    for file in (Path(__file__), Path(__file__).with_name("backend.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
