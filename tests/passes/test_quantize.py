"""Markers and linears become int8 linears; what is no linear stays in float and is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F  # noqa: N812

from quaff_fx import ops
from quaff_fx.errors import PassError
from quaff_fx.passes import QuantizeLinears, pipeline
from tests.data import sqnr_db
from tests.passes.tracing import changes_of, nodes, quantized, quantized_values, text, trace, trace_use

QUANTIZE = torch.ops.quaff.quantize_activation.default
UPDATE = torch.ops.quaff.update_smoothing_scale.default
LINEAR = torch.ops.quaff.linear.default
MARKER = torch.ops.quaff.dequantize_weight.default


def two_linears(shares_state: bool, same_x: bool, between: Any = None, **second: Any) -> GraphModule:
    """Two linears; of one activation or two, with one outlier state or two; `between` edits x after the first."""

    def program(
        x: Any,
        z: Any,
        w_int8: Any,
        w_scale: Any,
        w_outlier: Any,
        channels: Any,
        w_absmax: Any,
        s: Any,
        next_s: Any,
        w_int8_2: Any,
        w_scale_2: Any,
        w_outlier_2: Any,
        channels_2: Any,
        w_absmax_2: Any,
        s_2: Any,
        next_s_2: Any,
    ) -> tuple[Tensor, Tensor]:
        state = (channels, w_absmax, s, next_s)
        other = state if shares_state else (channels_2, w_absmax_2, s_2, next_s_2)
        first = F.linear(x, quantized(w_int8, w_scale, w_outlier, *state, training=True), None)
        if between is not None:
            between(x)
        weight = quantized(w_int8_2, w_scale_2, w_outlier_2, *other, **({"training": True} | second))
        return first, F.linear(x if same_x else z, weight, None)

    return trace(program)


def test_a_linear_in_training() -> None:
    graph_module = trace_use(lambda x, w, b: F.linear(x, w, b), training=True)
    assert text(graph_module) == (
        "dequantize_weight_default = quaff.dequantize_weight.default(w_int8, w_scale, w_outlier, channels, w_absmax, "
        "s, next_s, 0.1, 127, True, torch.float32, 1)\n"
        "linear = linear(x, dequantize_weight_default, bias)\n"
        "return linear"
    )
    result = QuantizeLinears()(graph_module)
    assert result.graph_module is graph_module
    assert text(graph_module) == (
        "detach = x.detach()\n"
        "quantize_activation_default = quaff.quantize_activation.default(detach, channels, s, 127, 1)\n"
        "x_int8 = quantize_activation_default[0]\n"
        "x_scale = quantize_activation_default[1]\n"
        "x_outlier = quantize_activation_default[2]\n"
        "update_smoothing_scale_default = "
        "quaff.update_smoothing_scale.default(detach, channels, w_absmax, s, 0.1)\n"
        "copy_ = next_s.copy_(update_smoothing_scale_default)\n"
        "linear_default = "
        "quaff.linear.default(x, x_int8, x_scale, x_outlier, w_int8, w_scale, w_outlier, bias, 127, 1)\n"
        "return linear_default"
    )
    assert changes_of(result.changes) == ["w_int8: quantized"]


EVALUATION_TEXT = (
    "detach = x.detach()\n"
    "quantize_activation_default = quaff.quantize_activation.default(detach, channels, s, 63, 1)\n"
    "x_int8 = quantize_activation_default[0]\n"
    "x_scale = quantize_activation_default[1]\n"
    "x_outlier = quantize_activation_default[2]\n"
    "linear_default = quaff.linear.default(x, x_int8, x_scale, x_outlier, w_int8, w_scale, w_outlier, bias, 63, 1)\n"
    "return linear_default"
)


@pytest.mark.parametrize(
    "marker",
    [{"training": False}, {"training": True, "momentum": ops.STATIC_MOMENTUM}],
    ids=["evaluation", "static momentum"],
)
def test_a_scale_that_is_kept_is_not_updated(marker: dict[str, Any]) -> None:
    graph_module = trace_use(lambda x, w, b: F.linear(x, w, b), q=63, **marker)
    QuantizeLinears()(graph_module)
    assert text(graph_module) == EVALUATION_TEXT


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w, b: F.linear(input=x, weight=w, bias=b),
        lambda x, w, b: torch.addmm(b, x, w.t()),
        lambda x, w, b: F.linear(x, w.T.T, b),
    ],
)
def test_every_form_of_a_linear_gives_the_same_text(use: Any) -> None:
    graph_module = trace_use(use, q=63)
    pipeline.quantize(graph_module)
    assert text(graph_module) == EVALUATION_TEXT


NEAR_MISSES = {
    "embedding": (lambda x, w, b: F.embedding(x, w), "embedding"),
    "left operand": (lambda x, w, b: w @ x, "matmul"),
    "einsum": (lambda x, w, b: torch.einsum("tk,nk->tn", x, w), "einsum"),
    "addmm of a matrix": (lambda x, w, b: torch.addmm(x, x, w.t()), "addmm"),
    "alpha": (lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2), "addmm"),
    "over the out-features": (lambda x, w, b: x @ w, "linear"),
    "linear over the out-features": (lambda x, w, b: F.linear(x, w.t(), b), "linear"),
    "elementwise": (lambda x, w, b: x * w, "mul"),
    "output": (lambda x, w, b: w, "output"),
}


@pytest.mark.parametrize(("use", "name"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_what_is_no_linear_over_the_in_features_stays_in_float_and_is_told(use: Any, name: str) -> None:
    graph_module = trace_use(use)
    changes = changes_of(pipeline.quantize(graph_module).changes)
    reason = f"w_int8: left alone (dequantized for {name}, which is no linear over its in-features)"
    assert [change for change in changes if "normalized" not in change] == [reason]
    assert len(nodes(graph_module, MARKER)) == 1
    assert nodes(graph_module, LINEAR) == nodes(graph_module, QUANTIZE) == []


def test_a_linear_beside_another_use_is_quantized_and_the_marker_stays_for_the_other() -> None:
    graph_module = trace_use(lambda x, w, b: (F.linear(x, w, b), w.sum()))
    changes = changes_of(pipeline.quantize(graph_module).changes)
    assert changes == [
        "w_int8: quantized",
        "w_int8: left alone (dequantized for sum, which is no linear over its in-features)",
    ]
    assert (len(nodes(graph_module, LINEAR)), len(nodes(graph_module, MARKER))) == (1, 1)


def test_a_cast_weight_is_quantized_for_the_linear_and_dequantized_for_a_norm() -> None:
    """As DoRA reads it: a linear, then a linear and a norm of the weight in the dtype of x."""

    def use(x: Any, w: Any, b: Any) -> Any:
        cast = w.to(torch.float32)
        return F.linear(x, w, b), F.linear(x + 1, cast), (cast + 0.5).norm(dim=1)

    graph_module = trace_use(use)
    changes = changes_of(pipeline.quantize(graph_module).changes)
    reason = "dequantized for add, which is no linear over its in-features"
    assert [c for c in changes if "normalized" not in c] == [
        *["w_int8: quantized"] * 2,
        f"w_int8: left alone ({reason})",
    ]
    assert (len(nodes(graph_module, LINEAR)), len(nodes(graph_module, MARKER))) == (2, 1)


@pytest.mark.parametrize(
    "edit",
    [
        lambda x, w: w.add_(1),
        lambda x, w: w.t().zero_(),
        lambda x, w: torch.add(x, 1, out=w),
        lambda x, w: torch.ops.aten.add_.Tensor(w, x),
    ],
    ids=["add_", "transposed", "out", "aten"],
)
def test_an_edit_of_an_int8_weight_is_refused(edit: Any) -> None:
    """Before it is int8 such a weight is left alone; an edit that appears later would change a temporary."""
    graph_module = trace_use(lambda x, w, b: (F.linear(x, w), edit(x, w)))
    with pytest.raises(PassError, match=r"w_int8: is edited in place by [\w.]+, expected no edit of an int8 weight"):
        pipeline.quantize(graph_module)


def test_a_weight_that_is_cast_and_edited_is_not_seen_as_the_weight() -> None:
    def use(x: Any, w: Any, b: Any) -> Any:
        edited = w.to(torch.float64)
        edited.zero_()
        return F.linear(x, edited, b)

    graph_module = trace_use(use)
    changes = changes_of(pipeline.quantize(graph_module).changes)
    assert changes == ["w_int8: left alone (dequantized for to, which is no linear over its in-features)"]
    assert nodes(graph_module, LINEAR) == []


def test_a_linear_whose_x_is_the_weight_itself_keeps_the_marker_for_x() -> None:
    graph_module = trace_use(lambda x, w, b: F.linear(w, w))
    pipeline.quantize(graph_module)
    values = quantized_values(4, 4)
    w = torch.ops.quaff.dequantize_weight.default(*values, 0.1, 127, False, torch.float32, 1)
    result = graph_module(torch.zeros(1), *values, torch.zeros(4))
    assert sqnr_db(w.double() @ w.double().t(), result) > 30


@pytest.mark.parametrize("training", [False, True])
def test_the_quantized_graph_computes_the_linear(training: bool) -> None:
    """8-bit rounding of normal data with two outlier channels leaves more than 30 dB; the update is exact."""
    graph_module = trace_use(lambda x, w, b: F.linear(x, w, b), training=training)
    values = quantized_values(4, 64, s=5.0)
    x, bias = torch.randn(10, 64), torch.randn(4)
    x[:, [1, 0]] *= 20
    expected = graph_module(x, *values, bias)
    pipeline.quantize(graph_module)
    graph_module.recompile()
    assert sqnr_db(expected, graph_module(x, *values, bias)) > 30
    _, _, _, channels, w_absmax, s, next_s = values
    if training:
        target = (x[:, channels].abs().amax(dim=0) / w_absmax).sqrt().clamp(min=1)
        torch.testing.assert_close(next_s, 0.1 * s + 0.9 * target)
    assert s.tolist() == [5.0, 5.0], "what the forward reads is not written"
    assert training or next_s.tolist() == [5.0, 5.0]


def test_the_gradient_of_x_flows_through_the_linear_alone() -> None:
    graph_module = trace_use(lambda x, w, b: F.linear(x, w, b), training=True)
    values = quantized_values(4, 64)
    x, dy = torch.randn(10, 64, requires_grad=True), torch.randn(10, 4)
    (expected,) = torch.autograd.grad(graph_module(x, *values, torch.zeros(4)), x, dy)
    pipeline.quantize(graph_module)
    graph_module.recompile()
    (actual,) = torch.autograd.grad(graph_module(x, *values, torch.zeros(4)), x, dy)
    assert sqnr_db(expected, actual) > 30


# --- sharing -----------------------------------------------------------------------------------------------------


def test_linears_of_one_activation_and_one_state_share_one_quantized_activation() -> None:
    graph_module = two_linears(shares_state=True, same_x=True)
    changes = pipeline.quantize(graph_module).changes
    assert changes_of(changes) == ["w_int8: quantized", "w_int8_2: quantized"]
    assert text(graph_module) == (
        "detach = x.detach()\n"
        "quantize_activation_default = quaff.quantize_activation.default(detach, channels, s, 127, 1)\n"
        "x_int8 = quantize_activation_default[0]\n"
        "x_scale = quantize_activation_default[1]\n"
        "x_outlier = quantize_activation_default[2]\n"
        "update_smoothing_scale_default = "
        "quaff.update_smoothing_scale.default(detach, channels, w_absmax, s, 0.1)\n"
        "copy_ = next_s.copy_(update_smoothing_scale_default)\n"
        "linear_default = "
        "quaff.linear.default(x, x_int8, x_scale, x_outlier, w_int8, w_scale, w_outlier, None, 127, 1)\n"
        "linear_default_1 = "
        "quaff.linear.default(x, x_int8, x_scale, x_outlier, w_int8_2, w_scale_2, w_outlier_2, None, 127, 1)\n"
        "return (linear_default, linear_default_1)"
    )


@pytest.mark.parametrize(
    "graph_module",
    [
        two_linears(shares_state=False, same_x=True),
        two_linears(shares_state=True, same_x=False),
        two_linears(shares_state=False, same_x=False),
        two_linears(shares_state=True, same_x=True, q=63),
    ],
    ids=["another state", "another x", "another state and x", "another Q"],
)
def test_linears_that_differ_in_state_activation_or_range_share_nothing(graph_module: GraphModule) -> None:
    pipeline.quantize(graph_module)
    first, second = nodes(graph_module, LINEAR)
    assert len(nodes(graph_module, QUANTIZE)) == 2
    assert not set(first.args[1:4]) & set(second.args[1:4])
    assert len(nodes(graph_module, UPDATE)) == 2


@pytest.mark.parametrize(
    "edit",
    [lambda x: x.add_(1), lambda x: torch.ops.aten.mul_.Tensor(x, 3.0), lambda x: F.relu(x, inplace=True)],
    ids=["method", "aten", "inplace=True"],
)
def test_an_activation_edited_between_two_linears_is_quantized_again(edit: Any) -> None:
    """The second linear must see the edited x, as it does in the graph with markers."""
    graph_module = two_linears(shares_state=True, same_x=True, between=edit)
    values = (torch.zeros(1), *quantized_values(4, 64), *quantized_values(6, 64))
    x = torch.randn(10, 64)
    expected = graph_module(x.clone(), *values)
    pipeline.quantize(graph_module)
    graph_module.recompile()
    actual = graph_module(x.clone(), *values)
    assert sqnr_db(expected[0], actual[0]) > 30
    assert sqnr_db(expected[1], actual[1]) > 30


def test_twice_changes_nothing_and_the_same_graph_gives_the_same_text() -> None:
    def use(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.linear(x, w, b), torch.addmm(b, x, w.t()), F.linear(x * 2, w), w.sum()

    first, second = trace_use(use, training=True), trace_use(use, training=True)
    pipeline.quantize(first)
    pipeline.quantize(second)
    once = text(first)
    assert text(second) == once
    assert len(nodes(first, LINEAR)) == 3
    again = pipeline.quantize(first).changes
    assert {change.action for change in again} == {"left alone"}
    assert text(first) == once


def test_the_recorded_value_of_the_result_is_kept() -> None:
    graph_module = trace_use(lambda x, w, b: F.linear(x, w, b))
    (linear,) = nodes(graph_module, F.linear)
    linear.meta["example_value"] = value = torch.empty(3, 4, device="meta")
    QuantizeLinears()(graph_module)
    (linear,) = nodes(graph_module, LINEAR)
    assert linear.meta["example_value"] is value
