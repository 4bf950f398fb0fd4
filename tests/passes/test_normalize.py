"""Every product with a marked weight becomes one form of linear; nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quaff_fx.passes import NormalizeProducts
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F  # noqa: N812

from tests.passes.tracing import changes_of, nodes, observed, observer_values, quantized, quantized_values, text, trace

MARKER = "observe_weight_default = quaff.observe_weight.default(p, step_absmax, step_count, in_dim_seen)"

aten = torch.ops.aten


def graph_of(product: Callable[[Tensor, Tensor, Tensor], Tensor], bias: tuple[int, ...] = (4,)) -> GraphModule:
    """The graph of a product of x, the marked weight and a bias."""

    def program(x: Any, p: Any, step_absmax: Any, step_count: Any, in_dim_seen: Any, bias: Any) -> Tensor:
        return product(x, observed(p, step_absmax, step_count, in_dim_seen), bias)

    return trace(program, bias=bias)


IN_OUT: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    # the weight as (in, out): a linear with its transpose
    "matmul": (lambda x, w, b: torch.matmul(x, w), "None"),
    "@": (lambda x, w, b: x @ w, "None"),
    "mm": (lambda x, w, b: torch.mm(x, w), "None"),
    "x.matmul": (lambda x, w, b: x.matmul(w), "None"),
    "x.mm": (lambda x, w, b: x.mm(w), "None"),
    "aten.mm": (lambda x, w, b: aten.mm.default(x, w), "None"),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), "bias"),
    "b.addmm": (lambda x, w, b: b.addmm(x, w), "bias"),
    "aten.addmm": (lambda x, w, b: aten.addmm.default(b, x, w), "bias"),
    "linear of w.t()": (lambda x, w, b: F.linear(x, w.t(), b), "bias"),
    "linear of three transposes": (lambda x, w, b: F.linear(x, w.t().t().t(), b), "bias"),
}
OUT_IN: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    # the weight as (out, in): a linear with itself
    "w.t()": (lambda x, w, b: x @ w.t(), "None"),
    "w.T": (lambda x, w, b: x @ w.T, "None"),
    "w.mT": (lambda x, w, b: x @ w.mT, "None"),
    "torch.t": (lambda x, w, b: torch.matmul(x, torch.t(w)), "None"),
    "transpose": (lambda x, w, b: torch.matmul(x, w.transpose(0, 1)), "None"),
    "transpose from the end": (lambda x, w, b: torch.matmul(x, torch.transpose(w, -2, -1)), "None"),
    "swapaxes": (lambda x, w, b: torch.matmul(x, w.swapaxes(1, 0)), "None"),
    "permute": (lambda x, w, b: torch.matmul(x, w.permute(1, 0)), "None"),
    "permute of a tuple": (lambda x, w, b: torch.matmul(x, w.permute((-1, -2))), "None"),
    "torch.permute": (lambda x, w, b: torch.matmul(x, torch.permute(w, (1, 0))), "None"),
    "aten.t": (lambda x, w, b: aten.mm.default(x, aten.t.default(w)), "None"),
    "addmm of w.t()": (lambda x, w, b: torch.addmm(b, x, w.t()), "bias"),
    "aten.linear": (lambda x, w, b: aten.linear.default(x, w, b), "bias"),
    "linear with keywords": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), "bias"),
    "linear without bias": (lambda x, w, b: F.linear(x, w), "None"),
    "linear of w.t().t()": (lambda x, w, b: F.linear(x, w.t().t(), b), "bias"),
    "permute that changes nothing twice": (lambda x, w, b: x @ w.t().transpose(0, 1).mT, "None"),
}


@pytest.mark.parametrize(("product", "bias"), OUT_IN.values(), ids=OUT_IN)
def test_a_product_over_the_second_dimension_becomes_a_linear(product: Any, bias: str) -> None:
    graph_module = graph_of(product)
    changes = NormalizeProducts()(graph_module).changes
    marker, linear, output = text(graph_module).splitlines()
    name = linear.split(" = ")[0]
    assert (marker, output) == (MARKER, f"return {name}")
    assert linear == f"{name} = linear(x, observe_weight_default, {bias})"
    assert changes_of(changes) == ["p: normalized"]


@pytest.mark.parametrize(("product", "bias"), IN_OUT.values(), ids=IN_OUT)
def test_a_product_over_the_first_dimension_becomes_a_linear_with_one_transpose(product: Any, bias: str) -> None:
    graph_module = graph_of(product)
    NormalizeProducts()(graph_module)
    marker, transpose, linear, output = text(graph_module).splitlines()
    assert marker == MARKER
    name = transpose.split(" = ")[0]
    assert transpose == f"{name} = observe_weight_default.t()"
    assert linear.split(" = ")[1] == f"linear(x, {name}, {bias})"
    assert output == f"return {linear.split(' = ')[0]}"


@pytest.mark.parametrize(("product", "_"), (IN_OUT | OUT_IN).values(), ids=IN_OUT | OUT_IN)
def test_the_normalized_graph_computes_the_same(product: Any, _: str) -> None:
    """A square weight, so that a wrong transposition would not fail but compute something else."""
    graph_module = graph_of(product)
    values = (torch.randn(3, 4), *observer_values(4, 4), torch.randn(4))
    expected = graph_module(*values)
    NormalizeProducts()(graph_module)
    graph_module.recompile()
    torch.testing.assert_close(graph_module(*values), expected)


def test_a_marker_of_a_quantized_weight_is_normalized_as_well() -> None:
    def program(x, w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s):
        return x @ quantized(w_int8, w_scale, w_outlier, channels, w_absmax, s, next_s).T

    graph_module = trace(program)
    values = (torch.randn(3, 6), *quantized_values(4, 6))
    expected = graph_module(*values)
    assert changes_of(NormalizeProducts()(graph_module).changes) == ["w_int8: normalized"]
    assert "linear = linear(x, dequantize_weight_default, None)" in text(graph_module)
    torch.testing.assert_close(graph_module(*values), expected)


NEAR_MISSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "the weight is the left operand": (lambda x, w, b: w @ x, (4,)),
    "the transposed weight is the left operand": (lambda x, w, b: w.t() @ x, (4,)),
    "addmm of a matrix": (lambda x, w, b: torch.addmm(b, x, w), (3, 4)),
    "addmm of something of unknown shape": (lambda x, w, b: torch.addmm(x, x, w), (4,)),
    "addmm with beta": (lambda x, w, b: torch.addmm(b, x, w, beta=0.5), (4,)),
    "addmm with alpha": (lambda x, w, b: torch.addmm(b, x, w, alpha=2), (4,)),
    "embedding": (lambda x, w, b: F.embedding(x, w), (4,)),
    "einsum": (lambda x, w, b: torch.einsum("tk,nk->tn", x, w), (4,)),
    "bmm": (lambda x, w, b: torch.bmm(x, w), (4,)),
    "elementwise": (lambda x, w, b: x * w, (4,)),
    "product of a scaled weight": (lambda x, w, b: x @ (w * 2), (4,)),
    "product of a permutation that keeps the order": (lambda x, w, b: x @ w.permute(0, 1), (4,)),
    "product of a reshaped weight": (lambda x, w, b: x @ w.reshape(4, 4), (4,)),
    "the weight is added": (lambda x, w, b: torch.addmm(w, x, x), (4,)),
    "a linear already": (lambda x, w, b: F.linear(x, w, b), (4,)),
    "a linear of w.t() with x as the weight": (lambda x, w, b: F.linear(w.t(), x, b), (4,)),
}


@pytest.mark.parametrize(("use", "bias"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_are_left_as_they_are(use: Any, bias: tuple[int, ...]) -> None:
    graph_module = graph_of(use, bias)
    before = text(graph_module)
    assert NormalizeProducts()(graph_module).changes == ()
    assert text(graph_module) == before


def test_products_of_unmarked_weights_are_left_as_they_are() -> None:
    graph_module = trace(lambda x, w, b: torch.addmm(b, x, w.t()) @ w, b=(4,))
    before = text(graph_module)
    assert NormalizeProducts()(graph_module).changes == ()
    assert text(graph_module) == before


def test_an_unused_transpose_of_something_else_is_kept() -> None:
    """The pass edits what it knows; dead code of the user's is not its business."""

    def program(x, p, step_absmax, step_count, in_dim_seen):
        x.t()
        return x @ observed(p, step_absmax, step_count, in_dim_seen).t()

    graph_module = trace(program)
    NormalizeProducts()(graph_module)
    assert len(nodes(graph_module, "t")) == 1


