"""Small graphs with markers, and graphs as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, symbolic_trace

from quaff_fx import numerics

QUANTIZED = ("w_int8", "w_scale", "w_outlier", "channels", "w_absmax", "s", "next_s")
"""The inputs of one `dequantize_weight` marker."""
MARKER = (
    "dequantize_weight_default = quaff.dequantize_weight.default(w_int8, w_scale, w_outlier, channels, w_absmax, "
    "s, next_s, 0.1, 127, False, torch.float32, 1)"
)
"""The text of one marker."""


def quantized(*inputs: Tensor, training: bool = False, momentum: float = 0.1, q: int = 127) -> Tensor:
    marker: Tensor = torch.ops.quaff.dequantize_weight.default(*inputs, momentum, q, training, torch.float32, 1)
    return marker


def trace(function: Callable[..., Any], **shapes: tuple[int, ...]) -> GraphModule:
    """Returns the traced `function`; inputs named in `shapes` carry a value of that shape, as Dynamo's do."""
    graph_module = symbolic_trace(function)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.name in shapes:
            node.meta["example_value"] = torch.empty(shapes[node.name], device="meta")
    return graph_module


def trace_use(
    use: Callable[..., Any], bias: tuple[int, ...] = (4,), x: tuple[int, ...] | None = None, **marker: Any
) -> GraphModule:
    """Returns the traced ``use(x, w, bias)`` of a marked weight; shapes as in `trace`, the rest for the marker."""

    def program(
        x: Any, w_int8: Any, w_scale: Any, w_outlier: Any, channels: Any, w_absmax: Any, s: Any, next_s: Any, bias: Any
    ) -> Any:
        return use(x, quantized(w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s, **marker), bias)

    shapes = {"bias": bias} | ({} if x is None else {"x": x})
    return trace(program, **shapes)


def text(graph_module: GraphModule) -> str:
    """Returns the statements of a graph module, one a line, without the deletions and annotations of fx."""
    graph_module.graph.lint()
    graph_module.recompile()
    lines = [re.sub(r";  .*", "", line.strip()) for line in graph_module.code.splitlines()]
    short = [re.sub(r"torch\.ops\.(?=quaff)|torch\._C\._nn\.|torch\.nn\.functional\.", "", line) for line in lines]
    return "\n".join(line for line in short if line and not line.startswith(("def ", "import ", "torch.fx._symbolic")))


def nodes(graph_module: GraphModule, target: object) -> list[Node]:
    """Returns the calls of a function or method."""
    return [node for node in graph_module.graph.nodes if node.target == target]


def changes_of(changes: Iterable[object]) -> list[str]:
    return [str(change) for change in changes]


def quantized_values(out_features: int, in_features: int, s: float = 2.0) -> tuple[Tensor, ...]:
    """Values for `QUANTIZED`: a weight with two outlier channels."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(2))
    channels = torch.tensor([1, 0])
    columns = weight[:, channels]
    smoothing = torch.full((2,), s)
    absmax = columns.abs().amax(dim=0)
    return *numerics.quantize_weight(weight), columns.t().contiguous(), channels, absmax, smoothing, smoothing.clone()
