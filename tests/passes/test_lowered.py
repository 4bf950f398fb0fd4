"""What passes over lowered graphs insert has the values of the tensors that it gives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from quaff_fx import ops
from quaff_fx.passes import lowered, matching
from tests.passes.tracing import nodes

ATEN = torch.ops.aten


def traced(*shape: int) -> GraphModule:
    def program(x: Tensor) -> Tensor:
        return ATEN.view.default(ATEN.mul.Tensor(x, 2.0), [-1])

    with FakeTensorMode() as mode:
        graph_module: GraphModule = make_fx(program)(mode.from_tensor(torch.empty(*shape)))
    return graph_module


def test_a_call_has_its_value() -> None:
    graph = traced(4, 6).graph
    (product,) = [node for node in graph.nodes if matching.is_call(node, ATEN.mul.Tensor)]
    with graph.inserting_after(product):
        part = lowered.call(graph, ATEN.slice.Tensor, self=product, dim=1, start=0, end=2)
    assert isinstance(lowered.value(part), FakeTensor)
    assert (lowered.value(part).shape, lowered.value(part).stride()) == ((4, 2), (6, 1))


def test_a_cast_to_the_dtype_it_has_is_none() -> None:
    graph = traced(4, 6).graph
    (product,) = [node for node in graph.nodes if matching.is_call(node, ATEN.mul.Tensor)]
    with graph.inserting_after(product):
        assert lowered.converted(graph, product, torch.float32) is product
        assert lowered.value(lowered.converted(graph, product, torch.float16)).dtype == torch.float16


def test_views_follow_the_strides_of_what_they_view() -> None:
    graph_module = traced(4, 6)
    graph = graph_module.graph
    (product,) = nodes(graph_module, ATEN.mul.Tensor)
    (view,) = nodes(graph_module, ATEN.view.default)
    with graph.inserting_before(view):
        part = lowered.call(graph, ATEN.slice.Tensor, self=product, dim=1, start=0, end=1)
    view.args = (part, [4])
    lowered.revalue_views(part)
    assert (lowered.value(view).shape, lowered.value(view).stride()) == ((4,), (6,))


def test_a_call_again_keeps_the_name_of_its_site() -> None:
    graph_module = traced(4, 6)
    (product,) = nodes(graph_module, ATEN.mul.Tensor)
    matching.name_site(product, "q_proj.weight")
    with graph_module.graph.inserting_before(product):
        again = lowered.call_again(graph_module.graph, product, matching.operands(product))
    assert matching.named_site(again) == "q_proj.weight"
    assert ops.operands(again.target, again.args) == matching.operands(product)


def test_sorted_a_node_stands_behind_its_operands_and_the_rest_as_before() -> None:
    graph = traced(4, 6).graph
    x, product, view, output = graph.nodes
    x.append(view)
    lowered.sort(graph)
    assert list(graph.nodes) == [x, product, view, output]
    graph.lint()


def test_what_nothing_reads_is_erased_with_what_only_it_read() -> None:
    graph = traced(4, 6).graph
    x, _, view, output = graph.nodes
    output.args = (x,)
    lowered.erase_unused(graph, view)
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]
