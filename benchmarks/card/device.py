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

    def run() -> None:
        for _ in range(repeats):
            call()

    return statistics.median(_elapsed(run, device) for _ in range(5)) / repeats


def milliseconds_as_graph(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """As `milliseconds`, from a CUDA graph of the calls: what the card takes, however long a launch takes the CPU."""
    if device.type != "cuda":
        return milliseconds(call, device, repeats)
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    synchronize(device)
    return statistics.median(_elapsed(graph.replay, device) for _ in range(5)) / repeats


def _elapsed(run: Callable[[], None], device: torch.device) -> float:
    """Milliseconds from begin to end of what `run` launches."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
