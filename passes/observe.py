"""Markers of observed weights become observers on the activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from quaff_fx.passes import matching
from quaff_fx.passes.infrastructure import Change, PassResult
from quaff_fx.passes.normalize import erase_unused_views
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from quaff_fx import numerics

OBSERVE = torch.ops.quaff.observe.default
OBSERVE_OTHER_USE = torch.ops.quaff.observe_other_use.default
WEIGHT_ONLY_LINEAR = torch.ops.quaff.weight_only_linear.default


@dataclass(frozen=True)
class ObserveActivations:
    """Watches the activation of every linear with a marked weight, and takes the marker away.

        w = quaff.observe_weight(p, step_absmax, step_count, in_dim_seen)
        y = linear(x, w, bias)

    Becomes:

        quaff.observe(x, step_absmax, step_count, in_dim_seen, 1, threshold)
        y = linear(x, p, bias)

    A weight that was loaded as int8

        w = quaff.observe_int8_weight(w_int8, w_scale, step_absmax, step_count, in_dim_seen, dtype, 64)
        y = linear(x, w, bias)

    Becomes:

        quaff.observe(x, step_absmax, step_count, in_dim_seen, 1, threshold)
        y = quaff.weight_only_linear(x, w_int8, w_scale, bias, 64)

    which dequantizes anew in backward: with the marker, autograd would keep the float weight of every layer.

    Runs after `NormalizeProducts`. The graph computes what it did before. A weight that something else uses as well, as
    a table (an embedding) or in a product (a convolution), gets `quaff.observe_other_use` and stays in float; so does
    one that something unknown reads. What only reads its values (`matching.reads_values`: the norm of DoRA, a sum with
    an update) keeps no weight in float: it is told, and reads the dequantized weight later. For all these readers an
    int8 weight is dequantized in plain operations; a linear over its out-features is such a reader.

    Attributes:
        threshold: counts values over this multiple of the mean absolute value; 0 counts nothing.
    """

    threshold: float

    def __call__(self, graph_module: GraphModule) -> PassResult:
        changes = []
        graph = graph_module.graph
        for marker in [node for node in graph.nodes if matching.is_call(node, matching.OBSERVE_WEIGHT)]:
            weight, step_absmax, step_count, in_dim_seen = marker.args
            site = matching.site_name(marker)
            for user, in_dim in matching.uses(marker):
                with graph.inserting_before(user):
                    if in_dim is None:
                        changes.append(_left_alone(graph, user, False, site, in_dim_seen))
                        continue
                    x = user.args[0]
                    graph.call_function(
                        OBSERVE, (x, step_absmax, step_count, in_dim_seen, in_dim, float(self.threshold))
                    )
                    changes.append(Change(site, "observed"))
            marker.replace_all_uses_with(weight)
            graph.erase_node(marker)
        for marker in [node for node in graph.nodes if matching.is_call(node, matching.OBSERVE_INT8_WEIGHT)]:
            changes += self._observe_int8(graph, marker)
        return PassResult(graph_module, tuple(changes))

    def _observe_int8(self, graph: Graph, marker: Node) -> list[Change]:
        w_int8, w_scale, step_absmax, step_count, in_dim_seen, dtype, rotation = marker.args
        site = matching.site_name(marker)
        changes = []
        for user, in_dim in matching.uses(marker):
            with graph.inserting_before(user):
                if in_dim != 1:
                    changes.append(_left_alone(graph, user, in_dim is not None, site, in_dim_seen))
                    continue
                x, _, bias = user.args
                graph.call_function(OBSERVE, (x, step_absmax, step_count, in_dim_seen, 1, float(self.threshold)))
                linear = graph.call_function(WEIGHT_ONLY_LINEAR, (x, w_int8, w_scale, bias, rotation))
            linear.meta = dict(user.meta)
            user.replace_all_uses_with(linear)
            graph.erase_node(user)
            changes.append(Change(site, "observed"))
        erase_unused_views(graph)
        if marker.users:
            with graph.inserting_before(marker):
                rows = graph.call_function(numerics.dequantize_rows, (w_int8, w_scale, rotation))
                weight = graph.call_method("to", (rows, dtype))
            marker.replace_all_uses_with(weight)
        graph.erase_node(marker)
        return changes


def _left_alone(graph: Graph, user: Node, is_linear: bool, site: str, in_dim_seen: Argument) -> Change:
    """Inserts what a use other than a linear over the in-features needs; returns what is told of it."""
    name = matching.describe_use(user)
    if not is_linear and matching.reads_values(user):
        return Change(site, "left alone", f"{name} reads its values, dequantized ones once it is int8")
    graph.call_function(OBSERVE_OTHER_USE, (in_dim_seen,))
    return Change(site, "left alone", f"also used by {name}")
