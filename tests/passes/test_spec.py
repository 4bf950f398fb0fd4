"""The spec accepts what the passes make and refuses what they must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.nn import functional as F  # noqa: N812

from quaff_fx.errors import PassError
from quaff_fx.passes import pipeline, spec
from tests.passes.tracing import quantized, trace

quaff = torch.ops.quaff


def quantized_program(x, w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s):
    return F.linear(x, quantized(w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s, training=True))


def nested(body: GraphModule) -> GraphModule:
    root, graph = nn.Module(), Graph()
    root.body = body
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.higher_order.tag_activation_checkpoint, (graph.get_attr("body"), x)))
    return GraphModule(root, graph)


def test_what_the_passes_make_is_accepted() -> None:
    spec.check_quantized(pipeline.quantize(trace(quantized_program)).graph_module)


def test_graphs_without_markers_are_accepted() -> None:
    spec.check_quantized(trace(lambda x, w: F.linear(x, w)))


def test_a_marker_that_something_else_reads_is_accepted() -> None:
    def program(x, w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s):
        return x * quantized(w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s)

    spec.check_quantized(trace(program))


@pytest.mark.parametrize("wrap", [lambda g: g, nested], ids=["top", "subgraph"])
def test_a_float_linear_of_a_dequantized_weight_is_refused(wrap: Callable[[GraphModule], GraphModule]) -> None:
    with pytest.raises(PassError, match=r"linear: multiplies a dequantized weight in float, expected quaff\.linear"):
        spec.check_quantized(wrap(trace(quantized_program)))


def int8_graph(build: Callable[..., Any]) -> GraphModule:
    def program(x, z, channels, s, w_int8, w_scale, w_outlier):
        weight = (w_int8, w_scale, w_outlier, None)
        return build(x, z, channels, s, weight)

    return symbolic_trace(program)


def parts_of(x: Any, channels: Any, s: Any, q: int = 127) -> tuple[Any, ...]:
    parts = quaff.quantize_activation.default(x.detach(), channels, s, q, 1)
    return parts[0], parts[1], parts[2]


def test_a_handwritten_legal_graph_is_accepted() -> None:
    spec.check_quantized(
        int8_graph(lambda x, z, c, s, weight: quaff.linear.default(x, *parts_of(x, c, s), *weight, 127, 1))
    )


def mixed(x, z, c, s, weight):
    first, second = parts_of(x, c, s), parts_of(x, c, s)
    return quaff.linear.default(x, first[0], second[1], first[2], *weight, 127, 1)


def of_something_else(x, z, c, s, weight):
    pieces = torch.split(x, 1)
    return quaff.linear.default(x, pieces[0], pieces[1], pieces[2], *weight, 127, 1)


def not_detached(x, z, c, s, weight):
    parts = quaff.quantize_activation.default(x, c, s, 127, 1)
    return quaff.linear.default(x, parts[0], parts[1], parts[2], *weight, 127, 1)


def swapped(x, z, c, s, weight):
    x_int8, x_scale, x_outlier = parts_of(x, c, s)
    return quaff.linear.default(x, x_int8, x_outlier, x_scale, *weight, 127, 1)


ILLEGAL: dict[str, Callable[..., Any]] = {
    "parts of two activations": mixed,
    "parts of another activation": lambda x, z, c, s, weight: quaff.linear.default(
        x, *parts_of(z, c, s), *weight, 127, 1
    ),
    "parts in another range": lambda x, z, c, s, weight: quaff.linear.default(
        x, *parts_of(x, c, s, 63), *weight, 127, 1
    ),
    "parts of something else": of_something_else,
    "parts that are inputs": lambda x, z, c, s, weight: quaff.linear.default(x, z, s, c, *weight, 127, 1),
    "parts of an activation that was not detached": not_detached,
    "parts in the wrong order": swapped,
}


@pytest.mark.parametrize("build", ILLEGAL.values(), ids=ILLEGAL)
def test_an_int8_linear_that_does_not_read_its_own_activation_is_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(PassError, match=r"^linear_default: "):
        spec.check_quantized(int8_graph(build))
