"""What a training cost and brought, and several trainings side by side."""

import json
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from peft.tuners.tuners_utils import BaseTunerLayer
from tabulate import tabulate
from torch import nn


@dataclass
class Measurements:
    step_seconds: float
    """Median over the timed steps."""
    tokens_per_second: float
    """Positions computed in a median step, padding included."""
    peak_memory: float
    """MiB, highest over all steps. With quaff_fx this includes the calibration, whose weights are still float."""
    steady_memory: float
    """MiB, highest over the timed steps alone."""
    frozen_weight_bytes: int
    """See the function of this name."""
    loss_before: float
    """Held-out, in nats per token of the solutions."""
    loss_after: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Measurements":
        return cls(**json.loads(path.read_text()))


def frozen_weight_bytes(model: nn.Module) -> int:
    """Returns the bytes of the base layers under the adapters: weights, and all scales that came in their place."""
    tensors = {
        id(tensor): tensor.nbytes
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for tensor in (*module.get_base_layer().parameters(), *module.get_base_layer().buffers())
    }
    return sum(tensors.values())


def measure_each(
    program: Sequence[str], methods: Mapping[str, Sequence[str]], output: Path
) -> dict[str, Measurements] | int:
    """Runs `program` with the options of each method, one process each so that peak memory is that method's own.

    The program has to take `--output` (it gets a folder of the method's name under `output`) and `--report`. Returns
    the measurements by method, or the exit code of the first program that failed or was interrupted.
    """
    results: dict[str, Measurements] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method, options in methods.items():
            print(f"\n=== {method} ===\n", flush=True)
            report = Path(folder) / f"{method}.json"
            code = _run([*program, *options, "--output", str(output / method), "--report", str(report)])
            if code != 0:
                return code
            results[method] = Measurements.load(report)
    return results


def comparison_table(results: Mapping[str, Measurements]) -> str:
    """Returns the measurements of each method as a row."""
    rows = [
        {
            "method": method,
            "median\nstep ms": f"{result.step_seconds * 1000:.0f}",
            "tokens/s": f"{result.tokens_per_second:.0f}",
            "peak MiB,\nall steps": f"{result.peak_memory:.0f}",
            "peak MiB,\ntimed steps": f"{result.steady_memory:.0f}",
            "frozen weights\nin bytes": f"{result.frozen_weight_bytes:,}",
            "held-out\nloss before": f"{result.loss_before:.4f}",
            "held-out\nloss after": f"{result.loss_after:.4f}",
        }
        for method, result in results.items()
    ]
    aligned = ["left", *["right"] * 7]
    return tabulate(rows, headers="keys", disable_numparse=True, colalign=aligned)


def _run(command: Sequence[str]) -> int:
    """Runs a program, passes Ctrl-C and SIGTERM on to it and waits for it to save. Returns its exit code.

    It gets a session of its own, so a terminal's Ctrl-C reaches it through here, once, and nobody twice.
    """
    with subprocess.Popen(command, start_new_session=True) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 128 - code if code < 0 else code
