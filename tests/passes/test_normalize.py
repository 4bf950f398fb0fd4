"""Every product with a marked weight becomes one form of linear; nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from quaff_fx.passes import NormalizeProducts
from tests.passes.tracing import MARKER, changes_of, nodes, quantized_values, text, trace, trace_use

aten = torch.ops.aten


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
    graph_module = trace_use(product)
    changes = NormalizeProducts()(graph_module).changes
    marker, linear, output = text(graph_module).splitlines()
    name = linear.split(" = ")[0]
    assert (marker, output) == (MARKER, f"return {name}")
    assert linear == f"{name} = linear(x, dequantize_weight_default, {bias})"
    assert changes_of(changes) == ["w_int8: normalized"]


@pytest.mark.parametrize(("product", "bias"), IN_OUT.values(), ids=IN_OUT)
def test_a_product_over_the_first_dimension_becomes_a_linear_with_one_transpose(product: Any, bias: str) -> None:
    graph_module = trace_use(product)
    NormalizeProducts()(graph_module)
    marker, transpose, linear, output = text(graph_module).splitlines()
    assert marker == MARKER
    name = transpose.split(" = ")[0]
    assert transpose == f"{name} = dequantize_weight_default.t()"
    assert linear.split(" = ")[1] == f"linear(x, {name}, {bias})"
    assert output == f"return {linear.split(' = ')[0]}"


@pytest.mark.parametrize(("product", "_"), (IN_OUT | OUT_IN).values(), ids=IN_OUT | OUT_IN)
def test_the_normalized_graph_computes_the_same(product: Any, _: str) -> None:
    """A square weight, so that a wrong transposition would not fail but compute something else."""
    graph_module = trace_use(product)
    values = (torch.randn(3, 4), *quantized_values(4, 4), torch.randn(4))
    expected = graph_module(*values)
    NormalizeProducts()(graph_module)
    graph_module.recompile()
    torch.testing.assert_close(graph_module(*values), expected)


def test_a_weight_that_is_not_square() -> None:
    graph_module = trace_use(lambda x, w, b: x @ w.T)
    values = (torch.randn(3, 6), *quantized_values(4, 6), torch.zeros(4))
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
    graph_module = trace_use(use, bias)
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

    def use(x: Any, w: Any, b: Any) -> Any:
        x.t()
        return x @ w.t()

    graph_module = trace_use(use)
    NormalizeProducts()(graph_module)
    assert len(nodes(graph_module, "t")) == 1


def test_a_transpose_with_another_user_is_kept() -> None:
    def use(x: Any, w: Any, b: Any) -> Any:
        transposed = w.t()
        return x @ transposed, transposed.sum()

    graph_module = trace_use(use)
    NormalizeProducts()(graph_module)
    assert text(graph_module) == (
        f"{MARKER}\n"
        "t = dequantize_weight_default.t()\n"
        "linear = linear(x, dequantize_weight_default, None)\n"
        "sum_1 = t.sum()\n"
        "return (linear, sum_1)"
    )


def test_the_recorded_value_of_the_result_is_kept() -> None:
    graph_module = trace_use(lambda x, w, b: x @ w.t())
    (product,) = [node for node in graph_module.graph.nodes if node.name == "matmul"]
    product.meta["example_value"] = value = torch.empty(3, 4, device="meta")
    NormalizeProducts()(graph_module)
    (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
    assert output.args[0].meta["example_value"] is value


@pytest.mark.parametrize(("product", "_"), (IN_OUT | OUT_IN).values(), ids=IN_OUT | OUT_IN)
def test_twice_changes_nothing_and_the_same_graph_gives_the_same_text(product: Any, _: str) -> None:
    first, second = trace_use(product), trace_use(product)
    NormalizeProducts()(first)
    NormalizeProducts()(second)
    once = text(first)
    assert text(second) == once
    assert NormalizeProducts()(first).changes == ()
    assert text(first) == once


def test_under_autocast_x_is_cast_to_the_dtype_of_the_result_once_for_all_products() -> None:
    graph_module = trace_use(lambda x, w, b: (F.linear(x, w), F.linear(x, w)), x=(3, 4))
    for node in nodes(graph_module, F.linear):
        node.meta["example_value"] = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
    assert changes_of(NormalizeProducts()(graph_module).changes) == ["w_int8: normalized"] * 2
    (cast,) = nodes(graph_module, "to")
    assert cast.args == (cast.args[0], torch.bfloat16)
    assert cast.args[0].name == "x"
    assert [linear.args[0] for linear in nodes(graph_module, F.linear)] == [cast, cast]
    assert NormalizeProducts()(graph_module).changes == ()


def test_an_edit_between_two_products_separates_their_casts() -> None:
    def use(x: Any, w: Any, b: Any) -> Any:
        first = F.linear(x, w)
        x.add_(1)
        return first, F.linear(x, w)

    graph_module = trace_use(use, x=(3, 4))
    for node in nodes(graph_module, F.linear):
        node.meta["example_value"] = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
    NormalizeProducts()(graph_module)
    first, second = nodes(graph_module, "to")
    assert [linear.args[0] for linear in nodes(graph_module, F.linear)] == [first, second]
    order = list(graph_module.graph.nodes)
    (edit,) = nodes(graph_module, "add_")
    assert order.index(first) < order.index(edit) < order.index(second)


def test_a_weight_in_another_dtype_keeps_one_cast() -> None:
    """DoRA with dropout in a bfloat16 model multiplies by the weight in float32: a linear of the cast weight."""

    graph_module = trace_use(lambda x, w, b: x @ w.to(torch.float32).t(), x=(3, 4))
    marker, cast, transpose, _ = list(graph_module.graph.nodes)[-5:-1]
    marker.meta["example_value"] = torch.empty(4, 4, dtype=torch.bfloat16, device="meta")
    cast.meta["example_value"] = transpose.meta["example_value"] = torch.empty(4, 4, device="meta")
    assert changes_of(NormalizeProducts()(graph_module).changes) == ["w_int8: normalized"]
    assert text(graph_module) == (
        f"{MARKER}\nto_1 = dequantize_weight_default.to(torch.float32)\nlinear = linear(x, to_1, None)\nreturn linear"
    )
    assert NormalizeProducts()(graph_module).changes == ()