def test_a_transpose_with_another_user_is_kept() -> None:
    def program(x, p, step_absmax, step_count, in_dim_seen):
        transposed = observed(p, step_absmax, step_count, in_dim_seen).t()
        return x @ transposed, transposed.sum()

    graph_module = trace(program)
    NormalizeProducts()(graph_module)
    assert text(graph_module) == (
        f"{MARKER}\n"
        "t = observe_weight_default.t()\n"
        "linear = linear(x, observe_weight_default, None)\n"
        "sum_1 = t.sum()\n"
        "return (linear, sum_1)"
    )


def test_the_recorded_value_of_the_result_is_kept() -> None:
    graph_module = graph_of(lambda x, w, b: x @ w.t())
    (product,) = [node for node in graph_module.graph.nodes if node.name == "matmul"]
    product.meta["example_value"] = value = torch.empty(3, 4, device="meta")
    NormalizeProducts()(graph_module)
    (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
    assert output.args[0].meta["example_value"] is value


@pytest.mark.parametrize(("product", "_"), (IN_OUT | OUT_IN).values(), ids=IN_OUT | OUT_IN)
def test_twice_changes_nothing_and_the_same_graph_gives_the_same_text(product: Any, _: str) -> None:
    first, second = graph_of(product), graph_of(product)
    NormalizeProducts()(first)
    NormalizeProducts()(second)
    once = text(first)
    assert text(second) == once
    assert NormalizeProducts()(first).changes == ()
    assert text(first) == once


@pytest.mark.parametrize("is_sharing", [False, True])
def test_under_autocast_x_is_cast_to_the_dtype_of_the_result(is_sharing: bool) -> None:
    """Two products of one x: each a cast of its own, whose gradients add up in float32, or one for both."""

    def program(x, p, step_absmax, step_count, in_dim_seen):
        w = observed(p, step_absmax, step_count, in_dim_seen)
        return F.linear(x, w), F.linear(x, w)

    graph_module = trace(program, x=(3, 4))
    for node in nodes(graph_module, F.linear):
        node.meta["example_value"] = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
    normalize = NormalizeProducts(is_sharing_casts=is_sharing)
    assert changes_of(normalize(graph_module).changes) == ["p: normalized"] * 2
    casts = nodes(graph_module, "to")
    assert [cast.args for cast in casts] == [(cast.args[0], torch.bfloat16) for cast in casts]
    assert len(casts) == (1 if is_sharing else 2)
    linears = nodes(graph_module, F.linear)
    assert [linear.args[0] for linear in linears] == (casts * 2 if is_sharing else casts)
    assert normalize(graph_module).changes == ()


def test_an_edit_between_two_products_separates_their_casts() -> None:
    def program(x, p, step_absmax, step_count, in_dim_seen):
        w = observed(p, step_absmax, step_count, in_dim_seen)
        first = F.linear(x, w)
        x.add_(1)
        return first, F.linear(x, w)

    graph_module = trace(program, x=(3, 4))
    for node in nodes(graph_module, F.linear):
        node.meta["example_value"] = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
    NormalizeProducts(is_sharing_casts=True)(graph_module)
    first, second = nodes(graph_module, "to")
    order = list(graph_module.graph.nodes)
    (edit,) = nodes(graph_module, "add_")
    assert order.index(first) < order.index(edit) < order.index(second)


def test_a_weight_in_another_dtype_keeps_one_cast() -> None:
    """DoRA with dropout in a bfloat16 model multiplies by the weight in float32: a linear of the cast weight."""

    def program(x, p, step_absmax, step_count, in_dim_seen):
        return x @ observed(p, step_absmax, step_count, in_dim_seen).to(torch.float32).t()

    graph_module = trace(program, x=(3, 4))
    marker, cast, transpose, _ = list(graph_module.graph.nodes)[-5:-1]
    marker.meta["example_value"] = torch.empty(4, 4, dtype=torch.bfloat16, device="meta")
    cast.meta["example_value"] = transpose.meta["example_value"] = torch.empty(4, 4, device="meta")
    assert changes_of(NormalizeProducts()(graph_module).changes) == ["p: normalized"]
    assert text(graph_module) == (
        f"{MARKER}\nto_1 = observe_weight_default.to(torch.float32)\nlinear = linear(x, to_1, None)\nreturn linear"
    )
    assert NormalizeProducts()(graph_module).changes == ()
