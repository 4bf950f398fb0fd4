"""Kernels that Triton compiles become launches in the lowered graph, which Inductor's compiled code makes itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from quaff_fx import ops
from quaff_fx.kernels.dispatch import kernels_of
from quaff_fx.passes import lowered, matching
from quaff_fx.passes.infrastructure import Change, PassResult

KERNELS = (ops.int8_linear.target, ops.quantize_rows.target)
"""The ops that a kernel computes whole."""

_NAMES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)


@dataclass(frozen=True)
class LaunchKernels:
    """Traces the functions of a device whose kernels are Triton's into the graph, in the place of the ops they compute.

        y = quaff.int8_linear(x_int8, w_int8, False, x_scale, ...)

    Becomes:

        out = aten.empty([T, N], dtype=torch.bfloat16, ...)
        launched = triton_kernel_wrapper_functional(
            kernel_idx=3, constant_args_idx=5, grid=[(768, 1, 1)], kwargs={"a": x_int8, ..., "out": out},
            tensors_to_clone=["out"],
        )
        y = launched["out"]

    An op whose function launches kernels costs some 100 µs of Python at every call, more than many a kernel takes.
    Inductor launches what it finds in a graph without any, and plans its buffers: the scratch of one product's
    transposed weight is that of the next. Runs last, since the passes before it know the ops. It leaves alone the ops
    of devices whose kernels are no Triton kernels (`Kernels.launched_by_inductor`).
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        changes = []
        for node in list(graph.nodes):
            if not matching.is_call(node, *KERNELS):
                continue
            if not kernels_of(_device(node)).launched_by_inductor:
                continue
            _inline(node, _traced(node))
            changes.append(Change(matching.named_site(node), "launched"))
        lowered.sort(graph)  # a view that is shared may come before the size that it is given
        return PassResult(graph_module, tuple(changes))


def _device(node: Node) -> torch.device:
    return lowered.value(node.all_input_nodes[0]).device


def _traced(node: Node) -> GraphModule:
    """Returns the launches that the op of `node` makes for its operands, whose tensors it has as inputs, in order."""
    given, form = pytree.tree_flatten((node.args, node.kwargs))

    def compute(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(each, Node) else each for each in given], form)
        return ops.OPS[node.target].compute(*args, **kwargs)

    values = [lowered.value(each) for each in given if isinstance(each, Node)]
    traced: Callable[..., GraphModule] = make_fx(torch.func.functionalize(compute))
    with lowered.fake_mode(values):
        return traced(*values)


def _shared(node: Node) -> Node:
    """Returns one node for a tensor that is to be in memory, of all that view it in this shape.

    Inductor computes what a kernel reads where it stands, and once more for each other view of the same: it cannot know
    that the adapter's product reads the activation that the quantizer reads.
    """
    source = node
    while matching.is_call(source, *_NAMES, *lowered.VIEWS):
        source = matching.first_operand(source)  # type: ignore[assignment]
    if source is node or source.op == "placeholder":
        return node
    shape = str(tuple(lowered.value(node).shape))  # as text, since comparing sizes that are symbols would add guards
    views = [user for user in source.users if matching.is_call(user, *lowered.VIEWS)]
    same = [view for view in views if str(tuple(lowered.value(view).shape)) == shape]
    if not same:
        return node
    first, *others = same
    source.append(first)
    for other in (*others, node):
        if other is not first:
            other.replace_all_uses_with(first)
            lowered.erase_unused(source.graph, other)
    return first


def _inline(node: Node, body: GraphModule) -> None:
    """Puts `body` in the place of `node`; its placeholders are the nodes that `node` reads, in order."""
    graph = node.graph
    inputs = [_shared(each) for each in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(each, Node)]
    placeholders = [each for each in body.graph.nodes if each.op == "placeholder"]
    copies: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(body.graph, copies)
    for each in body.graph.nodes:
        if isinstance(copy := copies.get(each), Node) and each.op == "call_function":
            copy.meta = dict(each.meta) | {key: node.meta[key] for key in ("custom",) if key in node.meta}
    if isinstance(results, Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            source = matching.element(user)
            assert source is not None
            user.replace_all_uses_with(results[source[1]])
            graph.erase_node(user)
    lowered.erase_unused(graph, node)
