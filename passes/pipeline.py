"""The order of the passes, in one place."""

from __future__ import annotations

from quaff_fx.passes import spec
from quaff_fx.passes.fold import FoldLowRankProducts
from quaff_fx.passes.infrastructure import PassResult, run_passes
from quaff_fx.passes.normalize import NormalizeProducts
from quaff_fx.passes.observe import ObserveActivations
from quaff_fx.passes.quantize import QuantizeLinears
from torch.fx import GraphModule


def observe(graph_module: GraphModule, threshold: float) -> PassResult:
    """Normalizes, then puts an observer on every activation of a marked weight."""
    # Normalize first: the other passes know one form of product.
    return run_passes((NormalizeProducts(), ObserveActivations(threshold)), graph_module, spec.check_observed)


def quantize(graph_module: GraphModule) -> PassResult:
    """Normalizes, then makes every linear with a marked weight an int8 linear."""
    return run_passes((NormalizeProducts(is_sharing_casts=True), QuantizeLinears()), graph_module, spec.check_quantized)


def lower(graph_module: GraphModule) -> PassResult:
    """Rewrites a lowered graph, forward or backward, before Inductor does."""
    return run_passes((FoldLowRankProducts(),), graph_module)
