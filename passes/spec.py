"""What a legal graph is after each stage; the runner checks the result of the passes, not their intentions."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quaff_fx import ops
from quaff_fx.errors import PassError, ShapeError
from quaff_fx.kernels.dispatch import kernels_of
from quaff_fx.passes import lowered, matching
from quaff_fx.passes.infrastructure import subgraphs
from quaff_fx.passes.launch import KERNELS
from quaff_fx.passes.quantize import PARTS


def check_quantized(graph_module: GraphModule) -> None:
    """In a quantized graph every `quaff.linear` reads one activation, of its own x, quantized with its Q and rotation.

    Raises:
        PassError: it does not, a marker is read by a linear that could have been rewritten, or operands do not fit.
    """
    for node in _nodes(graph_module):
        _verify(node)
        if matching.is_call(node, ops.linear.target):
            _check_linear(node)
        operands = matching.linear_operands(node)
        if operands is not None and matching.int8_weight(operands[1]) is not None:
            raise PassError(f"{node}: multiplies a dequantized weight in float, expected {ops.linear.target}.")


def check_lowered(graph_module: GraphModule) -> None:
    """In a lowered graph only those `quaff` ops are left that Inductor gets as they are, with operands that fit.

    Raises:
        PassError: one is left that it should have got in parts, or operands do not fit.
    """
    for node in _nodes(graph_module):
        op = ops.OPS.get(node.target) if node.op == "call_function" else None
        if op is not None and op.lowered is not None:
            raise PassError(f"{node}: is {op.target}, expected what it is made of. Register the decompositions.")
        is_kernel = matching.is_call(node, *KERNELS)
        if is_kernel and kernels_of(lowered.value(node.all_input_nodes[0]).device).launched_by_inductor:
            raise PassError(f"{node}: is {node.target}, expected the launches of its kernel. Run LaunchKernels last.")
        _verify(node)


def _nodes(graph_module: GraphModule) -> Iterator[Node]:
    for graph in subgraphs(graph_module):
        yield from graph.graph.nodes


def _verify(node: Node) -> None:
    """Runs the verifier of an op, if the values of its operands are recorded; its fake does so when it is traced."""
    op = ops.OPS.get(node.target) if node.op == "call_function" else None
    if op is None or any(matching.value(operand) is None for operand in node.all_input_nodes):
        return
    try:
        op.verify(ops.operands(op.target, map_arg(node.args, matching.value), map_arg(node.kwargs, matching.value)))
    except ShapeError as error:
        raise PassError(f"{node}: {error}") from error


def _check_linear(node: Node) -> None:
    o = matching.operands(node)
    sources = set()
    for index, name in enumerate(PARTS):
        part = getattr(o, name)
        source, at = matching.element(part) or (None, None)
        if at != index:
            raise PassError(f"{node}: {name} is {part}, expected part {index} of a quantized activation.")
        sources.add(source)
    source = sources.pop()
    if sources or not isinstance(source, Node) or not matching.is_call(source, ops.quantize_activation.target):
        raise PassError(f"{node}: reads parts of {len(sources) + 1} activations, expected one.")
    of = matching.operands(source)
    if not matching.is_call(of.x, "detach") or matching.first_operand(of.x) is not o.x:
        raise PassError(f"{node}: reads {source} of another activation, expected of its own x, detached.")
    if (of.activation_max, of.rotation) != (o.activation_max, o.rotation):
        raise PassError(
            f"{node}: reads {source} of range ±{of.activation_max} and rotation {of.rotation}, expected range "
            f"±{o.activation_max} and rotation {o.rotation}."
        )
