"""The highest memory of a training."""

import contextlib
import resource
import sys
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Makes the peak start from what is held now. On a CPU only Linux can; elsewhere it is since the program began."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """Returns the highest memory in MiB: of tensors for a CUDA device, else all that this process has resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1024**2
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024**2 if sys.platform == "darwin" else peak / 1024
