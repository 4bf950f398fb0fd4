"""The card, or the CPU in its place in a dry run: its name, its clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def description(device: torch.device) -> dict[str, object]:
    """Returns what is said of the machine beside its figures; GiB are those of the card."""
    versions = f"torch {torch.__version__}"
    if device.type != "cuda":
        return {"card": "CPU (dry run)", "card_gib": 0.0, "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    versions += f", CUDA {torch.version.cuda}"
    try:
        import triton

        versions += f", Triton {triton.__version__}"
    except ImportError:
        versions += ", no Triton"
    return {
        "card": f"{properties.name} (sm_{properties.major}{properties.minor})",
        "card_gib": properties.total_memory / 2**30,
        "versions": versions,
    }


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the time of a call on the device: the median over five rounds of `repeats` calls in a row.

    Each round is launched as a whole before it is waited for, so that what a launch costs the CPU hides behind the
    call before it.
    """
    for _ in range(3):
        call()
    synchronize(device)
    rounds = []
    for _ in range(5):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            rounds.append(start.elapsed_time(end) / repeats)
        else:
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            rounds.append((time.perf_counter() - begin) * 1e3 / repeats)
    return statistics.median(rounds)
