"""What passes recognise, by target and by use."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from quaff_fx.passes import matching
from tests.passes.tracing import QUANTIZED, quantized, trace, trace_use


def node_of(target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call whose placeholders are the strings in `args`."""
    graph = Graph()
    inputs: dict[str, Node] = {}

    def value(arg: Any) -> Any:
        if isinstance(arg, str) and arg.startswith("%"):
            return inputs.setdefault(arg, graph.placeholder(arg[1:]) if arg not in inputs else inputs[arg])
        return arg

    values, named = tuple(map(value, args)), {k: value(v) for k, v in kwargs.items()}
    if isinstance(target, str):
        return graph.call_method(target, values, named)
    return graph.call_function(target, values, named)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("t", ()),
        (torch.t, ()),
        (torch.ops.aten.t.default, ()),
        (getattr, ("T",)),
        (getattr, ("mT",)),
        ("transpose", (0, 1)),
        ("transpose", (1, 0)),
        ("transpose", (-1, -2)),
        ("transpose", (-2, -1)),
        ("transpose", (0, -1)),
        (torch.transpose, (-1, 0)),
        (torch.ops.aten.transpose.int, (1, -2)),
        ("swapaxes", (0, 1)),
        ("permute", (1, 0)),
        ("permute", ((1, 0),)),
        ("permute", ([-1, 0],)),
        (torch.permute, ((-1, -2),)),
    ],
)
def test_a_transpose_of_a_matrix_is_seen(target: Any, args: tuple[Any, ...]) -> None:
    node = node_of(target, "%w", *args)
    assert matching.transposed_operand(node) is node.args[0]


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (getattr, ("shape",), {}),
        (getattr, ("H",), {}),
        ("transpose", (0, 0), {}),
        ("transpose", (1, 1), {}),
        ("transpose", (0, 2), {}),
        ("transpose", (0, -2), {}),
        ("permute", (0, 1), {}),
        ("permute", (-2, -1), {}),
        ("permute", ((0, -1),), {}),
        ("permute", (0, 2, 1), {}),
        ("transpose", (), {"dim0": 0, "dim1": 1}),
        ("contiguous", (), {}),
        ("reshape", (1, 0), {}),
        (operator.getitem, (0,), {}),
    ],
)
def test_what_keeps_or_cuts_a_matrix_is_no_transpose(target: Any, args: Any, kwargs: Any) -> None:
    assert matching.transposed_operand(node_of(target, "%w", *args, **kwargs)) is None


def test_swapping_two_dimensions_is_what_torch_does() -> None:
    """The list of dimension pairs against torch itself, on a matrix."""
    w = torch.arange(6).reshape(2, 3)
    for first in (-2, -1, 0, 1):
        for second in (-2, -1, 0, 1):
            node = node_of("transpose", "%w", first, second)
            swaps = torch.equal(w.transpose(first, second), w.t())
            assert (matching.transposed_operand(node) is not None) == swaps, ("transpose", first, second)
            if first % 2 != second % 2:
                node = node_of("permute", "%w", first, second)
                swaps = torch.equal(w.permute(first, second), w.t())
                assert (matching.transposed_operand(node) is not None) == swaps, ("permute", first, second)


@pytest.mark.parametrize("name", ["t", "T", "mT"])
def test_a_transpose_without_dimensions_is_seen_in_eager_code(name: str) -> None:
    assert matching.is_transpose(name, (), {})


@pytest.mark.parametrize("name", ["transpose", "swapaxes", "permute"])
@pytest.mark.parametrize("first", [-2, -1, 0, 1])
@pytest.mark.parametrize("second", [-2, -1, 0, 1])
def test_in_eager_code_the_same_is_a_transpose_as_in_a_graph(name: str, first: int, second: int) -> None:
    in_graph = matching.transposed_operand(node_of(name, "%w", first, second)) is not None
    assert matching.is_transpose(name, (first, second), {}) is in_graph
    if name == "permute":
        assert matching.is_transpose(name, ((first, second),), {}) is in_graph
        assert matching.is_transpose(name, ([first, second],), {}) is in_graph
    assert not matching.is_transpose(name, (first, second), {"a": 1})


@pytest.mark.parametrize(
    ("name", "rest"),
    [("transpose", (0, 2)), ("permute", (0, 2, 1)), ("H", ()), ("contiguous", ()), ("reshape", (1, 0)), ("to", (0, 1))],
)
def test_what_keeps_or_cuts_a_matrix_is_no_transpose_in_eager_code(name: str, rest: tuple[int, ...]) -> None:
    assert not matching.is_transpose(name, rest, {})


