"""The order of the passes, in one place."""

from __future__ import annotations

from quaff_fx.passes import spec
from quaff_fx.passes.fold import FoldLowRankProducts
from quaff_fx.passes.infrastructure import PassResult, run_passes
from quaff_fx.passes.normalize import NormalizeProducts
from quaff_fx.passes.quantize import QuantizeLinears
from torch.fx import GraphModule


def quantize(graph_module: GraphModule) -> PassResult:
    """Normalizes, then makes every linear with a marked weight an int8 linear."""
    # Normalize first: the other pass knows one form of product.
    return run_passes((NormalizeProducts(), QuantizeLinears()), graph_module, spec.check_quantized)


def lower(graph_module: GraphModule) -> PassResult:
    """Rewrites a lowered graph, forward or backward, before Inductor does."""
    return run_passes((FoldLowRankProducts(),), graph_module)
