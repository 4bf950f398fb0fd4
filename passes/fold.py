"""Low-rank products that are added to an int8 product go into its epilogue."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from quaff_fx import ops
from quaff_fx.passes import lowered, matching
from quaff_fx.passes.infrastructure import Change, PassResult

INT8_LINEAR = ops.int8_linear.target
MAX_RANK = 64
"""Largest inner size of a product that is folded: a float product of a higher rank is no thin correction any more."""

_ADD = torch.ops.aten.add.Tensor
_CAT = torch.ops.aten.cat.default
_CONVERT = torch.ops.prims.convert_element_type.default
_MM = torch.ops.aten.mm.default
_MUL = torch.ops.aten.mul.Tensor


@dataclass(frozen=True)
class _Term:
    """An addend: `top` is `product` times `factor`, seen through `views`, which only the sum reads."""

    top: Node
    product: Node
    factor: float
    views: tuple[Node, ...]


@dataclass(frozen=True)
class FoldLowRankProducts:
    """Makes a low-rank product that is added to an int8 product a term of its epilogue.

        y = quaff.int8_linear(x_int8, w_int8, False, x_scale, w_scale, x_outlier, w_outlier, bias, dtype, 127, 1)
        z = aten.mm(h, b)  # (T, r) (r, N)
        out = aten.add(y, aten.mul(z, 2.0))

    Becomes:

        w = aten.mul(b, 2.0)
        out = quaff.int8_linear(
            x_int8, w_int8, False, x_scale, w_scale, x_outlier, w_outlier, bias, dtype, 127, 1, h, w
        )

    Runs on lowered graphs, forward and backward: it folds an adapter's ``B(A(x))`` in one and its part of the input's
    gradient in the other. The epilogue adds it up in registers, so the low-rank product, as large as y, is neither
    written nor read. Where a sum has several of both (q, k, v), each low-rank product goes to an int8 product of its
    own. It leaves alone what something else reads as well, what is broadcast, and ranks over `MAX_RANK`; where such a
    product is added to an int8 one, it says so. Sites have the names that `QuantizeLinears` gave them.
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        changes: list[Change] = []
        for node in list(graph.nodes):
            if _is_sum(node) and not any(_is_sum(user) and len(node.users) == 1 for user in node.users):
                changes += _fold(graph, node)
        return PassResult(graph_module, tuple(changes))


def _fold(graph: Graph, root: Node) -> list[Change]:
    """Folds what can be folded among the addends of `root`, the outermost of some additions."""
    terms = _terms(root)
    products = [term for term in terms if matching.is_call(term.product, INT8_LINEAR)]
    if not products:
        return []
    int8 = [term for term in products if term.factor == 1.0 and len(term.product.users) == 1]
    added = [term for term in terms if matching.is_call(term.product, _MM)]
    site = matching.named_site(products[0].product)
    reasons = {term: _reason_not_folded(term, is_alone=not int8) for term in added}
    declined = [Change(site, "left alone", reason) for reason in reasons.values() if reason]
    low_rank = [term for term, reason in reasons.items() if not reason]
    if not low_rank:
        return declined
    tops = {term: term.top for term in terms if term not in low_rank}
    order = {node: index for index, node in enumerate(graph.nodes)}
    dtype = lowered.value(root).dtype
    changes = []
    for term, share in zip(int8, (low_rank[index :: len(int8)] for index in range(len(int8))), strict=True):
        if share:
            last = max((term.product, *(t.product for t in share)), key=order.__getitem__)
            with graph.inserting_before(last.next):
                product = _with_low_rank(graph, term.product, share, dtype)
            changes += [Change(matching.named_site(term.product), "folded") for _ in share]
            term.product.replace_all_uses_with(product)
            graph.erase_node(term.product)
            tops[term] = term.views[-1] if term.views else product
            for node in term.views:  # their only reader is the sum, so they can be computed right before it
                root.prepend(node)
                node.meta["val"] = lowered.value_of_call(node)
    with graph.inserting_before(root):
        first, *others = tops.values()
        total = first
        for top in others:
            total = lowered.call(graph, _ADD, self=total, other=top)
    root.replace_all_uses_with(total)
    lowered.erase_unused(graph, root)
    return changes + declined


def _reason_not_folded(term: _Term, is_alone: bool) -> str:
    """Why a product that is added to an int8 product stays out of its epilogue; empty if nothing keeps it."""
    rank = lowered.value(matching.operands(term.product).self).shape[1]
    if not isinstance(rank, int) or rank > MAX_RANK:
        return f"a product of rank {rank} is added to it, folded are those of at most {MAX_RANK}"
    if len(term.product.users) > 1:
        return "a product that something else reads as well is added to it"
    return "a low-rank product is added to it where it is scaled, or read by something else as well" if is_alone else ""


def _with_low_rank(graph: Graph, product: Node, share: Iterable[_Term], dtype: torch.dtype) -> Node:
    """Inserts `product` again, with the low-rank products of `share` as its low-rank term and a result of `dtype`."""
    o = matching.operands(product)
    columns = [] if o.a_low_rank is None else [o.a_low_rank]
    rows = [] if o.w_low_rank is None else [o.w_low_rank]
    for term in share:
        low_rank = matching.operands(term.product)
        columns.append(low_rank.self)
        row = low_rank.mat2
        rows.append(row if term.factor == 1.0 else _scaled(graph, row, term.factor))
    o.a_low_rank = columns[0] if len(columns) == 1 else lowered.call(graph, _CAT, tensors=columns, dim=1)
    o.w_low_rank = rows[0] if len(rows) == 1 else lowered.call(graph, _CAT, tensors=rows)
    o.out_dtype = dtype
    return lowered.call_again(graph, product, o)


def _scaled(graph: Graph, row: Node, factor: float) -> Node:
    """Inserts `row` times a number, in float32 unless that is exact in its own dtype: times a power of two."""
    if abs(math.frexp(factor)[0]) != 0.5:
        row = lowered.converted(graph, row, torch.float32)
    return lowered.call(graph, _MUL, self=row, other=factor)


def _terms(root: Node) -> list[_Term]:
    """Returns the addends of `root` and of the additions below it that only it reads, in order."""
    terms: list[_Term] = []
    addends = matching.operands(root)
    for operand in (addends.self, addends.other):
        terms += _terms(operand) if _is_sum(operand) and len(operand.users) == 1 else [_term(operand)]
    return terms


def _term(top: Node) -> _Term:
    """Looks from an addend through views, conversions and products with a number to what they show."""
    node, factor = top, 1.0
    views: list[Node] = []
    while len(node.users) == 1 and isinstance(below := matching.first_operand(node), Node):
        if matching.is_call(node, _MUL) and isinstance(number := matching.operands(node).other, (int, float)):
            factor *= number
        elif not matching.is_call(node, *lowered.VIEWS, _CONVERT):
            break
        views.insert(0, node)
        node = below
    keeps_rows = lowered.value(node).shape[-1:] == lowered.value(top).shape[-1:]
    return _Term(top, node, factor, tuple(views)) if keeps_rows else _Term(top, top, 1.0, ())


def _is_sum(node: Node) -> bool:
    """Tells whether `node` adds two tensors of one shape."""
    if not matching.is_call(node, _ADD) or len(node.all_input_nodes) == 0:
        return False
    o = matching.operands(node)
    if o.alpha != 1 or not isinstance(o.self, Node) or not isinstance(o.other, Node):
        return False
    # As text, since comparing sizes that are symbols would add guards.
    return len({str(tuple(lowered.value(tensor).shape)) for tensor in (node, o.self, o.other)}) == 1