class Names(TorchFunctionMode):
    """Writes down the name of everything that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(matching.function_name(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda w: w + 1, "add"),
        (lambda w: 1 + w, "add"),
        (lambda w: 1 - w, "sub"),
        (lambda w: w / 2, "div"),
        (lambda w: 2 / w, "div"),
        (lambda w: 2**w, "pow"),
        (lambda w: abs(w), "abs"),
        (lambda w: w @ w, "matmul"),
        (lambda w: torch.mm(w, w), "mm"),
        (lambda w: F.linear(w, w), "linear"),
        (lambda w: torch.linalg.norm(w), "linalg_norm"),
        (lambda w: w.T, "T"),
        (lambda w: w.data, "data"),
        (lambda w: setattr(w, "data", w), "set_data"),
        (lambda w: setattr(w, "requires_grad", False), "set_requires_grad"),
        (lambda w: w[0], "getitem"),
        (lambda w: w.__setitem__(0, 1), "setitem"),
        (lambda w: w.__iadd__(1), "add_"),
        (lambda w: torch.ops.aten.mm.default(w, w), "mm.default"),
    ],
)
def test_a_function_is_known_by_one_name_however_it_is_called(call: Any, name: str) -> None:
    w = torch.ones(3, 3)
    with Names() as seen:
        call(w)
    assert seen.names[-1] == name


def test_each_name_has_one_meaning() -> None:
    of_products = (matching.PRODUCTS, matching.CONVOLUTIONS, matching.LAYERS)
    meanings = [set(matching.COPIES), matching.VALUE_READS, matching.METADATA, matching.EDITS, *of_products]
    assert sum(map(len, meanings)) == len(set.union(*meanings))


@pytest.mark.parametrize("value", [None, 3, "t", (1, 2)])
def test_what_is_no_node_is_nothing(value: Any) -> None:
    assert matching.transposed_operand(value) is None
    assert matching.marked_weight(value) is None
    assert matching.dimensions(value) is None
    assert not matching.is_call(value, torch.add)


@pytest.mark.parametrize("transposes", [0, 1, 2, 3])
def test_a_marked_weight_is_seen_through_its_transposes(transposes: int) -> None:
    def program(w_int8: Any, w_scale: Any, w_outlier: Any, channels: Any, w_absmax: Any, s: Any, next_s: Any) -> Any:
        weight = quantized(w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s)
        for _ in range(transposes):
            weight = weight.t()
        return weight

    nodes = list(trace(program).graph.nodes)
    marker, last = nodes[len(QUANTIZED)], nodes[-2]
    assert matching.marked_weight(last) == (marker, transposes % 2 == 1)


def test_a_marker_behind_another_op_is_not_seen() -> None:
    graph_module = trace_use(lambda x, w, b: w.contiguous().t())
    assert matching.marked_weight(list(graph_module.graph.nodes)[-2]) is None


def test_a_marker_is_seen_behind_a_floating_cast_that_nothing_edits() -> None:
    graph_module = trace_use(lambda x, w, b: w.float().t() @ x)
    product = list(graph_module.graph.nodes)[-2]
    marker = next(node for node in graph_module.graph.nodes if matching.is_call(node, matching.DEQUANTIZE_WEIGHT))
    assert matching.marked_weight(product.args[0]) == (marker, True)
    cast = product.args[0].args[0]
    cast.meta["example_value"] = torch.empty(4, 4, dtype=torch.int32)
    assert matching.marked_weight(cast) is None
    graph_module = trace_use(lambda x, w, b: w.float().t().zero_())
    assert matching.marked_weight(list(graph_module.graph.nodes)[-3]) is None


@pytest.mark.parametrize(
    ("target", "reads"),
    [
        (torch.linalg.norm, True),
        (torch.linalg.vector_norm, True),
        (operator.add, True),
        ("sum", True),
        ("mul", True),
        (F.normalize, True),
        (F.embedding, False),
        (F.conv1d, False),
        (torch.einsum, False),
        (torch.bmm, False),
        (operator.matmul, False),
        (operator.iadd, False),
        (operator.getitem, False),
        ("add_", False),
        ("index_select", False),
        ("view", False),
        ("chunk", False),
    ],
)
def test_what_reads_only_values_is_no_product_lookup_edit_or_view(target: Any, reads: bool) -> None:
    assert matching.reads_values(node_of(target, "%w", "%x")) is reads


@pytest.mark.parametrize(
    ("target", "edits"),
    [
        ("add_", True),
        ("__setitem__", True),
        (operator.iadd, True),
        (operator.setitem, True),
        (torch.ops.aten.mul_.Tensor, True),
        ("add", False),
        (operator.add, False),
        (operator.invert, False),
        (torch.ops.aten.mul.Tensor, False),
        (F.embedding, False),
    ],
)
def test_an_edit_of_a_marked_weight_is_seen(target: Any, edits: bool) -> None:
    graph_module = trace_use(lambda x, w, b: w)
    marker = next(node for node in graph_module.graph.nodes if matching.is_call(node, matching.DEQUANTIZE_WEIGHT))
    with graph_module.graph.inserting_after(marker):
        call = graph_module.graph.call_method if isinstance(target, str) else graph_module.graph.call_function
        node = call(target, (marker, 1))
    assert matching.edits_weight(node) is edits


def test_a_placeholder_called_like_a_target_is_no_call() -> None:
    graph = Graph()
    assert not matching.is_call(graph.placeholder("t"), "t")


def names(operands: tuple[Any, ...] | None) -> tuple[str | None, ...] | None:
    return None if operands is None else tuple(None if o is None else str(o) for o in operands)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (node_of(torch.matmul, "%x", "%w"), ("x", "w", None)),
        (node_of(operator.matmul, "%x", "%w"), ("x", "w", None)),
        (node_of("mm", "%x", "%w"), ("x", "w", None)),
        (node_of(torch.ops.aten.mm.default, "%x", "%w"), ("x", "w", None)),
        (node_of(torch.addmm, "%b", "%x", "%w"), ("x", "w", "b")),
        (node_of("addmm", "%b", "%x", "%w"), ("x", "w", "b")),
        (node_of(torch.addmm, "%b", "%x", "%w", beta=1), None),
        (node_of(torch.addmm, "%b", "%x", "%w", alpha=2), None),
        (node_of(torch.matmul, "%x", "%w", out="%o"), None),
        (node_of(torch.bmm, "%x", "%w"), None),
        (node_of(operator.mul, "%x", "%w"), None),
        (node_of(F.linear, "%x", "%w"), None),
    ],
)
def test_operands_of_a_product(node: Node, expected: tuple[str | None, ...] | None) -> None:
    assert names(matching.product_operands(node)) == expected


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (node_of(F.linear, "%x", "%w"), ("x", "w", None)),
        (node_of(F.linear, "%x", "%w", "%b"), ("x", "w", "b")),
        (node_of(F.linear, "%x", "%w", bias="%b"), ("x", "w", "b")),
        (node_of(F.linear, weight="%w", input="%x"), ("x", "w", None)),
        (node_of(torch.ops.aten.linear.default, "%x", "%w", None), ("x", "w", None)),
        (node_of(F.bilinear, "%x", "%y", "%w"), None),
        (node_of(torch.matmul, "%x", "%w"), None),
    ],
)
def test_operands_of_a_linear(node: Node, expected: tuple[str | None, ...] | None) -> None:
    assert names(matching.linear_operands(node)) == expected


def test_dimensions_come_from_the_traced_value() -> None:
    graph = Graph()
    node = graph.placeholder("x")
    assert matching.dimensions(node) is None
    node.meta["val"] = torch.empty(2, 3)
    assert matching.dimensions(node) == 2
    node.meta["example_value"] = torch.empty(2)
    assert matching.dimensions(node) == 1
    node.meta["example_value"] = 3
    assert matching.dimensions(node) is None


def marker_with_source(source: str | None) -> Node:
    graph = Graph()
    weight = graph.placeholder("l_module_weight_")
    if source is not None:
        weight.meta["grapharg"] = SimpleNamespace(source=SimpleNamespace(name=source))
    return graph.call_function(matching.DEQUANTIZE_WEIGHT, (weight,) * len(QUANTIZED))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['module']._modules['self_attn']._modules['q_proj']._parameters['weight']", "self_attn.q_proj.weight"),
        (
            "L['module']._modules['mlp']._modules['up']._modules['quaff_weight']._parameters['w_int8']",
            "mlp.up.weight",
        ),
        ("L['module']._parameters['weight']", "weight"),
        ("L['weight']", "l_module_weight_"),
        (None, "l_module_weight_"),
    ],
)
def test_a_site_has_the_name_of_its_weight_in_the_traced_module(source: str | None, name: str) -> None:
    assert matching.site_name(marker_with_source(source)) == name


def test_a_use_is_described_in_a_readers_word() -> None:
    assert matching.describe_use(node_of(F.embedding, "%x", "%w")) == "embedding"
    assert matching.describe_use(node_of("sum", "%x")) == "sum"
    assert matching.describe_use(node_of(torch.ops.aten.mm.default, "%x", "%w")) == "mm.default"
