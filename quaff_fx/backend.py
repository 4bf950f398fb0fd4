"""The Dynamo backend: rewrites what was traced and hands it to Inductor.

With `decompositions.py` and `calls.py` the only files of the package that touch torch's private modules
(read in torch 2.13).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule

from quaff_fx import decompositions
from quaff_fx.errors import QuaffWarning
from quaff_fx.passes import pipeline
from quaff_fx.passes.infrastructure import Change
from quaff_fx.readable import readable

Autocast = tuple[tuple[str, torch.dtype, bool], ...]
"""Device type, dtype and whether it is on, per kind of device."""


def current_autocast() -> Autocast:
    """Returns the autocast that code runs under at this moment."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return tuple((kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in devices)


@dataclass
class CompiledGraph:
    """One traced graph, as text at each stage, with what the passes changed.

    Attributes:
        captured: the traced graph with its markers. rewritten: the graph after the passes.
        changes: what each pass did or left alone, in order.
        graph_module, fake_inputs: the rewritten graph with fake inputs of the traced shapes, for `lower`.
        autocast: what was on while it was traced.
    """

    captured: str
    rewritten: str
    changes: tuple[Change, ...]
    graph_module: GraphModule = field(repr=False)
    fake_inputs: tuple[Any, ...] = field(repr=False)
    autocast: Autocast = ()


class QuantizeBackend:
    """Rewrites markers and linears into int8 linears and hands the graph to Inductor; warns at the `limit`-th graph."""

    def __init__(self, record: list[CompiledGraph], limit: int) -> None:
        self.record = record
        self.limit = limit
        decompositions.register()

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = readable(graph_module)
        result = pipeline.quantize(graph_module)
        if len(self.record) + 1 == self.limit:
            warnings.warn(
                f"model: its blocks were compiled {self.limit} times, expected a few. From now on new shapes and "
                "modes run eagerly: right, in int8, but slower. Print quaff_fx.graphs(model) to see what differs.",
                QuaffWarning,
                stacklevel=2,
            )
        self.record.append(_compiled_graph(captured, result.graph_module, result.changes, example_inputs))
        patches = {
            # Neither the FX graph cache nor AOTAutograd's looks at decompositions; this entry goes into both keys.
            "unsafe_marked_cacheable_functions": {"quaff_fx.decompositions": decompositions.cache_salt()},
            "post_grad_custom_pre_pass": _LoweringPasses(),
        }
        with _PARTITION:
            run = compile_fx(result.graph_module, list(example_inputs), config_patches=patches)
        return cast("Callable[..., Any]", run)


class _LoweringPasses(CustomGraphPass):
    """The passes of `pipeline.lower`, where Inductor runs them."""

    def __call__(self, graph: Graph) -> None:
        pipeline.lower(graph.owning_module)

    def uuid(self) -> bytes:
        return get_hash_for_files(tuple(str(path) for path in sorted(Path(str(pipeline.__file__)).parent.glob("*.py"))))


# Normalized and gated activations, which adapters multiply in backward, are computed again from what is saved anyway:
# one pointwise loop instead of a third of all saved activations. (Read in torch 2.13.)
_PARTITION = torch._functorch.config.patch(ban_recompute_materialized_backward=False)


def lower(graph_module: GraphModule, fake_inputs: Sequence[Any], autocast: Autocast = ()) -> list[GraphModule]:
    """Returns the graphs that Inductor gets: forward and backward, or one where nothing needs a gradient.

    Runs AOTAutograd with Inductor's decompositions and partitioner on fake tensors, under the `autocast` that the graph
    was traced under; compiles nothing.
    """
    lowered: list[GraphModule] = []

    def keep(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        lowered.append(pipeline.lower(graph).graph_module)
        return graph.forward

    decompositions.register()
    compile_lowered = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        inference_compiler=keep,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    # Otherwise the backward graph is lowered when a backward first runs.
    with contextlib.ExitStack() as stack:
        stack.enter_context(_PARTITION)
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        for kind, dtype, is_on in autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=is_on))
        compile_lowered(graph_module, list(fake_inputs))
    return lowered


def _compiled_graph(
    captured: str, graph_module: GraphModule, changes: tuple[Change, ...], example_inputs: Sequence[Any]
) -> CompiledGraph:
    rewritten = readable(graph_module)
    fake_inputs = tuple(
        node.meta.get("example_value", example)
        for node, example in zip(
            (n for n in graph_module.graph.nodes if n.op == "placeholder"), example_inputs, strict=False
        )
    )
    return CompiledGraph(captured, rewritten, changes, graph_module, fake_inputs, current_autocast())
