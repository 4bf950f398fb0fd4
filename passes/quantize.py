"""Markers of quantized weights and their linears become int8 linears."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from quaff_fx.passes import matching
from quaff_fx.passes.infrastructure import Change, PassResult
from quaff_fx.passes.normalize import erase_unused_views
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from quaff_fx.errors import PassError
from quaff_fx.ops import STATIC_MOMENTUM

QUANTIZE_ACTIVATION = torch.ops.quaff.quantize_activation.default
UPDATE_SMOOTHING_SCALE = torch.ops.quaff.update_smoothing_scale.default
LINEAR = torch.ops.quaff.linear.default


@dataclass(frozen=True)
class QuantizeLinears:
    """Rewrites marker + linear into a quantized activation and `quaff.linear`.

        w = quaff.dequantize_weight(
            w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s, 0.1, 127, True, dtype, 64
        )
        y = linear(x, w, bias)

    Becomes:

        detached = x.detach()
        x_int8, x_scale, x_outlier = quaff.quantize_activation(detached, channels, s, 127, 64)
        next_s.copy_(quaff.update_smoothing_scale(detached, channels, w_absmax, s, 0.1))  # in training
        y = quaff.linear(x, x_int8, x_scale, x_outlier, w_int8, w_scale, w_outlier, bias, 127, 64)

    Linears that read the same x with the same outlier state share the first three lines, unless something is edited in
    place between them; a static smoothing scale (momentum 1) has no update. The activation is detached
    because its integers carry no gradient: `quaff.linear` has its own, dx = dy W, which needs neither s nor x.
    Runs after `NormalizeProducts`. A marker that something else reads (or a linear that reduces over the
    out-features) stays: it dequantizes and multiplies in float, which is right and slow, and is reported. An edit of a
    weight in place is refused.
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        changes = []
        graph = graph_module.graph
        shared: dict[tuple[Argument, ...], list[Node]] = {}
        for node in list(graph.nodes):
            if matching.may_mutate(node):
                shared.clear()  # x may have changed, through an alias too
            operands = matching.linear_operands(node)
            if operands is None or (marker := matching.int8_weight(operands[1])) is None:
                continue
            x, _, bias = operands
            w_int8, w_scale, w_outlier, channels, _, smoothing_scale, _, _, activation_max, _, _, rotation = marker.args
            key = (x, channels, smoothing_scale, activation_max, rotation)
            with graph.inserting_before(node):
                if key not in shared:
                    shared[key] = _quantize_activation(graph, x, marker)
                arguments = (x, *shared[key], w_int8, w_scale, w_outlier, bias, activation_max, rotation)
                linear = graph.call_function(LINEAR, arguments)
            linear.meta = dict(node.meta)
            node.replace_all_uses_with(linear)
            graph.erase_node(node)
            changes.append(Change(matching.site_name(marker), "quantized"))
        erase_unused_views(graph)
        for marker in [node for node in graph.nodes if matching.is_call(node, matching.DEQUANTIZE_WEIGHT)]:
            for user, _ in matching.uses(marker):
                if matching.edits_weight(user):
                    name = f"{matching.site_name(marker)}: is edited in place by {matching.describe_use(user)}"
                    raise PassError(
                        f"{name}, expected no edit of an int8 weight: it would be lost. Exclude it in the config."
                    )
                reason = f"dequantized for {matching.describe_use(user)}, which is no linear over its in-features"
                changes.append(Change(matching.site_name(marker), "left alone", reason))
            if not marker.users:
                graph.erase_node(marker)
        return PassResult(graph_module, tuple(changes))


def _quantize_activation(graph: Graph, x: Argument, marker: Node) -> list[Node]:
    """Inserts what the linears of one activation share; returns its integers, scale and outlier operand."""
    _, _, _, channels, w_absmax, smoothing_scale, next_smoothing_scale, momentum, activation_max, training, *_ = (
        marker.args
    )
    rotation = marker.args[-1]
    detached = graph.call_method("detach", (x,))
    quantized = graph.call_function(
        QUANTIZE_ACTIVATION, (detached, channels, smoothing_scale, activation_max, rotation)
    )
    parts = [
        graph.create_node("call_function", operator.getitem, (quantized, index), name=name)
        for index, name in enumerate(("x_int8", "x_scale", "x_outlier"))
    ]
    if training and momentum != STATIC_MOMENTUM:
        updated = graph.call_function(UPDATE_SMOOTHING_SCALE, (detached, channels, w_absmax, smoothing_scale, momentum))
        graph.call_method("copy_", (next_smoothing_scale, updated))
    return parts
