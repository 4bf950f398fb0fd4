"""What a legal graph is after each stage; the runner checks the result of the passes, not their intentions."""

from __future__ import annotations

import operator

from quaff_fx.passes import matching, quantize
from quaff_fx.passes.infrastructure import subgraphs
from torch.fx import GraphModule, Node

from quaff_fx.errors import PassError


def check_quantized(graph_module: GraphModule) -> None:
    """In a quantized graph every `quaff.linear` reads one activation, of its own x, quantized with its Q and rotation.

    Raises:
        PassError: it does not, or a marker is read by a linear that could have been rewritten.
    """
    for graph in subgraphs(graph_module):
        for node in graph.graph.nodes:
            if matching.is_call(node, quantize.LINEAR):
                _check_linear(node)
            operands = matching.linear_operands(node)
            if operands is not None and matching.int8_weight(operands[1]) is not None:
                raise PassError(f"{node}: multiplies a dequantized weight in float, expected {quantize.LINEAR}.")


def _check_linear(node: Node) -> None:
    x, *parts = node.args[:4]
    sources = set()
    for index, part in enumerate(parts):
        if not matching.is_call(part, operator.getitem) or part.args[1] != index:  # type: ignore[union-attr]
            raise PassError(f"{node}: argument {index + 1} is {part}, expected part {index} of a quantized activation.")
        sources.add(part.args[0])  # type: ignore[union-attr]
    source = sources.pop()
    if sources or not isinstance(source, Node) or not matching.is_call(source, quantize.QUANTIZE_ACTIVATION):
        raise PassError(f"{node}: reads parts of {len(sources) + 1} activations, expected one.")
    detached, _, _, *numbers = source.args
    if not matching.is_call(detached, "detach") or detached.args[0] is not x:  # type: ignore[union-attr]
        raise PassError(f"{node}: reads {source} of another activation, expected of its own x, detached.")
    if tuple(numbers) != node.args[-2:]:
        expected = "range ±{} and rotation {}".format(*node.args[-2:])
        raise PassError(
            f"{node}: reads {source} of range ±{numbers[0]} and rotation {numbers[1]}, expected {expected}."
        )
