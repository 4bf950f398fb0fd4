"""The thin products of adapters that read the same activation become one; what they give stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from quaff_fx.kernels import dispatch
from quaff_fx.passes import factors
from quaff_fx.passes.factors import JoinFirstFactors
from quaff_fx.passes.fold import MAX_RANK
from tests.passes.tracing import nodes, text

MM = torch.ops.aten.mm.default
NAMES = ("x", "a", "b", "c")
T, K = 6, 8


@pytest.fixture(autouse=True)
def _on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = dataclasses.replace(dispatch._REFERENCE, launched_by_inductor=True)
    monkeypatch.setattr(factors, "kernels_of", lambda _: kernels)


def values(*ranks: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in ((T, K), *((rank, K) for rank in ranks)))


def gradients(*ranks: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in ((T, K), *((T, rank) for rank in ranks)))


def traced(program: Callable[..., object], given: tuple[Tensor, ...]) -> GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph_module: GraphModule = make_fx(program)(*(mode.from_tensor(tensor) for tensor in given))
    for node, name in zip(graph_module.graph.nodes, NAMES[: len(given)], strict=False):
        node._rename(f"{name}_")
    return graph_module


def turned(x: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten.permute.default(x, [1, 0])
    return y


def forward(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h_a = torch.mm(x, turned(a))
    return h_a.relu(), torch.mm(x, turned(b))


def backward(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    first = turned(torch.mm(turned(a), x))
    return turned(first), torch.mm(turned(b), x)


def test_factors_are_multiplied_together() -> None:
    given = values(2, 3)
    before, result = traced(forward, given), JoinFirstFactors()(traced(forward, given))
    assert text(result.graph_module).splitlines()[3:-1] == [
        "cat_default = torch.ops.aten.cat.default([a_, b_])",
        "permute_default = torch.ops.aten.permute.default(cat_default, [1, 0])",
        "mm_default = torch.ops.aten.mm.default(x_, permute_default)",
        "slice_tensor = torch.ops.aten.slice.Tensor(mm_default, 1, 0, 2)",
        "slice_tensor_1 = torch.ops.aten.slice.Tensor(mm_default, 1, 2, 5)",
        "relu = torch.ops.aten.relu.default(slice_tensor)",
    ]
    assert [str(change) for change in result.changes] == ["slice_tensor: joined", "slice_tensor_1: joined"]
    for expected, got in zip(before(*given), result.graph_module(*given), strict=True):
        torch.testing.assert_close(got, expected)


def test_their_gradients_too() -> None:
    given = gradients(2, 3)
    before, result = traced(backward, given), JoinFirstFactors()(traced(backward, given))
    (product,) = nodes(result.graph_module, MM)
    assert str(product.args[1]) == "x_"
    assert len(result.changes) == 2
    for expected, got in zip(before(*given), result.graph_module(*given), strict=True):
        torch.testing.assert_close(got, expected)


def test_twice_changes_nothing_more() -> None:
    once = JoinFirstFactors()(traced(forward, values(2, 3))).graph_module
    code = text(once)
    assert JoinFirstFactors()(once).changes == ()
    assert text(once) == code


@pytest.mark.parametrize(
    ("name", "program", "given"),
    [
        ("another x", lambda x, a, b: (torch.mm(x, turned(a)), torch.mm(x * 2, turned(b))), values(2, 3)),
        ("one", lambda x, a: torch.mm(x, turned(a)), values(2)),
        ("a high rank", forward, values(2, MAX_RANK + 1)),
        (
            "a factor that is computed",
            lambda x, a, b: (torch.mm(x, turned(a)), torch.mm(x, turned(b + 1))),
            values(2, 3),
        ),
        ("a factor of a product", lambda x, a, b: torch.mm(x, turned(b + torch.mm(x, turned(a)).sum())), values(2, 3)),
        ("no transpose", lambda x, a, b: (torch.mm(turned(x), a), torch.mm(turned(x), b)), gradients(2, 3)),
        (
            "a gradient that is read",
            lambda x, a, b: torch.mm(turned(a), x).sum() + torch.mm(turned(b), x),
            gradients(2, 2),
        ),
    ],
)
def test_what_it_leaves_alone(name: str, program: Callable[..., object], given: tuple[Tensor, ...]) -> None:
    before, result = traced(program, given), JoinFirstFactors()(traced(program, given))
    assert result.changes == ()
    assert text(result.graph_module) == text(before)


def test_it_leaves_devices_without_launches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "kernels_of", lambda _: dispatch._REFERENCE)
    assert JoinFirstFactors()(traced(forward, values(2, 3))).changes == ()
