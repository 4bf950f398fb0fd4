"""Which functions compute on a device: the one place that asks for the kind of a device."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quaff_fx.errors import QuaffWarning
from quaff_fx.kernels import cpu, cuda, reference
from quaff_fx.kernels.cuda import int_mm, tiles


def _as_they_are(_: torch.dtype, outliers: int) -> tuple[torch.dtype, int]:
    return torch.float32, outliers


@dataclass(frozen=True)
class Kernels:
    """What computes on a device; `reference` gives the contract of each function.

    Attributes:
        name: in a few words, for reports.
        int8_linear: the product with its epilogue. quantize_activation: the row quantizer.
        owns_epilogue: the product stays one op in a lowered graph. Otherwise it is taken apart there: the bare product,
            and around it plain torch that Inductor fuses.
        owns_rotation: so does the quantizer of a rotated activation. owns_quantizer: that of every activation.
        owns_low_rank: the product takes an adapter's low-rank term beside that of the outliers; else they are joined.
        launched_by_inductor: the functions launch Triton kernels. They are traced into a lowered graph, so that its
            compiled code launches the kernels itself.
        outlier_operand: dtype and columns that the quantizer gives the operand of O outliers of an activation.
        logits_bytes: how many, in float32, a loss in parts may have at once where these are parts of many tokens.
        activation_max: Q where the config leaves it open: 127, or 63 where 8 bits are slow.
    """

    name: str
    int8_linear: Callable[..., Tensor]
    quantize_activation: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
    owns_epilogue: bool = False
    owns_rotation: bool = False
    owns_quantizer: bool = False
    owns_low_rank: bool = False
    launched_by_inductor: bool = False
    outlier_operand: Callable[[torch.dtype, int], tuple[torch.dtype, int]] = _as_they_are
    logits_bytes: int = 2**26
    activation_max: int = 127


_REFERENCE = Kernels(
    "plain torch (exact, slow)",
    reference.int8_linear,
    reference.quantize_activation,
)
_INT_MM = Kernels(
    "torch._int_mm",
    functools.partial(reference.int8_linear, int8_matmul=cuda.int8_matmul),
    reference.quantize_activation,
    logits_bytes=2**29,
)

_SUPPORTED = ("cpu", "cuda")


@functools.cache
def kernels_of(device: torch.device) -> Kernels:
    """Returns the kernels of a device; warns if others than its own take over, since something is missing here."""
    if device.type == "cuda":
        return _of_cuda(device)
    if device.type != "cpu":
        return _REFERENCE
    found = cpu.obstacle_to_kernel()
    if found is not None:
        warn_of(found)
        return _REFERENCE
    instructions = cpu.instruction_set()
    return Kernels(
        f"own kernel, {instructions}",
        cpu.int8_linear,
        cpu.quantize_activation,
        owns_epilogue=True,
        owns_rotation=True,
        activation_max=63 if instructions == "avx2" else 127,
    )


def _of_cuda(device: torch.device) -> Kernels:
    reason = cuda.reason_without_triton(device)
    if not reason:
        return _of_card(device)
    if not torch.cuda.is_available():
        return _INT_MM  # tensors are fake: nothing runs
    architecture = cuda.architecture(device)
    if architecture < int_mm.FIRST_ARCHITECTURE:
        _warn_of_card(
            f"is an sm_{architecture}, expected sm_{int_mm.FIRST_ARCHITECTURE} or newer, with int8 tensor cores. The "
            "model runs in plain torch: right, but slower than in float32. Take a newer card, or leave quaff_fx out."
        )
        return _REFERENCE
    if architecture >= tiles.FIRST_ARCHITECTURE:
        _warn_of_card(
            f"{reason}, expected it for an sm_{architecture}. The model runs through torch._int_mm: right, in int8, "
            "but slower. Run: pip install triton"
        )
    return _INT_MM


@functools.cache
def _warn_of_card(text: str) -> None:
    """Warns, once for each text and not for each card."""
    warnings.warn(f"CUDA device: {text}", QuaffWarning, stacklevel=4)


def _of_card(device: torch.device) -> Kernels:
    from quaff_fx.kernels.cuda import product, rows

    return Kernels(
        f"Triton, sm_{cuda.architecture(device)}",
        product.int8_linear,
        rows.quantize_activation,
        owns_epilogue=True,
        owns_rotation=True,
        owns_quantizer=True,
        owns_low_rank=True,
        launched_by_inductor=True,
        outlier_operand=rows.outlier_operand,
        logits_bytes=2**29,
    )


def is_host(device: torch.device) -> bool:
    """Tells whether values on a device can be looked at without waiting for what was started on it."""
    return device.type == "cpu"


def reason_unsupported(device: torch.device) -> str:
    """Why weights on a device are left alone; empty if they are not."""
    if device.type in _SUPPORTED:
        return ""
    return f"device {device.type}, quantized are weights on {' and '.join(_SUPPORTED)}"


@functools.cache
def warn_of(obstacle: cpu.Obstacle) -> None:
    """Warns, once for each obstacle: one keeps both the kernel and Inductor from compiling."""
    warnings.warn(
        f"compilation: {obstacle.reason}, expected code compiled for this machine. The model runs without it: right, "
        f"in int8, but slower than in float32. {obstacle.way_out}",
        QuaffWarning,
        stacklevel=3,
    )


def activation_max(bits: str | int, device: torch.device) -> int:
    """Returns Q for `QuaffConfig.activation_bits` on a device: 127, or 63 where only 7 bits are fast and exact."""
    if bits == "auto":
        return kernels_of(device).activation_max
    return 63 if bits == 7 else 127
