"""Low-rank products that are added to an int8 product go into its epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from quaff_fx.passes import matching
from quaff_fx.passes.infrastructure import Change, PassResult
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg

INT8_LINEAR = torch.ops.quaff.int8_linear.default
MAX_RANK = 64
"""Largest inner size of a product that is folded: a float product of a higher rank is no thin correction any more."""

_ADD = torch.ops.aten.add.Tensor
_CAT = torch.ops.aten.cat.default
_CONVERT = torch.ops.prims.convert_element_type.default
_MM = torch.ops.aten.mm.default
_MUL = torch.ops.aten.mul.Tensor
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)

_A_OUTLIER, _W_OUTLIER, _OUT_DTYPE = 5, 6, 8
"""Positions among the arguments of `quaff.int8_linear`."""


@dataclass(frozen=True)
class _Term:
    """An addend: `top` is `product` times `factor`, seen through `views`, which only the sum reads."""

    top: Node
    product: Node
    factor: float
    views: tuple[Node, ...]


@dataclass(frozen=True)
class FoldLowRankProducts:
    """Makes a low-rank product that is added to an int8 product part of its outlier correction.

        y = quaff.int8_linear(x_int8, w_int8, False, x_scale, w_scale, x_outlier, w_outlier, bias, dtype, 127, 1)
        z = aten.mm(h, b)  # (T, r) (r, N)
        out = aten.add(y, aten.mul(z, 2.0))

    Becomes:

        a = aten.cat([x_outlier, h], 1)
        w = aten.cat([w_outlier, aten.mul(b, 2.0)])
        out = quaff.int8_linear(x_int8, w_int8, False, x_scale, w_scale, a, w, bias, dtype, 127)

    Runs on lowered graphs, forward and backward: it folds an adapter's ``B(A(x))`` in one and its part of the input's
    gradient in the other. The epilogue adds it up in registers, so the low-rank product, as large as y, is neither
    written nor read. Where a sum has several of both (q, k, v), each low-rank product goes to an int8 product of its
    own. It leaves alone what something else reads as well, what is broadcast, and ranks over `MAX_RANK`.
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
    ours = [term for term in terms if len(term.product.users) == 1]
    int8 = [term for term in ours if term.factor == 1.0 and matching.is_call(term.product, INT8_LINEAR)]
    low_rank = [term for term in ours if _is_low_rank(term.product)]
    if not int8 or not low_rank:
        return []
    tops = {term: term.top for term in terms if term not in low_rank}
    order = {node: index for index, node in enumerate(graph.nodes)}
    dtype = _value(root).dtype
    for term, share in zip(int8, (low_rank[index :: len(int8)] for index in range(len(int8))), strict=True):
        if share:
            last = max((term.product, *(t.product for t in share)), key=order.__getitem__)
            with graph.inserting_before(last.next):
                product = _with_low_rank(graph, term.product, share, dtype)
            term.product.replace_all_uses_with(product)
            graph.erase_node(term.product)
            tops[term] = term.views[-1] if term.views else product
            for node in term.views:  # their only reader is the sum, so they can be computed right before it
                root.prepend(node)
                node.meta["val"] = _value_of_call(node)
    with graph.inserting_before(root):
        first, *others = tops.values()
        total = first
        for top in others:
            total = _call(graph, _ADD, total, top)
    root.replace_all_uses_with(total)
    _erase_unused(graph, root)
    return [Change(term.product.name, "folded") for term in low_rank]


def _with_low_rank(graph: Graph, product: Node, share: list[_Term], dtype: torch.dtype) -> Node:
    """Inserts `product` again, with the low-rank products of `share` in its correction and a result of `dtype`."""
    arguments = list(product.args)
    a, w = arguments[_A_OUTLIER], arguments[_W_OUTLIER]
    columns = [a] if a is not None else []
    rows = [w] if w is not None else []
    for term in share:
        low_rank_a, low_rank_w = term.product.args
        columns.append(_as_float32(graph, low_rank_a))
        row = _as_float32(graph, low_rank_w)
        rows.append(row if term.factor == 1.0 else _call(graph, _MUL, row, term.factor))
    arguments[_A_OUTLIER] = columns[0] if len(columns) == 1 else _call(graph, _CAT, columns, 1)
    arguments[_W_OUTLIER] = rows[0] if len(rows) == 1 else _call(graph, _CAT, rows)
    arguments[_OUT_DTYPE] = dtype
    return _call(graph, INT8_LINEAR, *arguments)


def _erase_unused(graph: Graph, node: Node) -> None:
    """Erases `node` and what only it read, if nothing reads it."""
    if node.users or node.op != "call_function":
        return
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        _erase_unused(graph, operand)


def _terms(root: Node) -> list[_Term]:
    """Returns the addends of `root` and of the additions below it that only it reads, in order."""
    terms: list[_Term] = []
    for operand in root.args[:2]:
        assert isinstance(operand, Node)
        terms += _terms(operand) if _is_sum(operand) and len(operand.users) == 1 else [_term(operand)]
    return terms


def _term(top: Node) -> _Term:
    """Looks from an addend through views, conversions and products with a number to what they show."""
    node, factor = top, 1.0
    views: list[Node] = []
    while len(node.users) == 1 and isinstance(below := node.args[0] if node.args else None, Node):
        if matching.is_call(node, _MUL) and isinstance(node.args[1], (int, float)):
            factor *= node.args[1]
        elif not matching.is_call(node, *_VIEWS, _CONVERT):
            break
        views.insert(0, node)
        node = below
    keeps_rows = _value(node).shape[-1:] == _value(top).shape[-1:]
    return _Term(top, node, factor, tuple(views)) if keeps_rows else _Term(top, top, 1.0, ())


def _is_sum(node: Node) -> bool:
    """Tells whether `node` adds two tensors of one shape."""
    if not matching.is_call(node, _ADD) or node.kwargs or not all(isinstance(operand, Node) for operand in node.args):
        return False
    # As text, since comparing sizes that are symbols would add guards.
    return len({str(tuple(_value(tensor).shape)) for tensor in (node, *node.args)}) == 1


def _is_low_rank(node: Node) -> bool:
    if not matching.is_call(node, _MM):
        return False
    rank = _value(node.args[0]).shape[1]
    return isinstance(rank, int) and rank <= MAX_RANK


def _as_float32(graph: Graph, node: Any) -> Node:
    return node if _value(node).dtype == torch.float32 else _call(graph, _CONVERT, node, torch.float32)


def _call(graph: Graph, target: Any, *arguments: Any) -> Node:
    """Inserts a call, with the value that Inductor reads shapes from."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = _value_of_call(node)
    return node


def _value_of_call(node: Node) -> Tensor:
    value: Tensor = node.target(*map_arg(node.args, _value))  # type: ignore[operator]
    return value


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
