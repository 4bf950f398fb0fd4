"""What the card must show, and how far it was reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.card import plan

FROZEN = "frozen products"
ADAPTERS = "adapters' products"
ATTENTION = "attention"
GATED = "gated activation"
QUANTIZE = "quantize and rotate"
COPIES = "copies, casts, pads"
TRANSPOSES = "transposes"
REST = "the rest"

BUDGET_MS = {
    FROZEN: (19.2, 11.0),
    ADAPTERS: (2.2, 1.4),
    ATTENTION: (2.6, 2.4),
    GATED: (1.7, 1.0),
    QUANTIZE: (0.0, 0.5),
    COPIES: (0.4, 0.2),
    TRANSPOSES: (0.0, 0.4),
    REST: (2.2, 1.9),
}
"""Four layers of Llama-8B, 4096 tokens: what compiled bfloat16 took on an H200, and what int8 products may take there.

A step of 28.3 ms against one of 19: 1.5 times as fast.
"""


@dataclass
class Results:
    """All that was measured until now.

    Attributes:
        machine: "card" and "versions". checks: by name, with "status" and "detail". products: rows.
        steps: by the name of the pair. missing: what was not run, or not to its end, with its reason.
    """

    machine: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    products: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def figure(self, shape: plan.Shape, system: str, name: str) -> float | None:
        """Returns a figure of a step, None if there is none."""
        value = self.steps.get(plan.Pair(shape, system).name, {}).get(name)
        return float(value) if value else None


@dataclass(frozen=True)
class Target:
    """A ratio that must be reached.

    Attributes:
        bound: what it must be at least, or with `is_upper` at most. aim: what it should be, None if that is all.
    """

    what: str
    ratio: Callable[[Results], float | None]
    bound: float
    aim: float | None = None
    is_upper: bool = False

    def verdict(self, results: Results) -> str:
        """Returns "not measured", "missed", "held" or "aim reached"."""
        ratio = self.ratio(results)
        if ratio is None:
            return "not measured"
        sign = -1 if self.is_upper else 1
        if sign * ratio < sign * self.bound:
            return "missed"
        return "held" if self.aim is None or sign * ratio < sign * self.aim else "aim reached"


def speed(
    shape: plan.Shape, others: Sequence[str], figure: str = "wall_ms", system: str = plan.QUAFF
) -> Callable[[Results], float | None]:
    """How many times as fast as the fastest of the others a system is; None if it or all of them have no figure."""

    def ratio(results: Results) -> float | None:
        ours = results.figure(shape, system, figure)
        theirs = [value for other in others if (value := results.figure(shape, other, figure)) is not None]
        return min(theirs) / ours if ours and theirs else None

    return ratio


def share(shape: plan.Shape, other: str, figure: str) -> Callable[[Results], float | None]:
    """A figure of quaff_fx over that of another system."""

    def ratio(results: Results) -> float | None:
        ours, theirs = results.figure(shape, plan.QUAFF, figure), results.figure(shape, other, figure)
        return ours / theirs if ours and theirs else None

    return ratio


def passed_share(results: Results) -> float | None:
    """The share of the checks that passed, of those that were made."""
    statuses = [check["status"] for check in results.checks.values() if check["status"] != "skipped"]
    return statuses.count("passed") / len(statuses) if statuses else None


_BFLOAT16 = (plan.BFLOAT16_COMPILED,)

TARGETS = (
    Target(
        "Llama-8B, 4096 tokens, GPU time, over compiled bfloat16", speed(plan.LLAMA_8B, _BFLOAT16, "gpu_ms"), 1.35, 1.5
    ),
    Target("Llama-8B, 4096 tokens, wall time, over compiled bfloat16", speed(plan.LLAMA_8B, _BFLOAT16), 1.3, 1.5),
    Target("Llama-8B, 8192 tokens, over compiled bfloat16", speed(plan.LLAMA_8B_LONG, _BFLOAT16), 1.35, 1.5),
    Target("Phi-3, 4096 tokens, over compiled bfloat16", speed(plan.PHI_3, _BFLOAT16), 1.15, 1.4),
    Target("Phi-3, float32, over eager float32", speed(plan.PHI_3_FLOAT32, (plan.FLOAT32_EAGER,)), 3.0, 4.0),
    Target(
        "Phi-3, TF32, over compiled TF32",
        speed(plan.PHI_3_FLOAT32, (plan.TF32_COMPILED,), system=plan.QUAFF_TF32),
        1.1,
    ),
    Target("Llama-8B, over bitsandbytes NF4", speed(plan.LLAMA_8B, plan.NF4), 1.7, 2.0),
    Target("Llama-8B, over bitsandbytes LLM.int8", speed(plan.LLAMA_8B, plan.LLM_INT8), 1.7, 2.0),
    Target("Llama-8B, over torchao int8", speed(plan.LLAMA_8B, (plan.TORCHAO_INT8,)), 1.7, 2.0),
    Target(
        "Llama-8B, peak memory, share of compiled bfloat16",
        share(plan.LLAMA_8B, plan.BFLOAT16_COMPILED, "peak_mib"),
        0.7,
        0.6,
        is_upper=True,
    ),
    Target(
        "Llama-8B, seconds of the first int8 step, over those of compiled bfloat16",
        share(plan.LLAMA_8B, plan.BFLOAT16_COMPILED, "cold_s"),
        1.3,
        is_upper=True,
    ),
    Target("checks passed", passed_share, 1.0),
)


def rows(results: Results) -> list[Mapping[str, str]]:
    """Returns a row for each target: what is reached beside what must be and what should be."""
    table = []
    for target in TARGETS:
        ratio = target.ratio(results)
        word = "at most" if target.is_upper else "at least"
        table.append(
            {
                "it must show": target.what,
                "reached": "–" if ratio is None else f"{ratio:.2f}",
                "bound": f"{word} {target.bound:.2f}",
                "aim": "" if target.aim is None else f"{target.aim:.2f}",
                "verdict": target.verdict(results),
            }
        )
    return table
