"""The results: a file for each as soon as it is there, and tables, CSV and charts of all of them."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.accuracy.tasks import Measures

RESAMPLES = 4000


class SettingsError(Exception):
    """The output folder holds results that were measured with other options."""


@dataclass(frozen=True)
class Cell:
    """One result: a task with one method at one stage of one training.

    Attributes:
        method, bits: a row of the table. adapter: one of `ADAPTERS`. seed: of adapter, calibration and training data.
        stage: "before" or "after" training; or "injected 100", outliers 100 times as large before training.
        task: one of `TASKS`, or "training", the loss of each step; "answers" with the number of problems behind it.
    """

    method: str
    bits: int
    adapter: str
    seed: int
    stage: str
    task: str

    @property
    def file_name(self) -> str:
        words = (self.method, self.bits, self.adapter, f"seed {self.seed}", self.stage, self.task)
        return "_".join(re.sub(r"\W+", "-", str(word)).strip("-") for word in words) + ".json"


class Store:
    """The folder of finished cells.

    A cell appears in one piece or not at all. It counts as finished only for the config that it was measured with.

    Raises:
        SettingsError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        if file.is_file():
            stored = json.loads(file.read_text())
            changes = [
                f"{name} {stored.get(name)!r}, now {settings.get(name)!r}"
                for name in sorted(stored.keys() | settings.keys())
                if stored.get(name) != settings.get(name)
            ]
            if changes:
                raise SettingsError(
                    f"{folder}: holds results of other options ({'; '.join(changes)}), expected the same. "
                    "Name another folder or the same options."
                )
        else:
            _write(file, settings)

    def load(self, cell: Cell, config: object) -> Measures | None:
        """Returns what was measured, None if it was not, or with another configuration."""
        file = self.folder / cell.file_name
        if not file.is_file():
            return None
        stored = json.loads(file.read_text())
        is_same = stored["cell"] == asdict(cell) and stored["config"] == _plain(config)
        return stored["measures"] if is_same else None

    def cells(self) -> list[Cell]:
        """Returns all cells that the folder holds, in the order of their names."""
        return [Cell(**json.loads(file.read_text())["cell"]) for file in sorted(self.folder.glob("*.json"))]

    def save(self, cell: Cell, config: object, measures: Measures) -> None:
        _write(self.folder / cell.file_name, {"cell": asdict(cell), "config": _plain(config), "measures": measures})


def _plain(value: object) -> Any:
    """What JSON makes of a value."""
    return json.loads(json.dumps(value, default=dict))


def _write(file: Path, content: object) -> None:
    incomplete = file.with_name(f"{file.name}.incomplete")
    incomplete.write_text(json.dumps(content, indent=1) + "\n")
    incomplete.replace(file)


