"""Every way of multiplying by a frozen weight, written as one: `linear`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from quaff_fx.passes import matching
from quaff_fx.passes.infrastructure import Change, PassResult


@dataclass(frozen=True)
class NormalizeProducts:
    """Rewrites products with a marked weight into `linear` with the weight, or its one transpose, as second argument.

        w = quaff.dequantize_weight(w_int8, ...)
        wt = w.t()
        y = torch.addmm(bias, x, wt)

    Becomes:

        w = quaff.dequantize_weight(w_int8, ...)
        y = torch.nn.functional.linear(x, w, bias)

    GPT-2's Conv1D traces as `addmm`, `x @ w.T` and `x @ w` as `matmul`; the passes after this one match one form. A
    cast of the weight is left out if it changes nothing (DoRA casts to the dtype of x), else it comes last. Under
    autocast (a traced product whose result has another dtype than x) x is cast, as autocast does: the passes after this
    one give a linear the dtype of its x. It leaves alone products whose weight is the left operand and `addmm` whose
    first operand is no vector: they are no linears, and the passes after this one say so.
    Products of one x read one cast of it, so that they can share its quantized form.
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        changes = []
        graph = graph_module.graph
        casts: dict[tuple[Argument, torch.dtype], Node] = {}
        for node in list(graph.nodes):
            if matching.may_mutate(node):
                casts.clear()  # x may have changed, through an alias too
            form = _linear_form(node)
            if form is None:
                continue
            x, (view, marker, transposed), bias = form
            with graph.inserting_before(node):
                if (dtype := _autocast_dtype(node, x)) is not None:
                    if (x, dtype) not in casts:
                        casts[x, dtype] = _cast(graph, x, dtype)
                    x = casts[x, dtype]
                weight = graph.call_method("t", (marker,)) if transposed else marker
                if matching.dtype(view) != matching.dtype(marker):
                    weight = graph.call_method("to", (weight, matching.dtype(view)))
                    weight.meta = dict(view.meta)
                linear = graph.call_function(matching.LINEAR, (x, weight, bias))
            linear.meta = dict(node.meta)
            node.replace_all_uses_with(linear)
            graph.erase_node(node)
            changes.append(Change(matching.site_name(marker), "normalized"))
        erase_unused_views(graph)
        return PassResult(graph_module, tuple(changes))


def _linear_form(node: Node) -> tuple[Argument, tuple[Node, Node, bool], Argument] | None:
    """Returns x, weight and bias of a linear; the weight as what the product reads, its marker, and whether it is that
    transposed. None where nothing is to be rewritten.
    """
    if (operands := matching.product_operands(node)) is not None:
        x, w, bias = operands
        weight = matching.marked_weight(w)
        if weight is None or (bias is not None and matching.dimensions(bias) != 1):
            return None
        marker, transposed = weight
        assert isinstance(w, Node)
        return x, (w, marker, not transposed), bias
    if (operands := matching.linear_operands(node)) is not None:
        x, w, bias = operands
        weight = matching.marked_weight(w)
        if weight is None:
            return None
        marker, transposed = weight
        assert isinstance(w, Node)
        is_written = node.target is matching.LINEAR and len(node.args) == 3 and _autocast_dtype(node, x) is None
        return None if is_written and _is_simple(w, marker, transposed) else (x, (w, marker, transposed), bias)
    return None


def _autocast_dtype(product: Node, x: Argument) -> torch.dtype | None:
    """Returns the dtype that autocast gave a traced product, None if it is the dtype of x."""
    traced, given = matching.dtype(product), matching.dtype(x)
    return traced if traced != given and traced is not None and given is not None else None


def _cast(graph: Graph, x: Argument, dtype: torch.dtype) -> Node:
    assert isinstance(x, Node)
    cast = graph.call_method("to", (x, dtype))
    key = "example_value" if "example_value" in x.meta else "val"
    with torch.no_grad():
        cast.meta[key] = x.meta[key].to(dtype)
    return cast


def _is_simple(w: Node, marker: Node, transposed: bool) -> bool:
    """Tells whether `w` is the marker, its one transpose, or one cast of either to another dtype."""
    if matching.is_call(w, "to") and matching.dtype(w) != matching.dtype(marker):
        w = matching.first_operand(w)  # type: ignore[assignment]
    return (matching.transposed_operand(w) if transposed else w) is marker


def erase_unused_views(graph: Graph) -> None:
    """Erases the transposes and casts of marked weights that nothing reads."""
    for node in reversed(list(graph.nodes)):
        is_view = matching.transposed_operand(node) is not None or matching.copied_operand(node) is not None
        if not node.users and is_view and matching.marked_weight(node):
            graph.erase_node(node)
