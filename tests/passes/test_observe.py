"""Markers become observers on the activation; uses that are no linear are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quaff_fx.passes import ObserveActivations, pipeline
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F  # noqa: N812

from quaff_fx import numerics, ops
from tests.passes.tracing import changes_of, nodes, observed, observer_values, text, trace

OBSERVE = torch.ops.quaff.observe.default
OTHER_USE = torch.ops.quaff.observe_other_use.default


def graph_of(use: Callable[[Tensor, Tensor, Tensor], Any]) -> GraphModule:
    def program(x: Any, p: Any, step_absmax: Any, step_count: Any, in_dim_seen: Any, bias: Any) -> Any:
        return use(x, observed(p, step_absmax, step_count, in_dim_seen), bias)

    return trace(program, bias=(4,))


def test_a_linear_is_observed() -> None:
    graph_module = graph_of(lambda x, w, b: F.linear(x, w, b))
    assert text(graph_module) == (
        "observe_weight_default = quaff.observe_weight.default(p, step_absmax, step_count, in_dim_seen)\n"
        "linear = linear(x, observe_weight_default, bias)\n"
        "return linear"
    )
    result = ObserveActivations(7.0)(graph_module)
    assert result.graph_module is graph_module
    assert text(graph_module) == (
        "observe_default = quaff.observe.default(x, step_absmax, step_count, in_dim_seen, 1, 7.0)\n"
        "linear = linear(x, p, bias)\n"
        "return linear"
    )
    assert changes_of(result.changes) == ["p: observed"]


def test_a_linear_with_the_transposed_weight_is_observed_over_dimension_0() -> None:
    graph_module = graph_of(lambda x, w, b: torch.addmm(b, x, w))
    assert changes_of(pipeline.observe(graph_module, 0.0).changes) == ["p: normalized", "p: observed"]
    assert text(graph_module) == (
        "t = p.t()\n"
        "observe_default = quaff.observe.default(x, step_absmax, step_count, in_dim_seen, 0, 0.0)\n"
        "linear = linear(x, t, bias)\n"
        "return linear"
    )


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda x, w, b: F.embedding(x, w), "embedding"),
        (lambda x, w, b: w @ x, "matmul"),
        (lambda x, w, b: torch.einsum("tk,nk->tn", x, w), "einsum"),
        (lambda x, w, b: torch.addmm(b, x, w, alpha=2), "addmm"),
        (lambda x, w, b: x @ w.reshape(4, 4), "reshape"),
        (lambda x, w, b: w, "output"),
        (lambda x, w, b: F.linear(w, x, b), "linear"),
        (lambda x, w, b: F.linear(w, w), "linear"),
        (lambda x, w, b: w.add_(1), "add_"),
        (lambda x, w, b: F.conv1d(x, w), "conv1d"),
        (lambda x, w, b: w[0], "getitem"),
    ],
    ids=["embedding", "left operand", "einsum", "alpha", "reshaped", "output", "x", "both", "edit", "conv", "row"],
)
def test_any_other_use_is_told_with_its_name_and_the_program_stays(use: Any, name: str) -> None:
    graph_module = graph_of(use)
    changes = pipeline.observe(graph_module, 0.0).changes
    told = [str(change) for change in changes if change.action != "normalized"]
    assert told == [f"p: left alone (also used by {name})"]
    assert nodes(graph_module, OBSERVE) == []
    (other,) = nodes(graph_module, OTHER_USE)
    assert text(graph_module).count("observe_weight") == 0
    assert other.args[0].name == "in_dim_seen"


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda w: w.norm(dim=1), "norm"),
        (lambda w: w.float() + 1, "add"),
        (lambda w: torch.linalg.vector_norm(w.t(), dim=0), "linalg_vector_norm"),
        (lambda w: (w * 2).t(), "mul"),
    ],
    ids=["norm", "cast and sum", "norm of the transpose", "scaled"],
)
def test_a_reader_of_the_values_beside_a_linear_is_told_and_is_no_conflict(read: Any, name: str) -> None:
    graph_module = graph_of(lambda x, w, b: (F.linear(x, w, b), read(w)))
    x, values, bias = torch.randn(3, 4), observer_values(4, 4), torch.randn(4)
    expected = graph_module(x, *values, bias)
    changes = changes_of(pipeline.observe(graph_module, 0.0).changes)
    told = f"p: left alone ({name} reads its values, dequantized ones once it is int8)"
    assert sorted(c for c in changes if "normalized" not in c) == [told, "p: observed"]
    assert nodes(graph_module, OTHER_USE) == []
    torch.testing.assert_close(graph_module(x, *values, bias), expected, rtol=0, atol=0)
    assert int(values[3]) == 1


def test_a_weight_used_by_a_linear_and_an_embedding_is_a_conflict() -> None:
    graph_module = graph_of(lambda x, w, b: F.linear(F.embedding(x, w), w, b))
    changes = changes_of(pipeline.observe(graph_module, 0.0).changes)
    assert sorted(changes) == ["p: left alone (also used by embedding)", "p: observed"]
    values = observer_values(4, 4)
    graph_module(torch.tensor([0, 3]), *values, torch.zeros(4))
    assert int(values[3]) == ops.IN_DIM_CONFLICT


def test_a_linear_used_in_both_directions_is_a_conflict() -> None:
    graph_module = graph_of(lambda x, w, b: F.linear(x @ w, w, b))
    pipeline.observe(graph_module, 0.0)
    assert [node.args[4] for node in nodes(graph_module, OBSERVE)] == [0, 1]
    values = observer_values(4, 4)
    graph_module(torch.randn(2, 4), *values, torch.zeros(4))
    assert int(values[3]) == ops.IN_DIM_CONFLICT


def test_a_linear_called_twice_is_observed_twice() -> None:
    graph_module = graph_of(lambda x, w, b: F.linear(F.linear(x, w, b), w, b))
    pipeline.observe(graph_module, 0.0)
    assert [node.args[0].name for node in nodes(graph_module, OBSERVE)] == ["x", "linear"]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_observed_graph_computes_the_same_bit_for_bit_and_sees_x(transposed: bool) -> None:
    graph_module = graph_of(lambda x, w, b: torch.addmm(b, x, w) if transposed else F.linear(x, w, b))
    x, values, bias = torch.randn(3, 4), observer_values(4, 4), torch.randn(4)
    expected = graph_module(x, *values, bias)
    pipeline.observe(graph_module, 0.0)
    graph_module.recompile()
    actual = graph_module(x, *values, bias)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    _, step_absmax, _, in_dim_seen = values
    assert torch.equal(step_absmax, x.abs().amax(dim=0))
    assert int(in_dim_seen) == (0 if transposed else 1)


def test_the_observer_survives_dead_code_elimination() -> None:
    """It mutates its arguments and returns nothing; a pass of torch's must not drop it."""
    graph_module = graph_of(lambda x, w, b: F.linear(x, w, b))
    pipeline.observe(graph_module, 0.0)
    graph_module.graph.eliminate_dead_code()
    assert len(nodes(graph_module, OBSERVE)) == 1


