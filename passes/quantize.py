"""Markers of quantized weights and their linears become int8 linears."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from quaff_fx import ops
from quaff_fx.errors import PassError
from quaff_fx.passes import matching
from quaff_fx.passes.infrastructure import Change, PassResult
from quaff_fx.passes.normalize import erase_unused_views

PARTS = ("x_int8", "x_scale", "x_outlier")
"""What `quaff.quantize_activation` gives, by the names of `quaff.linear`."""


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
        shared: dict[tuple[Argument, ...], dict[str, Node]] = {}
        for node in list(graph.nodes):
            if matching.may_mutate(node):
                shared.clear()  # x may have changed, through an alias too
            operands = matching.linear_operands(node)
            if operands is None or (marker := matching.int8_weight(operands[1])) is None:
                continue
            x, _, bias = operands
            of = matching.operands(marker)
            key = (x, of.outlier_channels, of.smoothing_scale, of.activation_max, of.rotation)
            with graph.inserting_before(node):
                if key not in shared:
                    shared[key] = _quantize_activation(graph, x, of)
                linear = matching.call(
                    graph,
                    ops.linear.target,
                    x=x,
                    **shared[key],
                    w_int8=of.w_int8,
                    w_scale=of.w_scale,
                    w_outlier=of.w_outlier,
                    bias=bias,
                    activation_max=of.activation_max,
                    rotation=of.rotation,
                    grad_outliers=of.grad_outliers,
                )
            linear.meta = dict(node.meta)
            matching.name_site(linear, matching.site_name(marker))
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


def _quantize_activation(graph: Graph, x: Argument, of: ops.Operands) -> dict[str, Node]:
    """Inserts what the linears of one activation share, `of` being the operands of one of their markers.

    Returns its integers, scale and outlier operand, by the names of `quaff.linear`.
    """
    detached = graph.call_method("detach", (x,))
    quantized = matching.call(
        graph,
        ops.quantize_activation.target,
        x=detached,
        outlier_channels=of.outlier_channels,
        smoothing_scale=of.smoothing_scale,
        activation_max=of.activation_max,
        rotation=of.rotation,
    )
    parts = {
        name: graph.create_node("call_function", operator.getitem, (quantized, index), name=name)
        for index, name in enumerate(PARTS)
    }
    if of.training and of.momentum != ops.STATIC_MOMENTUM:
        updated = matching.call(
            graph,
            ops.update_smoothing_scale.target,
            x=detached,
            outlier_channels=of.outlier_channels,
            outlier_w_absmax=of.outlier_w_absmax,
            smoothing_scale=of.smoothing_scale,
            momentum=of.momentum,
        )
        graph.call_method("copy_", (of.next_smoothing_scale, updated))
    return parts