# --- numbers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    Attributes:
        error: standard error over windows, of their means over seeds. low, high: interval of 95 %, from drawing windows
            and seeds anew. by_seed: the mean of each seed. count: of windows.
    """

    mean: float
    error: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    count: int

    @property
    def is_resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def estimate(values: Iterable[list[float]]) -> Estimate:
    """Returns the estimate of values by seed and window; every seed has the same windows."""
    table = torch.tensor(list(values), dtype=torch.float64)
    seeds, windows = table.shape
    by_window = table.mean(dim=0)
    error = (by_window.std() / windows**0.5).item() if windows > 1 else float("nan")
    generator = torch.Generator().manual_seed(0)

    def drawn(size: int) -> Tensor:
        """How often each of `size` comes up when `size` are drawn, as shares, (RESAMPLES, size)."""
        picks = torch.randint(size, (RESAMPLES, size), generator=generator)
        return torch.zeros(RESAMPLES, size, dtype=torch.float64).scatter_add_(
            1, picks, torch.full(picks.shape, 1 / size, dtype=torch.float64)
        )

    means = torch.einsum("rs,sw,rw->r", drawn(seeds), table, drawn(windows))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(table.mean().item(), error, low, high, tuple(table.mean(dim=1).tolist()), windows)


Results = dict[Cell, Measures]


@dataclass(frozen=True)
class Row:
    """A number of the CSV: a measure of one method at one stage, or its paired difference to `reference`."""

    method: str
    bits: int
    adapter: str
    stage: str
    task: str
    measure: str
    value: Estimate


def rows(results: Results) -> list[Row]:
    """Returns every number of every table, in the order of the results."""
    groups: dict[tuple[Any, ...], dict[int, Measures]] = {}
    for cell, measures in results.items():
        key = (cell.method, cell.bits, cell.adapter, cell.stage, cell.task.partition(" ")[0])
        groups.setdefault(key, {})[cell.seed] = measures
    found = []
    for (method, bits, adapter, stage, task), by_seed in groups.items():
        for measure in next(iter(by_seed.values())):
            if measure != "choice":
                value = estimate(measures[measure] for measures in by_seed.values())
                found.append(Row(method, bits, adapter, stage, task, measure, value))
        differences = [
            ("Δ", ("float32", 32, adapter, stage, task)),
            # Outliers that change nothing in float: what they cost is the loss over the same method without them.
            ("added", (method, bits, adapter, "before", task) if stage.startswith("injected") else None),
        ]
        for word, reference in differences:
            others = groups.get(reference or (), {})
            seeds = [seed for seed in by_seed if seed in others]
            if not seeds or reference == (method, bits, adapter, stage, task):
                continue
            for measure in next(iter(by_seed.values())):
                pairs = [(by_seed[seed][measure], others[seed][measure]) for seed in seeds]
                if measure == "choice":
                    agreement = estimate([float(a == b) for a, b in zip(*pair, strict=True)] for pair in pairs)
                    found.append(Row(method, bits, adapter, stage, task, "agreement", agreement))
                elif task == "training":
                    value = estimate([abs(a - b) for a, b in zip(*pair, strict=True)] for pair in pairs)
                    found.append(Row(method, bits, adapter, stage, task, f"distance of {measure}", value))
                else:
                    # The stress test takes the first of the windows.
                    value = estimate([a - b for a, b in zip(*pair, strict=False)] for pair in pairs)
                    found.append(Row(method, bits, adapter, stage, task, f"{word} {measure}", value))
    return found


# --- tables ------------------------------------------------------------------------------------------------------


def table(found: list[Row], columns: dict[str, tuple[str, str, str]], adapters: list[str]) -> str:
    """Returns a table of the rows that have any of the columns, header → (stage, task, measure), and of those columns.

    In a column of differences to float32, its own row has the measure itself.
    """
    by_key = {(r.method, r.bits, r.adapter, r.stage, r.task, r.measure): r.value for r in found}
    lines = []
    for row in dict.fromkeys((r.method, r.bits, r.adapter) for r in found if r.adapter in adapters):
        texts = []
        for stage, task, measure in columns.values():
            shown = measure.removeprefix("Δ ") if row[0] == "float32" else measure
            texts.append(formatted(by_key.get((*row, stage, task, shown)), shown))
        if any(texts):
            lines.append([*row[: 3 if len(adapters) > 1 else 2], *texts])
    headers = ["method", "bits", *(["adapter"] if len(adapters) > 1 else []), *columns]
    used = [any(line[place] != "" for line in lines) for place in range(len(headers))]
    headers, *lines = (list(itertools.compress(line, used)) for line in (headers, *lines))
    return tabulate(lines, headers=headers, disable_numparse=True) if lines else ""


def formatted(value: Estimate | None, measure: str) -> str:
    """Returns the cell of a table; a difference has a star where its interval excludes zero."""
    if value is None:
        return ""
    if measure.startswith(("Δ", "added")):
        spread = ""
        if len(value.by_seed) > 1:
            spread = f" ({min(value.by_seed):+.4f} to {max(value.by_seed):+.4f})"
        return f"{value}{spread}{' *' if value.is_resolved else ''}"
    return f"{value.mean:.4f}"


def write_csv(found: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        place = ["method", "bits", "adapter", "stage", "task", "measure"]
        writer.writerow([*place, "mean", "standard_error", "low_95", "high_95", "windows", "seeds", "by_seed"])
        for row in found:
            value = row.value
            numbers = [f"{number:.6g}" for number in (value.mean, value.error, value.low, value.high)]
            by_seed = " ".join(f"{mean:.6g}" for mean in value.by_seed)
            writer.writerow(
                [*(getattr(row, name) for name in place), *numbers, value.count, len(value.by_seed), by_seed]
            )


def write_charts(results: Results, found: list[Row], title: str, folder: Path) -> str:
    """Draws held-out losses and learning curves over those of float32; returns what it wrote, or why it did not.

    Into `accuracy.png` and `training.png`, each if there is something to compare with float32.
    """
    try:
        import matplotlib
    except ImportError:
        return "no charts: matplotlib is not installed"
    matplotlib.use("Agg")
    written = []
    if _write_losses(found, title, folder / "accuracy.png"):
        written.append("accuracy.png")
    if _write_curves(results, title, folder / "training.png"):
        written.append("training.png")
    return f"{' and '.join(written)} beside it" if written else "no charts: nothing to compare with float32"


def _write_losses(found: list[Row], title: str, path: Path) -> bool:
    """Draws each method's held-out loss over that of float32, before and after training; tells whether it has any."""
    from matplotlib import pyplot

    wanted = [
        row
        for row in found
        if (row.adapter, row.measure) == ("LoRA", "Δ loss")
        and row.stage in ("before", "after")
        and row.task in ("words", "shakespeare")
    ]
    if not wanted:
        return False
    names = list(dict.fromkeys(_label(r.method, r.bits) for r in wanted))[::-1]
    size = (11, 1.5 + 0.3 * len(names))
    figure, plots = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for plot, (task, words) in zip(
        plots, {"words": "word problems", "shakespeare": "Shakespeare"}.items(), strict=True
    ):
        for stage, color, shift in (("before", "#4477aa", 0.14), ("after", "#cc6677", -0.14)):
            shown = [r for r in wanted if (r.stage, r.task) == (stage, task)]
            means = [r.value.mean for r in shown]
            ends = [[r.value.mean - r.value.low for r in shown], [r.value.high - r.value.mean for r in shown]]
            places = [names.index(_label(r.method, r.bits)) + shift for r in shown]
            plot.errorbar(means, places, xerr=ends, fmt="o", color=color, capsize=3, label=f"{stage} fine-tuning")
        plot.axvline(0, color="#bbbbbb", zorder=0)
        plot.set(title=words, xlabel="nats per token, with 95 % intervals")
    plots[0].set_yticks(range(len(names)), names)
    plots[0].legend(fontsize="small")
    figure.suptitle(f"{title}: held-out loss over float32")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _label(method: str, bits: int) -> str:
    """Names a method with the bits of its activations, unless they are floating point."""
    return f"{method}, {bits} bits" if bits <= 8 else method


