"""The thin products of adapters that read the same activation become one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from quaff_fx.kernels.dispatch import kernels_of
from quaff_fx.passes import lowered, matching
from quaff_fx.passes.fold import INT8_LINEAR, MAX_RANK
from quaff_fx.passes.infrastructure import Change, PassResult

_CAT = torch.ops.aten.cat.default
_CONVERT = torch.ops.prims.convert_element_type.default
_MM = torch.ops.aten.mm.default
_PERMUTE = torch.ops.aten.permute.default
_SLICE = torch.ops.aten.slice.Tensor


@dataclass(frozen=True)
class JoinFirstFactors:
    """Makes one product of the first factors of adapters, and one of their gradients, where they read the same x.

        h_q = aten.mm(x, aten.permute(a_q, [1, 0]))  # (T, K) (K, r)
        h_k = aten.mm(x, aten.permute(a_k, [1, 0]))

    Becomes:

        h = aten.mm(x, aten.permute(aten.cat([a_q, a_k]), [1, 0]))
        h_q = aten.slice(h, 1, 0, r)
        h_k = aten.slice(h, 1, r, 2 r)

    In backward, where ``aten.mm(aten.permute(dh_q, [1, 0]), x)`` is the gradient of a_q, the dh are joined. Both read x
    once instead of once for each adapter, and fill a card's tiles three times as well; a launch is saved for each.
    It leaves alone factors that are no inputs, gradients that are no results, and devices on which a small product
    costs no launch (`Kernels.launched_by_inductor`).
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        changes = []
        for join, operand, width in ((_join_factors, "self", 1), (_join_gradients, "mat2", 0)):
            readers: dict[Node, list[Node]] = defaultdict(list)
            for node in graph.nodes:
                if matching.is_call(node, _MM) and _is_on_card(node) and _is_thin(node, width):
                    readers[getattr(matching.operands(node), operand)].append(node)
            for x, same in readers.items():
                if len(same) > 1 and len({lowered.value(node).dtype for node in same}) == 1:
                    changes += join(graph, x, same)
        lowered.sort(graph)
        return PassResult(graph_module, tuple(changes))


def _is_on_card(node: Node) -> bool:
    return kernels_of(lowered.value(node).device).launched_by_inductor


def _is_thin(node: Node, dimension: int) -> bool:
    """Tells whether the result of a product has at most `MAX_RANK` elements along a dimension."""
    size = lowered.value(node).shape[dimension]
    return isinstance(size, int) and size <= MAX_RANK


def _join_factors(graph: Graph, x: Node, products: Sequence[Node]) -> list[Change]:
    """Makes one of ``x aᵢᵀ``."""
    factors = [_transposed(matching.operands(node).mat2) for node in products]
    if not all(_is_of_inputs(factor) for factor in factors):
        return []
    with graph.inserting_before(products[0]):
        joined = lowered.call(graph, _CAT, tensors=factors)
        turned = lowered.call(graph, _PERMUTE, self=joined, dims=[1, 0])
        product = lowered.call(graph, _MM, self=x, mat2=turned)
        return _replaced_by_slices(graph, product, products, 1)


def _join_gradients(graph: Graph, x: Node, products: Sequence[Node]) -> list[Change]:
    """Makes one of ``dhᵢᵀ x``."""
    gradients = [_transposed(matching.operands(node).self) for node in products]
    if None in gradients or not all(map(_is_result, products)):
        return []
    with graph.inserting_before(products[-1]):
        joined = lowered.call(graph, _CAT, tensors=gradients, dim=1)
        turned = lowered.call(graph, _PERMUTE, self=joined, dims=[1, 0])
        product = lowered.call(graph, _MM, self=turned, mat2=x)
        return _replaced_by_slices(graph, product, products, 0)


def _replaced_by_slices(graph: Graph, product: Node, products: Sequence[Node], dimension: int) -> list[Change]:
    start, parts = 0, []
    for node in products:
        end = start + lowered.value(node).shape[dimension]
        parts.append(lowered.call(graph, _SLICE, self=product, dim=dimension, start=start, end=end))
        start = end
    for node, part in zip(products, parts, strict=True):
        node.replace_all_uses_with(part)
        lowered.revalue_views(part)
        lowered.erase_unused(graph, node)
    return [Change(_site_of(part), "joined") for part in parts]


def _site_of(part: Node) -> str:
    """Returns the site whose int8 product takes `part` as its low-rank term; else the name of the node."""
    named = (matching.named_site(user) for user in part.users if matching.is_call(user, INT8_LINEAR))
    return next(named, part.name)


def _transposed(node: Node) -> Node | None:
    """Returns what a matrix is the transpose of; None if it is no transpose."""
    return matching.first_operand(node) if matching.is_call(node, _PERMUTE) else None  # type: ignore[return-value]


def _is_of_inputs(node: Node | None) -> bool:
    """Tells whether a node is an input of the graph, or a cast of one: it depends on none of the products."""
    while node is not None and matching.is_call(node, _CONVERT):
        node = matching.first_operand(node)  # type: ignore[assignment]
    return node is not None and node.op == "placeholder"


def _is_result(node: Node) -> bool:
    """Tells whether nothing but the graph's output reads a node, perhaps through transposes and casts."""
    return all(
        user.op == "output" or (matching.is_call(user, _PERMUTE, _CONVERT) and _is_result(user)) for user in node.users
    )
