"""The order of the passes, in one place."""

from __future__ import annotations

from torch.fx import GraphModule

from quaff_fx.passes import spec
from quaff_fx.passes.factors import JoinFirstFactors
from quaff_fx.passes.fold import FoldLowRankProducts
from quaff_fx.passes.infrastructure import RunResult, run_passes
from quaff_fx.passes.join import JoinTerms
from quaff_fx.passes.launch import LaunchKernels
from quaff_fx.passes.normalize import NormalizeProducts
from quaff_fx.passes.quantize import QuantizeLinears
from quaff_fx.passes.readable import readable


def quantize(graph_module: GraphModule) -> RunResult:
    """Normalizes, then makes every linear with a marked weight an int8 linear."""
    # Normalize first: the other pass knows one form of product.
    passes = (NormalizeProducts(), QuantizeLinears())
    return run_passes(passes, graph_module, spec.check_quantized, before="captured", as_text=readable)


def lower(graph_module: GraphModule, *, before: str = "lowered", is_kept: bool = True) -> RunResult:
    """Rewrites a lowered graph, forward or backward, before Inductor does; keeps it as text if `is_kept`."""
    as_text = readable if is_kept else lambda _: ""
    # Fold first: it makes the terms that a kernel may want joined, and by which factors have a name. Launch last:
    # nothing knows a product afterwards.
    passes = (FoldLowRankProducts(), JoinFirstFactors(), JoinTerms(), LaunchKernels())
    return run_passes(passes, graph_module, spec.check_lowered, before=before, as_text=as_text)
