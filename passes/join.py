"""The low-rank term of an int8 product joins the outlier term, where the kernel of the device knows one term only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from quaff_fx import ops
from quaff_fx.kernels.dispatch import kernels_of
from quaff_fx.passes import lowered, matching
from quaff_fx.passes.infrastructure import Change, PassResult

INT8_LINEAR = ops.int8_linear.target

_CAT = torch.ops.aten.cat.default


@dataclass(frozen=True)
class JoinTerms:
    """Makes the outlier term and the low-rank term of an int8 product one term in float32.

        y = quaff.int8_linear(
            x_int8, w_int8, False, x_scale, w_scale, x_outlier, w_outlier, bias, dtype, 127, 1, h, w
        )

    Becomes:

        a = aten.cat([x_outlier, h], 1)
        b = aten.cat([w_outlier, w])
        y = quaff.int8_linear(x_int8, w_int8, False, x_scale, w_scale, a, b, bias, dtype, 127, 1)

    Inductor writes both operands in one loop each, casts included. It leaves alone products of devices whose kernel
    takes both terms as they are (`Kernels.owns_low_rank`).
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        changes = []
        for node in list(graph.nodes):
            if not matching.is_call(node, INT8_LINEAR) or kernels_of(lowered.value(node).device).owns_low_rank:
                continue
            o = matching.operands(node)
            columns = [term for term in (o.a_outlier, o.a_low_rank) if term is not None]
            rows = [term for term in (o.w_outlier, o.w_low_rank) if term is not None]
            is_float32 = all(lowered.value(term).dtype == torch.float32 for term in columns + rows)
            if len(rows) < 2 and o.w_low_rank is None and is_float32:
                continue
            with graph.inserting_before(node):
                columns = [lowered.converted(graph, term, torch.float32) for term in columns]
                rows = [lowered.converted(graph, term, torch.float32) for term in rows]
                o.a_outlier = columns[0] if len(columns) == 1 else lowered.call(graph, _CAT, tensors=columns, dim=1)
                o.w_outlier = rows[0] if len(rows) == 1 else lowered.call(graph, _CAT, tensors=rows)
                if o.w_low_rank is not None:
                    changes.append(Change(matching.named_site(node), "joined"))
                o.a_low_rank = o.w_low_rank = None
                joined = lowered.call_again(graph, node, o)
            node.replace_all_uses_with(joined)
            graph.erase_node(node)
        return PassResult(graph_module, tuple(changes))
