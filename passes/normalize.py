"""Every way of multiplying by a frozen weight, written as one: `linear`."""

from __future__ import annotations

from dataclasses import dataclass

from quaff_fx.passes import matching
from quaff_fx.passes.infrastructure import Change, PassResult
from torch.fx import GraphModule, Node
from torch.fx.node import Argument


@dataclass(frozen=True)
class NormalizeProducts:
    """Rewrites products with a marked weight into `linear` with the weight, or its one transpose, as second argument.

        w = quaff.observe_weight(p, ...)
        wt = w.t()
        y = torch.addmm(bias, x, wt)

    Becomes:

        w = quaff.observe_weight(p, ...)
        y = torch.nn.functional.linear(x, w, bias)

    GPT-2's Conv1D traces as `addmm`, `x @ w.T` and `x @ w` as `matmul`; the passes after this one match one form.
    It leaves alone products whose weight is the left operand and `addmm` whose first operand is no vector: they are
    no linears, and the passes after this one say so.
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        changes = []
        graph = graph_module.graph
        for node in list(graph.nodes):
            form = _linear_form(node)
            if form is None:
                continue
            x, (marker, transposed), bias = form
            with graph.inserting_before(node):
                weight = graph.call_method("t", (marker,)) if transposed else marker
                linear = graph.call_function(matching.LINEAR, (x, weight, bias))
            linear.meta = dict(node.meta)
            node.replace_all_uses_with(linear)
            graph.erase_node(node)
            changes.append(Change(matching.site_name(marker), "normalized"))
        _erase_unused_transposes(graph_module)
        return PassResult(graph_module, tuple(changes))


def _linear_form(node: Node) -> tuple[Argument, tuple[Node, bool], Argument] | None:
    """Returns x, marker and its transposition as a linear's weight, bias; None where nothing is to be rewritten."""
    if (operands := matching.product_operands(node)) is not None:
        x, w, bias = operands
        weight = matching.marked_weight(w)
        if weight is None or (bias is not None and matching.dimensions(bias) != 1):
            return None
        marker, transposed = weight
        return x, (marker, not transposed), bias
    if (operands := matching.linear_operands(node)) is not None:
        x, w, bias = operands
        weight = matching.marked_weight(w)
        if weight is None:
            return None
        marker, transposed = weight
        simple = matching.transposed_operand(w) if transposed else w
        if simple is marker and node.target is matching.LINEAR and len(node.args) == 3:
            return None
        return x, weight, bias
    return None


def _erase_unused_transposes(graph_module: GraphModule) -> None:
    for node in reversed(list(graph_module.graph.nodes)):
        if not node.users and matching.transposed_operand(node) is not None and matching.marked_weight(node):
            graph_module.graph.erase_node(node)