def _write_curves(results: Results, title: str, path: Path) -> bool:
    """Draws each step's training loss over that of float32, mean over seeds; tells whether there was a training."""
    from matplotlib import pyplot

    curves: dict[tuple[str, int], list[list[float]]] = {}
    for cell, measures in results.items():
        exact = results.get(replace(cell, method="float32", bits=32))
        if cell.task == "training" and cell.adapter == "LoRA" and cell.method != "float32" and exact is not None:
            difference = [a - b for a, b in zip(measures["loss"], exact["loss"], strict=True)]
            curves.setdefault((cell.method, cell.bits), []).append(difference)
    if not curves:
        return False
    panels = {"8 bits, and weights alone": [key for key in curves if key[1] != 7]}
    panels["7 bits"] = [key for key in curves if key[1] == 7]
    figure, plots = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    colors = dict(zip(dict.fromkeys(method for method, _ in curves), pyplot.get_cmap("tab10").colors * 2, strict=False))
    for plot, (heading, keys) in zip(plots, panels.items(), strict=True):
        for key in keys:
            means = torch.tensor(curves[key]).mean(dim=0).tolist()
            is_product = key[0] == "quaff_fx: default"
            color, width = ("black", 2.5) if is_product else (colors[key[0]], 1)
            plot.plot(range(1, len(means) + 1), means, color=color, linewidth=width, label=key[0])
        plot.axhline(0, color="#bbbbbb", zorder=0)
        plot.set(title=heading, xlabel="step")
        if keys:
            plot.legend(fontsize="x-small")
    plots[0].set_ylabel("training loss over float32")
    figure.suptitle(f"{title}: fine-tuning")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
