"""The measurements of `step.py` as a table, a CSV file and a chart."""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import peers
from benchmarks.roofline import Roofline
from benchmarks.step_worker import WARM_UP_STEPS, Started, Turn
from quaff_fx.kernels.dispatch import kernels_of


@dataclass
class Record:
    """All of one system."""

    system: peers.System
    started: Started
    turns: list[Turn] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        return statistics.median(seconds for turn in self.turns for seconds in turn.steps)

    @property
    def fastest_seconds(self) -> float:
        return min(seconds for turn in self.turns for seconds in turn.steps)

    def part_seconds(self, part: str) -> float:
        return statistics.median(seconds for turn in self.turns for seconds in getattr(turn, part))

    def ratios(self, baseline: Record) -> list[float]:
        """How many times as fast as the baseline, in each round."""
        return [
            statistics.median(theirs.steps) / statistics.median(ours.steps)
            for ours, theirs in zip(self.turns, baseline.turns, strict=True)
        ]

    @property
    def gops(self) -> float:
        """Operations of the frozen linears in a step over the time of the whole step, in 1e9 per second."""
        return 2 * sum(linear.multiply_adds for linear in self.started.linears) / self.step_seconds / 1e9


def best_float32(records: list[Record]) -> Record | None:
    return min((r for r in records if r.system.is_float32), key=lambda r: r.step_seconds, default=None)


def table_rows(records: list[Record], tokens: int) -> list[dict[str, Any]]:
    """Returns a row per system, with numbers as they are."""
    baseline = best_float32(records)
    rows = []
    for record in records:
        ratios = record.ratios(baseline) if baseline else [float("nan")]
        rows.append(
            {
                "system": record.system.name,
                "step ms": record.step_seconds * 1e3,
                "fastest ms": record.fastest_seconds * 1e3,
                "forward ms": record.part_seconds("forward") * 1e3,
                "backward ms": record.part_seconds("backward") * 1e3,
                "optimizer ms": record.part_seconds("optimizer") * 1e3,
                "tokens/s": tokens / record.step_seconds,
                "times as fast as best float32": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "peak MiB": max(turn.peak_mib for turn in record.turns),
                "peak tensor MiB": record.started.peak_tensor_bytes / 2**20,
                "frozen MiB": record.started.frozen_bytes / 2**20,
                "start-up s": record.started.seconds,
                "loss after": record.turns[-1].loss,
            }
        )
    return rows


def printed_table(rows: list[dict[str, Any]]) -> str:
    shown = [
        {
            "system": row["system"],
            "step\nms": f"{row['step ms']:.0f}",
            "fastest\nms": f"{row['fastest ms']:.0f}",
            "forward\nms": f"{row['forward ms']:.0f}",
            "backward\nms": f"{row['backward ms']:.0f}",
            "AdamW\nms": f"{row['optimizer ms']:.0f}",
            "tokens/s": f"{row['tokens/s']:.0f}",
            "times as fast as\nbest float32": f"{row['times as fast as best float32']:.2f} "
            f"({row['lowest']:.2f}-{row['highest']:.2f})",
            "peak\nMiB": f"{row['peak MiB']:.0f}",
            "tensors\nMiB": f"{row['peak tensor MiB']:.0f}",
            "frozen\nMiB": f"{row['frozen MiB']:.1f}",
            "start-up\ns": f"{row['start-up s']:.1f}",
            "loss\nafter": f"{row['loss after']:.4f}",
        }
        for row in rows
    ]
    return tabulate(shown, headers="keys", disable_numparse=True, colalign=("left", *["right"] * 12))


def footer(
    records: list[Record], missing: dict[str, str], roofs: dict[int, Roofline], options: argparse.Namespace
) -> str:
    """Returns what one must know to read the table, line by line."""
    lines = [f"{options.shape}, {options.batch_size} x {options.tokens} tokens on {device_name(options)}"]
    steps = 3 + WARM_UP_STEPS + options.rounds * options.steps
    baseline = best_float32(records)
    lines.append(
        f"Medians of {options.rounds} rounds of {options.steps} steps in turns; a step includes AdamW on the adapters. "
        f"Loss at step {steps}, the same batches in every system."
    )
    if baseline:
        lines.append(
            f"Ratios to {baseline.system.name}: median, lowest and highest round. Peak is the whole process, Python "
            "and torch included; tensors is the peak of all tensors in a step; frozen is what lies under the adapters."
        )
    if options.keep_cache:
        lines.append("Start-up with whatever the cache of compiled code held (--keep-cache).")
    idle = max((turn.idle_cpu_seconds for record in records for turn in record.turns[1:]), default=0.0)
    lines.append(f"Waiting systems used at most {idle * 1e3:.0f} ms of CPU time between two turns.")
    with contextlib.suppress(OSError):
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > cores + 1:
            lines.append(
                f"The load was {load:.1f} on {cores} cores at the end: others computed too. The fastest step and the "
                "ratios then say more than the medians."
            )
    for record in records:
        roof = roofs.get(record.system.activation_max or 0)
        if roof:
            lines.append(
                f"{record.system.name}: {record.gops:.0f} GOPS of int8 over the whole step; its products alone reach "
                f"{roof.kernel_gops:.0f} of {roof.peak_gops:.0f} GOPS in registers and take "
                f"{roof.kernel_seconds * 1e3:.0f} ms of a step (in float32 {roof.float32_seconds * 1e3:.0f} ms)."
            )
    lines += [f"Not run: {name}: {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


def device_name(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        model = Path("/proc/cpuinfo").read_text().split("model name")[1].split(":")[1].split("\n")[0].strip()
    threads = options.threads or torch.get_num_threads()
    kernel = kernels_of(torch.device("cpu")).name
    return f"{model}, {threads} threads, int8 products: {kernel}, torch {torch.__version__}"


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_chart(rows: list[dict[str, Any]], title: str, path: Path) -> str | None:
    """Draws the parts of each system's step as a bar; returns why not, if it cannot."""
    try:
        import matplotlib
    except ImportError:
        return "no chart: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda row: row["step ms"], reverse=True)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    names = [row["system"] for row in rows]
    left = [0.0] * len(rows)
    for part, color in (("forward", "#4477aa"), ("backward", "#88aacc"), ("optimizer", "#bbbbbb")):
        widths = [row[f"{part} ms"] for row in rows]
        axes.barh(names, widths, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, end, row in zip(names, left, rows, strict=True):
        axes.annotate(f" {row['times as fast as best float32']:.2f}×", (end, name), va="center")
    axes.set(title=title, xlabel="ms per training step; × is the speed over the best float32")
    axes.margins(x=0.12)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None
