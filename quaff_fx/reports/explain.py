"""`explain`: what became of every weight, and what it cost."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from quaff_fx.api import stages_of
from quaff_fx.kernels.dispatch import kernels_of
from quaff_fx.sites import Site
from quaff_fx.stages import Stages
from quaff_fx.weights import FloatWeight

SHOWN_CHANNELS = 4


@dataclass(frozen=True)
class Row:
    """One weight matrix.

    Attributes:
        name: of the module. weight: of the parameter. shape: of the weight.
        stage: ``"int8"``, ``"observed"``, ``"observed (int8)"`` of a weight that was loaded as int8, ``"int8 weight"``
            if such a one is left alone (the product is float), or ``"float"``.
        activation_bits: of its input, None in float. outlier_channels: the most stable first.
        bytes_before, bytes_after: of the weight and all that replaces it. reason: why it is left alone.
        flops: multiply-adds in the calibration steps, as they were seen. Before the first one, and of a weight of more
            than two dimensions: per token, of experts as if the token went to all of them.
    """

    name: str
    weight: str
    shape: tuple[int, ...]
    stage: str
    activation_bits: int | None
    outlier_channels: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    reason: str
    flops: int


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns; `str` gives the table, the attributes the facts.

    Attributes:
        rows: every weight matrix in model order. stage: of the whole. steps, calibration_steps: done, of how many.
        product: what computes the int8 products.
        also_read: int8 weights that something besides a linear reads, by name in the traced code, with that reader.
    """

    rows: tuple[Row, ...]
    stage: str
    steps: int
    calibration_steps: int
    product: str
    also_read: tuple[str, ...] = ()

    @property
    def int8_share(self) -> float:
        """Share of the linear multiply-adds that are int8, in [0, 1]."""
        return sum(row.flops for row in self.rows if row.stage == "int8") / self._flops()

    @property
    def left_alone(self) -> dict[str, float]:
        """Why weights are left alone, with the share of the linear multiply-adds that each reason takes."""
        shares: dict[str, float] = defaultdict(float)
        for row in self.rows:
            if row.reason:
                shares[row.reason] += row.flops / self._flops()
        return dict(shares)

    def _flops(self) -> int:
        return max(1, sum(row.flops for row in self.rows))

    @property
    def bytes_before(self) -> int:
        """Bytes of the rewritten weights in float."""
        return sum(row.bytes_before for row in self.rows if not row.reason)

    @property
    def bytes_after(self) -> int:
        """Bytes of the rewritten weights and all their state now."""
        return sum(row.bytes_after for row in self.rows if not row.reason)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            (
                row.name,
                "×".join(map(str, row.shape)),
                f"{row.stage} (a{row.activation_bits})" if row.activation_bits else row.stage,
                _channels(row.outlier_channels),
                _mib(row.bytes_before),
                _mib(row.bytes_after),
                row.reason,
            )
            for row in self.rows
            if not row.reason
        ]
        by_reason: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            if row.reason:
                by_reason[row.reason].append(row)
        shares = self.left_alone
        for reason, rows in by_reason.items():
            name = rows[0].name if len(rows) == 1 else f"{rows[0].name} and {len(rows) - 1} more"
            before = _mib(sum(row.bytes_before for row in rows))
            shapes = {row.shape for row in rows}
            shape = "×".join(map(str, rows[0].shape)) if len(shapes) == 1 else "various"
            after = _mib(sum(row.bytes_after for row in rows))
            stages = {row.stage for row in rows}
            stage = rows[0].stage if len(stages) == 1 else "various"
            why = f"{reason} ({shares[reason]:.1%} of multiply-adds)"
            table.append((name, shape, stage, "", before, after, why))
        headers = ("weight", "shape", "stage", "outlier channels", "MiB before", "after", "left alone because")
        lines = [tabulate(table, headers=headers), self.summary()]
        if self.also_read:
            rest = f" and {len(self.also_read) - 1} more" if len(self.also_read) > 1 else ""
            lines.append(f"also dequantized in each forward: {self.also_read[0]}{rest}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Returns the line under the table."""
        if self.stage == "observe":
            loaded = sum(row.stage == "observed (int8)" for row in self.rows)
            weights = f"{loaded} weights were loaded as int8" if loaded else "all weights are float"
            return f"observing: {self.steps} of {self.calibration_steps} calibration steps done, {weights}"
        int8 = sum(row.stage == "int8" for row in self.rows)
        ratio = self.bytes_after / max(1, self.bytes_before)
        return (
            f"{int8} weights are int8: {self.int8_share:.1%} of all linear multiply-adds; weight memory "
            f"{_mib(self.bytes_before)} → {_mib(self.bytes_after)} MiB ({ratio:.3f}); products: {self.product}"
        )


def explain(model: nn.Module) -> Explanation:
    """Returns per weight what was rewritten, what was not and why, its outlier channels and bytes; print it.

    Raises:
        ConfigError: the model was not compiled by quaff_fx.
    """
    stages = stages_of(model)
    tokens = _tokens(stages)
    rows = [_row(site, stages, tokens) for site in stages.sites]
    device = next(stages.model.parameters()).device
    changes = [change for graph in stages.graphs for change in graph.changes]
    also_read = dict.fromkeys(f"{c.site} ({c.reason})" for c in changes if c.action == "left alone")
    return Explanation(
        tuple(rows),
        stages.stage,
        stages.steps,
        stages.config.calibration_steps,
        kernels_of(device).name,
        tuple(also_read),
    )


def _row(site: Site, stages: Stages, tokens: int) -> Row:
    weight = site.weight
    form = weight.form(is_observed=stages.stage == "observe" and not site.reason)
    before = math.prod(site.shape) * site.dtype.itemsize
    after = before if isinstance(weight, FloatWeight) else weight.weight_bytes()
    flops = math.prod(site.shape) * tokens
    if len(site.shape) == 2 and stages.calibration.multiply_adds:
        flops = stages.calibration.multiply_adds.get(site.weight_name, 0)
    what = (site.name, site.weight_name, site.shape, form, weight.activation_bits, weight.outlier_channels)
    return Row(*what, before, after, site.reason, flops)


def _tokens(stages: Stages) -> int:
    """How many rows most matrices multiplied in the calibration steps; 1 before the first one."""
    counted = stages.calibration.multiply_adds
    uses = [
        counted[site.weight_name] // math.prod(site.shape) for site in stages.sites if counted.get(site.weight_name)
    ]
    return statistics.median_low(uses) if uses else 1


def _channels(channels: tuple[int, ...]) -> str:
    shown = " ".join(map(str, channels[:SHOWN_CHANNELS]))
    rest = len(channels) - SHOWN_CHANNELS
    return f"{shown} +{rest}" if rest > 0 else shown


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"
