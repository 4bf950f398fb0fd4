"""What passes over lowered graphs insert: calls with the fake values that Inductor reads shapes and dtypes from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node, map_arg

from quaff_fx import ops
from quaff_fx.inductor import pattern_matcher
from quaff_fx.passes import matching

_CONVERT = torch.ops.prims.convert_element_type.default

VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)


def value(node: Any) -> Tensor:
    """Returns the fake tensor of a node."""
    value: Tensor = node.meta["val"]
    return value


def fake_mode(values: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Returns the mode of fake tensors that these values belong to; none if they are real."""
    mode: AbstractContextManager[Any] | None = detect_fake_mode(values)
    return mode or nullcontext()


def value_of_call(node: Node) -> Tensor:
    """Returns the fake tensor that a call gives for the ones of its operands."""
    value_: Tensor = node.target(*map_arg(node.args, value))  # type: ignore[operator]
    return value_


def call(graph: Graph, target: Any, **operands: Any) -> Node:
    """Inserts a call of an op of torch, whose operands are named as in its schema, with its value."""
    node = matching.call(graph, target, **operands)
    node.meta["val"] = value_of_call(node)
    return node


def converted(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    """Inserts a cast, or returns `node` if it has that dtype."""
    return node if value(node).dtype == dtype else call(graph, _CONVERT, a=node, dtype=dtype)


def call_again(graph: Graph, node: Node, operands: ops.Operands) -> Node:
    """Inserts the call that `node` is with other operands; it stands for the same site."""
    again = call(graph, node.target, **vars(operands))
    if "custom" in node.meta:
        again.meta["custom"] = node.meta["custom"]
    return again


def revalue_views(node: Node) -> None:
    """Gives what views a node, directly or not, the strides that it has now."""
    for user in node.users:
        if matching.is_call(user, *VIEWS):
            user.meta["val"] = value_of_call(user)
            revalue_views(user)


def sort(graph: Graph) -> None:
    """Moves what stands before its operands behind them; all else stays where it is."""
    pattern_matcher.stable_topological_sort(graph)


def erase_unused(graph: Graph, node: Node) -> None:
    """Erases `node` and what only it read, if nothing reads it."""
    if node.users or node.op != "call_function":
        return
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        erase_unused(graph, operand)
