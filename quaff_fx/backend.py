"""The Dynamo backend: rewrites what was traced and hands it to Inductor.

Which private modules of torch it touches, and which other files do, is in docs/architecture.md (read in torch 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule

from quaff_fx import decompositions
from quaff_fx.errors import QuaffWarning
from quaff_fx.inductor import compile_fx
from quaff_fx.kernels import cpu, dispatch
from quaff_fx.passes import pipeline
from quaff_fx.passes.infrastructure import Change, RunResult, Stage

Autocast = tuple[tuple[str, torch.dtype, bool], ...]
"""Device type, dtype and whether it is on, per kind of device."""


def current_autocast() -> Autocast:
    """Returns the autocast that code runs under at this moment."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return tuple((kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in devices)


@dataclass(frozen=True)
class Graph:
    """One traced graph, as text at each stage, with what each pass changed; `str` shows all of it.

    Attributes:
        stages: as Dynamo traced it, with its markers, then after each pass.
        graph_module, fake_inputs: the rewritten graph with fake inputs of the traced shapes, for `lower`.
        autocast: what was on while it was traced.
    """

    stages: tuple[Stage, ...]
    graph_module: GraphModule = field(repr=False)
    fake_inputs: tuple[Any, ...] = field(repr=False)
    autocast: Autocast = ()

    @property
    def captured(self) -> str:
        """The graph as traced, with its markers."""
        return self.stages[0].text

    @property
    def rewritten(self) -> str:
        """The graph after the passes."""
        return self.stages[-1].text

    @property
    def changes(self) -> tuple[Change, ...]:
        """What each pass did or left alone, in order."""
        return tuple(change for stage in self.stages for change in stage.changes)

    @functools.cached_property
    def lowered_stages(self) -> tuple[tuple[Stage, ...], ...]:
        """The graphs that Inductor gets, forward and backward or one, before and after each pass. Traced anew."""
        return tuple(result.stages for result in lower(self.graph_module, self.fake_inputs, self.autocast))

    @property
    def lowered(self) -> tuple[str, ...]:
        """The graphs that Inductor gets: forward and backward, or one if nothing needs a gradient."""
        return tuple(stages[-1].text for stages in self.lowered_stages)

    def __str__(self) -> str:
        return "\n\n".join(str(stage) for stages in (self.stages, *self.lowered_stages) for stage in stages)


LOOP_USES = 4
"""A graph that multiplies with one weight so many times is a loop in Python that Dynamo has unrolled."""
WARN_OF_LOOPS, COMPILED_LOOPS = 2, 4
"""At how many lengths of such loops there is a warning, and how many lengths are compiled."""


class QuantizeBackend:
    """Rewrites markers and linears into int8 linears and hands the graph to Inductor; warns at the `limit`-th graph.

    Where nothing can be compiled (no compiler, no room for its results) the rewritten graph runs as it is, from then
    on, after one warning. Backward is compiled with its forward: it never fails because of that.
    """

    def __init__(self, record: list[Graph], limit: int) -> None:
        self.record = record
        self.limit = limit
        self.obstacle: cpu.Obstacle | None = None
        cpu.check_variant()
        decompositions.register()

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        result = pipeline.quantize(graph_module)
        if len(self.record) + 1 == self.limit:
            warnings.warn(
                f"model: its blocks were compiled {self.limit} times, expected a few. From now on new shapes and "
                "modes run eagerly: right, in int8, but slower. Print quaff_fx.graphs(model) to see what differs.",
                QuaffWarning,
                stacklevel=2,
            )
        graph = _graph(result, example_inputs)
        run: Callable[..., Any] | None = None
        if self._is_to_be_compiled(graph):
            run = self._compiled(result.graph_module, example_inputs)
        # Not earlier: a compilation that is interrupted leaves no trace.
        self.record.append(graph)
        return run or result.graph_module.forward

    def _compiled(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any] | None:
        """What Inductor makes of the graph; None if it cannot compile here."""
        self.obstacle = self.obstacle or cpu.obstacle()
        while self.obstacle is None:
            try:
                return _compile(graph_module, example_inputs)
            except Exception as error:
                if cpu.remove_cut_off(error):
                    continue
                # Where not even the kernel can be compiled, the reason is not in the graph.
                self.obstacle = cpu.obstacle_to_kernel() or cpu.obstacle_of(error)
                if self.obstacle is None:
                    raise
        dispatch.warn_of(self.obstacle)
        return None

    def _is_to_be_compiled(self, graph: Graph) -> bool:
        """False for loops of many lengths, each of which would take tens of seconds; warns before it comes to that."""
        length = loop_length(graph)
        lengths = {loop_length(other) for other in self.record} - {0}
        if length == 0 or length in lengths:
            return length == 0 or len(lengths) <= COMPILED_LOOPS
        if len(lengths) + 1 == WARN_OF_LOOPS:
            warnings.warn(
                f"model: a loop in Python around frozen linears was unrolled to {length} rounds and, before, to "
                f"{max(lengths)}, expected one length. Each new length is compiled anew, for tens of seconds, and from "
                f"the {COMPILED_LOOPS + 1}th on runs uncompiled: right, in int8, but slower. Put what the loop calls "
                "into an nn.ModuleList, whose modules are compiled by themselves, or pad to a few lengths.",
                QuaffWarning,
                stacklevel=2,
            )
        return len(lengths) < COMPILED_LOOPS


