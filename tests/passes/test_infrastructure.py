"""The runner: order, subgraphs, errors that name the pass and show the graph."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from quaff_fx import passes
from quaff_fx.errors import PassError, QuaffError
from quaff_fx.passes import Change, PassResult, pipeline, run_passes
from quaff_fx.passes.infrastructure import subgraphs
from tests.passes.tracing import QUANTIZED, changes_of, nodes, quantized, text, trace

checkpoint = torch.ops.higher_order.tag_activation_checkpoint


@dataclass(frozen=True)
class Rename:
    """Replaces calls of one function by another's."""

    old: Any
    new: Any

    def __call__(self, graph_module: GraphModule) -> PassResult:
        found = nodes(graph_module, self.old)
        for node in found:
            node.target = self.new
        return PassResult(graph_module, tuple(Change(node.name, "normalized") for node in found))


@dataclass(frozen=True)
class Fails:
    def __call__(self, graph_module: GraphModule) -> PassResult:
        raise KeyError("nothing here")


@dataclass(frozen=True)
class Breaks:
    """Leaves a node that reads one defined after it."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        first, last = nodes(graph_module, torch.sin)[0], nodes(graph_module, torch.cos)[0]
        first.args = (last,)
        return PassResult(graph_module, ())


def program(x: Any) -> Any:
    return torch.cos(torch.sin(x))


def with_body(body: GraphModule, names: tuple[str, ...]) -> GraphModule:
    """A graph that calls `body` under activation checkpointing, as Dynamo traces it."""
    root, graph = nn.Module(), Graph()
    root.body = body
    inputs = [graph.placeholder(name) for name in names]
    graph.output(graph.call_function(checkpoint, (graph.get_attr("body"), *inputs)))
    return GraphModule(root, graph)


def test_passes_run_in_order_and_report_what_they_did() -> None:
    graph_module = trace(program)
    result = run_passes((Rename(torch.sin, torch.exp), Rename(torch.exp, torch.tan)), graph_module)
    assert result.graph_module is graph_module
    assert text(graph_module) == "sin = torch.tan(x)\ncos = torch.cos(sin)\nreturn cos"
    assert changes_of(result.changes) == ["sin: normalized", "sin: normalized"]


def test_the_graph_is_recompiled() -> None:
    graph_module = trace(program)
    run_passes((Rename(torch.sin, torch.exp),), graph_module)
    x = torch.tensor([0.5])
    assert torch.equal(graph_module(x), torch.cos(torch.exp(x)))


def test_no_pass_changes_nothing() -> None:
    graph_module = trace(program)
    before = text(graph_module)
    assert run_passes((), graph_module).changes == ()
    assert text(graph_module) == before


def test_a_failing_pass_is_named_with_the_graph_it_worked_on() -> None:
    with pytest.raises(PassError) as raised:
        run_passes((Rename(torch.sin, torch.exp), Fails()), trace(program))
    message = str(raised.value)
    assert message.startswith("Fails: ")
    assert "nothing here" in message
    assert "torch.exp(x)" in message, "the graph as the failing pass saw it"
    assert isinstance(raised.value.__cause__, KeyError)
    assert isinstance(raised.value, QuaffError)


def test_a_malformed_graph_is_told_with_the_pass_that_made_it() -> None:
    with pytest.raises(PassError, match=r"^Breaks: .*before it has been defined") as raised:
        run_passes((Breaks(),), trace(program))
    assert "sin = torch.sin(cos)" in str(raised.value)


def test_a_failing_check_names_all_passes() -> None:
    def check(_: GraphModule) -> None:
        raise PassError("sin: is wrong, expected cos.")

    with pytest.raises(PassError, match=r"^after Rename, Rename: sin: is wrong, expected cos\."):
        run_passes((Rename(1, 2), Rename(2, 3)), trace(program), check)


def test_the_check_sees_the_result() -> None:
    seen: list[str] = []
    run_passes((Rename(torch.sin, torch.exp),), trace(program), lambda graph_module: seen.append(text(graph_module)))
    assert seen == ["sin = torch.exp(x)\ncos = torch.cos(sin)\nreturn cos"]


def test_each_pass_is_logged_with_its_count(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "quaff_fx.passes"):
        run_passes((Rename(torch.sin, torch.exp),), trace(program))
    assert [record.getMessage() for record in caplog.records] == ["Rename: 1 changes"]


# --- subgraphs ---------------------------------------------------------------------------------------------------


def test_subgraphs_are_found_at_every_depth_once() -> None:
    innermost = trace(program)
    middle = with_body(innermost, ("x",))
    outer = with_body(middle, ("x",))
    outer.again = middle
    assert [id(graph) for graph in subgraphs(outer)] == [id(outer), id(middle), id(innermost)]


def test_the_body_of_a_checkpoint_is_rewritten_and_recompiled() -> None:
    body = trace(program)
    outer = with_body(with_body(body, ("x",)), ("x",))
    changes = run_passes((Rename(torch.sin, torch.exp),), outer).changes
    assert changes_of(changes) == ["sin: normalized"]
    assert torch.equal(body(torch.tensor([0.5])), torch.cos(torch.exp(torch.tensor([0.5]))))


def test_a_failure_in_a_subgraph_shows_the_subgraph() -> None:
    with pytest.raises(PassError) as raised:
        run_passes((Breaks(),), with_body(trace(program), ("x",)))
    assert "Breaks" in str(raised.value)


def test_a_quantized_linear_under_a_checkpoint_is_quantized() -> None:
    body = trace(
        lambda x, w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s: (
            x @ quantized(w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s, training=True).T
        )
    )
    outer = with_body(body, ("x", *QUANTIZED))
    before = text(outer)
    assert changes_of(pipeline.quantize(outer).changes) == ["w_int8: normalized", "w_int8: quantized"]
    assert text(outer) == before, "the outer graph only passes the inputs on"
    assert len(nodes(body, torch.ops.quaff.linear.default)) == 1
    assert len(nodes(body, "copy_")) == 1


# --- contracts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NormalizeProducts", "QuantizeLinears"])
def test_a_pass_is_a_frozen_dataclass_with_before_and_after_in_its_docstring(name: str) -> None:
    kind = getattr(passes, name)
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert "Becomes:" in kind.__doc__


def test_a_change_reads_as_one_line() -> None:
    assert str(Change("q_proj", "quantized")) == "q_proj: quantized"
    assert str(Change("q_proj", "left alone", "also used by embedding")) == (
        "q_proj: left alone (also used by embedding)"
    )
