"""What a pass is, and the one runner that does for every pass what no pass should repeat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch.fx import GraphModule

from quaff_fx.errors import PassError

log = logging.getLogger("quaff_fx.passes")


@dataclass(frozen=True)
class Change:
    """One thing a pass did, or declined to do.

    Attributes:
        site: the weight, by its name in the traced code.
        action: what was done. reason: why it was left alone, in words; empty otherwise.
    """

    site: str
    action: Literal["normalized", "quantized", "folded", "joined", "launched", "left alone"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.site}: {self.action}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class PassResult:
    """The edited graph module and what changed in it, in graph order."""

    graph_module: GraphModule
    changes: tuple[Change, ...]


class Pass(Protocol):
    """A frozen dataclass of parameters that edits one graph: no globals, no clock, no tensor values."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Edits `graph_module` in place, not its subgraphs; running it twice changes nothing the second time."""
        ...


@dataclass(frozen=True)
class Stage:
    """A graph as text after one pass, with what that pass changed.

    Attributes:
        name: of the pass; of the graph as it came, what made it. text: of the graph and its subgraphs.
    """

    name: str
    text: str
    changes: tuple[Change, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"# {self.name}", self.text, *(f"# {change}" for change in self.changes)])


@dataclass(frozen=True)
class RunResult:
    """The graph module after some passes, and it as text before the first and after each of them."""

    graph_module: GraphModule
    stages: tuple[Stage, ...]

    @property
    def changes(self) -> tuple[Change, ...]:
        """What all of the passes changed, in their order."""
        return tuple(change for stage in self.stages for change in stage.changes)


def subgraphs(graph_module: GraphModule) -> Iterator[GraphModule]:
    """Yields `graph_module` and every graph below it: the bodies of higher-order ops (activation checkpointing)."""
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            yield module


def run_passes(
    passes: Sequence[Pass],
    graph_module: GraphModule,
    check: Callable[[GraphModule], None] = lambda _: None,
    *,
    before: str = "before",
    as_text: Callable[[GraphModule], str] = lambda _: "",
) -> RunResult:
    """Runs `passes` in order over the graph and its subgraphs, then `check` on the result.

    Args:
        before: the name of the graph as it comes. as_text: what the stages keep of a graph; nothing by default.

    Raises:
        PassError: a pass raised, produced a malformed graph, or the result breaks the spec; the message names the pass
            and shows the graph it worked on.
    """
    stages = [Stage(before, as_text(graph_module))]
    for step in passes:
        name = type(step).__name__
        changes: list[Change] = []
        for graph in list(subgraphs(graph_module)):
            try:
                result = step(graph)
                graph.graph.lint()
            except Exception as error:
                text = graph.print_readable(print_output=False)
                raise PassError(f"{name}: {error}, in this graph:\n{text}") from error
            graph.recompile()
            changes += result.changes
        log.debug("%s: %d changes", name, len(changes))
        stages.append(Stage(name, as_text(graph_module), tuple(changes)))
    try:
        check(graph_module)
    except PassError as error:
        names = ", ".join(type(step).__name__ for step in passes)
        raise PassError(f"after {names}: {error}") from error
    return RunResult(graph_module, tuple(stages))
