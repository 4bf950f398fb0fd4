"""`graphs`: every traced graph as it was captured, rewritten and lowered."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quaff_fx.api import stages_of
from quaff_fx.backend import CompiledGraph, lower
from quaff_fx.passes.infrastructure import Change
from quaff_fx.readable import readable


@dataclass(frozen=True)
class Graph:
    """One traced graph; `str` shows all of it.

    Attributes:
        captured: the graph as traced, with its markers. rewritten: after the passes. changes: what they did.
    """

    captured: str
    rewritten: str
    changes: tuple[Change, ...]
    _compiled: CompiledGraph

    @property
    def lowered(self) -> tuple[str, ...]:
        """The graphs that Inductor gets: forward and backward, or one if nothing needs a gradient. Traced anew."""
        compiled = self._compiled
        graphs = lower(compiled.graph_module, compiled.fake_inputs, compiled.autocast)
        return tuple(readable(graph) for graph in graphs)

    def __str__(self) -> str:
        lowered = self.lowered
        names = ("lowered forward", "lowered backward") if len(lowered) == 2 else ("lowered",) * len(lowered)
        parts = [("captured", self.captured), ("rewritten", self.rewritten), *zip(names, lowered, strict=True)]
        return "\n\n".join(f"# {name}\n{text}" for name, text in parts)


def graphs(model: nn.Module) -> tuple[Graph, ...]:
    """Returns the graphs traced so far for `model`, oldest first; none while it calibrates.

    Blocks of one class share theirs.

    Raises:
        ConfigError: the model was not compiled by quaff_fx.
    """
    return tuple(Graph(graph.captured, graph.rewritten, graph.changes, graph) for graph in stages_of(model).graphs)
