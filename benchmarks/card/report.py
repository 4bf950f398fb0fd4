"""The results as Markdown and JSON, written anew after each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.card import plan, targets
from benchmarks.card.targets import BUDGET_MS, Results


def write(results: Results, folder: Path) -> None:
    """Writes ``cuda.json`` and ``cuda.md``; each appears whole, whenever the program is ended."""
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = [dict(row) for row in targets.rows(results)]
    document = json.dumps({**asdict(results), "targets": verdicts}, indent=1)
    for name, text in (("cuda.json", document), ("cuda.md", markdown(results))):
        partial = folder / f".{name}.partial"
        partial.write_text(text + "\n")
        partial.replace(folder / name)


def markdown(results: Results) -> str:
    """Returns all tables, those that have rows."""
    sections = [f"# On {results.machine.get('card', 'no card yet')}", results.machine.get("versions", "")]
    tables = {
        "It must show": targets.rows(results),
        "Training steps": step_rows(results),
        "Where the card's time goes": part_rows(results),
        "Products and quantizer": product_rows(results),
        "Checks": [{"check": name, **row} for name, row in results.checks.items()],
        "Not run, or not to its end": [{"what": name, "reason": why} for name, why in results.missing.items()],
    }
    for title, rows in tables.items():
        if rows:
            sections += [f"## {title}", table(rows)]
    return "\n\n".join(sections)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as a Markdown table; the columns are those of any row, in order."""
    headers = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, "")).replace("|", "/") for name in headers] for row in rows]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def step_rows(results: Results) -> list[dict[str, str]]:
    """Returns a row for each system at each shape, with the speed over the strongest float system there."""
    rows = []
    steps = [results.steps[pair.name] for pair in plan.PAIRS if "wall_ms" in results.steps.get(pair.name, {})]
    for step in sorted(steps, key=lambda step: _SHAPES.index(step["shape"])):
        floats = [
            other["wall_ms"] for other in steps if other["shape"] == step["shape"] and other["system"] in _BASELINES
        ]
        rows.append(
            {
                "shape": step["shape"],
                "system": step["system"],
                "wall ms": f"{step['wall_ms']:.1f}",
                "fastest ms": f"{step['fastest_ms']:.1f}",
                "GPU ms": _number(step.get("gpu_ms"), 1) + ("*" if "events" in step.get("gpu_ms_from", "") else ""),
                "over best float": f"{min(floats) / step['wall_ms']:.2f}" if floats else "",
                "peak MiB": _number(step.get("peak_mib"), 0),
                "frozen MiB": _number(step.get("frozen_mib"), 0),
                "first step s": _number(step.get("first_step_s"), 1),
                "cold": "yes" if "cold_s" in step else "",
                "graphs": str(step.get("graphs", "")),
                "recompiled": str(step.get("recompiled", "")),
                "loss": _number(step.get("loss"), 4),
            }
        )
    return rows


_SHAPES = [shape.name for shape in plan.SHAPES.values()]
_BASELINES = (
    plan.FLOAT32_EAGER,
    plan.FLOAT32_COMPILED,
    plan.TF32_COMPILED,
    plan.BFLOAT16_EAGER,
    plan.BFLOAT16_COMPILED,
)


def part_rows(results: Results) -> list[dict[str, str]]:
    """Returns a row for each part of a step beside what it may take."""
    steps = [step for step in results.steps.values() if "parts" in step]
    rows = [
        {
            "part, ms": part,
            **{step["system"]: f"{step['parts'][part]:.2f}" for step in steps},
            "compiled bfloat16 on an H200": f"{before:.1f}",
            "reachable there": f"{after:.1f}",
        }
        for part, (before, after) in BUDGET_MS.items()
    ]
    sums = [f"{sum(values):.1f}" for values in zip(*BUDGET_MS.values(), strict=True)]
    total = {
        "part, ms": "sum",
        **{step["system"]: f"{sum(step['parts'].values()):.2f}" for step in steps},
        "compiled bfloat16 on an H200": sums[0],
        "reachable there": sums[1],
    }
    return [*rows, total] if steps else []


def product_rows(results: Results) -> list[dict[str, str]]:
    """Returns the products and the quantizer; a product's speed is over bfloat16's of the same size and direction."""
    bfloat16 = {
        (row["size"], row["tokens"], row["what"].split(",")[0]): row["ms"]
        for row in results.products
        if row["what"].endswith("bfloat16") and "ms" in row
    }
    rows = []
    for row in results.products:
        beside = bfloat16.get((row["size"], row["tokens"], row["what"].split(",")[0]))
        rows.append(
            {
                "K × N": row["size"],
                "tokens": str(row["tokens"]),
                "what": row["what"],
                "µs": _number(row["ms"] * 1e3, 0) if "ms" in row else row["reason"],
                "rate": f"{row['rate']:.0f} {row['unit']}" if "rate" in row else "",
                "over bfloat16": f"{beside / row['ms']:.2f}" if beside and "ms" in row else "",
                "timed": row["how"],
            }
        )
    return rows


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