def test_a_graph_without_markers_is_left_as_it_is() -> None:
    graph_module = trace(lambda x, w, b: F.linear(x, w, b) @ w)
    before = text(graph_module)
    assert pipeline.observe(graph_module, 0.0).changes == ()
    assert text(graph_module) == before


def test_twice_changes_nothing_and_the_same_graph_gives_the_same_text() -> None:
    def use(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.linear(x, w, b), torch.addmm(b, x, w), F.embedding(x, w)

    first, second = graph_of(use), graph_of(use)
    pipeline.observe(first, 0.0)
    pipeline.observe(second, 0.0)
    once = text(first)
    assert text(second) == once
    assert pipeline.observe(first, 0.0).changes == ()
    assert text(first) == once


# --- weights that were loaded as int8 ------------------------------------------------------------------------------


def int8_graph_of(use: Callable[[Tensor, Tensor, Tensor], Any]) -> GraphModule:
    def program(x: Any, p: Any, p_scale: Any, step_absmax: Any, step_count: Any, in_dim_seen: Any, bias: Any) -> Any:
        seen = (step_absmax, step_count, in_dim_seen)
        return use(x, torch.ops.quaff.observe_int8_weight.default(p, p_scale, *seen, torch.float32, 1), bias)

    return trace(program, bias=(4,))


def int8_values() -> tuple[Tensor, ...]:
    weight, *seen = observer_values(4, 4)
    return *numerics.quantize_weight(weight), *seen


def test_a_linear_with_an_int8_weight_is_observed_and_becomes_weight_only() -> None:
    graph_module = int8_graph_of(lambda x, w, b: F.linear(x, w, b))
    assert changes_of(ObserveActivations(7.0)(graph_module).changes) == ["p: observed"]
    assert text(graph_module) == (
        "observe_default = quaff.observe.default(x, step_absmax, step_count, in_dim_seen, 1, 7.0)\n"
        "weight_only_linear_default = quaff.weight_only_linear.default(x, p, p_scale, bias, 1)\n"
        "return weight_only_linear_default"
    )
    once = text(graph_module)
    assert pipeline.observe(graph_module, 7.0).changes == ()
    assert text(graph_module) == once


def test_an_int8_weight_in_the_layout_of_conv1d_is_observed() -> None:
    graph_module = int8_graph_of(lambda x, w, b: torch.addmm(b, x, w.t()))
    assert changes_of(pipeline.observe(graph_module, 0.0).changes) == ["p: normalized", "p: observed"]
    assert "weight_only_linear" in text(graph_module)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda x, w, b: F.embedding(x, w), "embedding"),
        (lambda x, w, b: x @ w, "linear"),
        (lambda x, w, b: w, "output"),
        (lambda x, w, b: F.linear(w, w), "linear"),
    ],
    ids=["embedding", "over the out-features", "output", "both"],
)
def test_any_other_use_of_an_int8_weight_is_told_and_dequantized_in_plain_operations(use: Any, name: str) -> None:
    graph_module = int8_graph_of(use)
    told = [str(c) for c in pipeline.observe(graph_module, 0.0).changes if c.action != "normalized"]
    assert told == [f"p: left alone (also used by {name})"]
    assert len(nodes(graph_module, numerics.dequantize_rows)) == 1
    assert len(nodes(graph_module, OTHER_USE)) == 1
    once = text(graph_module)
    assert pipeline.observe(graph_module, 0.0).changes == ()
    assert text(graph_module) == once


def test_an_int8_weight_read_by_a_linear_and_its_norm_serves_both() -> None:
    graph_module = int8_graph_of(lambda x, w, b: F.linear(x, w, b) / w.norm())
    x, values, bias = torch.randn(3, 4), int8_values(), torch.randn(4)
    expected = graph_module(x, *values, bias)
    pipeline.observe(graph_module, 0.0)
    assert torch.equal(graph_module(x, *values, bias), expected)
    assert torch.equal(values[2], x.abs().amax(dim=0))
    assert int(values[4]) == 1