def loop_length(graph: Graph) -> int:
    """Returns how many rounds of a loop a graph holds, the products with its most used weight; 0 if it has no loop."""
    uses = Counter(change.site for change in graph.changes if change.action == "quantized")
    most = max(uses.values(), default=0)
    return most if most >= LOOP_USES else 0


def _compile(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    patches = {
        # Neither the FX graph cache nor AOTAutograd's looks at decompositions; this entry goes into both keys.
        "unsafe_marked_cacheable_functions": {"quaff_fx.decompositions": decompositions.cache_salt()},
        "post_grad_custom_pre_pass": _LoweringPasses(),
    }
    with _autograd_config():
        run: Callable[..., Any] = compile_fx.compile_fx(  # type: ignore[assignment]
            graph_module, list(example_inputs), inner_compile=_compile_inner, config_patches=patches
        )
    return run


class _LoweringPasses(CustomGraphPass):
    """The passes of `pipeline.lower`, where Inductor runs them."""

    def __call__(self, graph: fx.Graph) -> None:
        assert graph.owning_module is not None
        pipeline.lower(graph.owning_module, is_kept=False)

    def uuid(self) -> bytes:
        return get_hash_for_files(tuple(str(path) for path in sorted(Path(str(pipeline.__file__)).parent.glob("*.py"))))


def _autograd_config() -> contextlib.AbstractContextManager[Any]:
    """How AOTAutograd makes forward and backward of a graph; made anew, since several threads may be in it."""
    patch: contextlib.AbstractContextManager[Any] = torch._functorch.config.patch(
        # Normalized and gated activations, which adapters multiply in backward, are computed again from what is saved
        # anyway: one pointwise loop instead of a third of all saved activations.
        ban_recompute_materialized_backward=False,
        # Backward would write into a saved activation, and a second backward over the same forward would be an error.
        donated_buffer=False,
        # Otherwise backward is compiled when it first runs, in whatever thread, without this config.
        force_non_lazy_backward_lowering=True,
    )
    return patch


def _compile_inner(*args: Any, **kwargs: Any) -> Any:
    """`compile_fx_inner` with no donated buffers, said where a backward asks: not in the config of its own thread.

    A backward with `retain_graph=True` passes only if the list of donated buffers is empty, and without the config's
    switch, which is on again when backward runs, there is no list. It goes into AOTAutograd's cache with the graph.
    """
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []
    return compile_fx.compile_fx_inner(*args, **kwargs)


def lower(graph_module: GraphModule, fake_inputs: Sequence[Any], autocast: Autocast = ()) -> list[RunResult]:
    """Returns the graphs that Inductor gets: forward and backward, or one where nothing needs a gradient.

    Runs AOTAutograd with Inductor's decompositions and partitioner on fake tensors, under the `autocast` that the graph
    was traced under; compiles nothing.
    """
    results: list[RunResult] = []

    def keep(name: str) -> Callable[..., Any]:
        def compile_nothing(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            results.append(pipeline.lower(graph, before=name))
            return graph.forward

        return compile_nothing

    decompositions.register()
    compile_lowered = aot_autograd(
        fw_compiler=keep("lowered forward"),
        bw_compiler=keep("lowered backward"),
        inference_compiler=keep("lowered"),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_autograd_config())
        for kind, dtype, is_on in autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=is_on))
        compile_lowered(graph_module, list(fake_inputs))
    return results


def _graph(result: RunResult, example_inputs: Sequence[Any]) -> Graph:
    graph_module = result.graph_module
    inputs = (node for node in graph_module.graph.nodes if node.op == "placeholder")
    fake_inputs = tuple(
        node.meta.get("example_value", example) for node, example in zip(inputs, example_inputs, strict=False)
    )
    return Graph(result.stages, graph_module, fake_inputs, current_autocast())
