"""Low-rank products that are added to an int8 product go into its epilogue; the sum stays the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from quaff_fx.passes import pipeline
from quaff_fx.passes.fold import MAX_RANK, FoldLowRankProducts
from quaff_fx.passes.infrastructure import PassResult
from tests.passes.tracing import nodes, text

INT8_LINEAR = torch.ops.quaff.int8_linear.default
MM = torch.ops.aten.mm.default
T, K, N, OUTLIERS, RANK = 6, 8, 10, 3, 2


def values(dtype: torch.dtype = torch.float32, rank: int = RANK) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    return {
        "a": integers(T, K),
        "w": integers(N, K),
        "a_scale": normal(T).abs() / 127,
        "w_scale": normal(N).abs() / 127,
        "x_o": normal(T, OUTLIERS),
        "w_o": normal(OUTLIERS, N),
        "h": normal(T, rank, dtype=dtype),
        "b": normal(rank, N, dtype=dtype),
    }


def int8_linear(v: dict[str, Tensor], *, corrected: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    x_o, w_o = (v["x_o"], v["w_o"]) if corrected else (None, None)
    y: Tensor = INT8_LINEAR(v["a"], v["w"], False, v["a_scale"], v["w_scale"], x_o, w_o, None, dtype, 127, 1)
    return y


def folded(program: Callable[[dict[str, Tensor]], object], given: dict[str, Tensor]) -> tuple[GraphModule, PassResult]:
    """Returns the lowered graph of `program` as traced, and what the pass made of a second one."""
    names = list(given)

    def lowered() -> GraphModule:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(tensor) for tensor in given.values()]
            graph_module = make_fx(lambda *tensors: program(dict(zip(names, tensors, strict=True))))(*fake)
        for node, name in zip(graph_module.graph.nodes, names, strict=False):
            node._rename(f"{name}_")
        return graph_module

    return lowered(), pipeline.lower(lowered())


def adapted(v: dict[str, Tensor]) -> Tensor:
    """An adapted linear as AOTAutograd lowers it."""
    product = torch.ops.aten.view(torch.mm(v["h"], v["b"]), [1, T, N])
    return torch.ops.aten.view(int8_linear(v), [1, T, N]) + product * 2.0


SHARED = "a low-rank product is added to it where it is scaled, or read by something else as well"


def assert_same(before: GraphModule, after: GraphModule, given: dict[str, Tensor]) -> None:
    expected, result = before(*given.values()), after(*given.values())
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_the_low_rank_product_becomes_a_part_of_the_correction() -> None:
    given = values()
    before, result = folded(adapted, given)
    assert text(result.graph_module).splitlines()[len(given) : -1] == [
        "mul_tensor = torch.ops.aten.mul.Tensor(b_, 2.0)",
        "cat_default = torch.ops.aten.cat.default([x_o_, h_], 1)",
        "cat_default_1 = torch.ops.aten.cat.default([w_o_, mul_tensor])",
        "int8_linear_default_1 = quaff.int8_linear.default(a_, w_, False, a_scale_, w_scale_, cat_default, "
        "cat_default_1, None, torch.float32, 127, 1)",
        "view_1 = torch.ops.aten.view.default(int8_linear_default_1, [1, 6, 10])",
    ]
    assert [change.action for change in result.changes] == ["folded", "joined"]
    assert_same(before, result.graph_module, given)


def test_twice_changes_nothing_more() -> None:
    _, first = folded(adapted, values())
    code = text(first.graph_module)
    second = FoldLowRankProducts()(first.graph_module)
    assert not second.changes
    assert text(second.graph_module) == code


def test_without_a_correction_the_operands_are_the_low_rank_product() -> None:
    given = values()
    before, result = folded(lambda v: torch.mm(v["h"], v["b"]) + int8_linear(v, corrected=False), given)
    (product,) = nodes(result.graph_module, INT8_LINEAR)
    assert [node.name for node in product.args[5:7]] == ["h_", "b_"]
    assert not nodes(result.graph_module, torch.ops.aten.cat.default)
    assert_same(before, result.graph_module, given)


def test_a_sum_of_several_gives_each_int8_product_one() -> None:
    def backward(v: dict[str, Tensor]) -> Tensor:
        first = torch.mm(v["h"], v["b"]) + int8_linear(v)
        second = torch.mm(v["h"] * 0.5, v["b"]) + int8_linear(v, corrected=False)
        return (first + second) + v["w_scale"].expand(T, N)

    given = values()
    before, result = folded(backward, given)
    assert not nodes(result.graph_module, MM)
    assert [len(node.all_input_nodes) for node in nodes(result.graph_module, INT8_LINEAR)] == [6, 6]
    assert_same(before, result.graph_module, given)


def test_more_low_rank_products_than_int8_products() -> None:
    given = values()
    before, result = folded(lambda v: int8_linear(v) + torch.mm(v["h"], v["b"]) + torch.mm(v["x_o"], v["w_o"]), given)
    assert not nodes(result.graph_module, MM)
    assert [change.action for change in result.changes] == ["folded", "folded", "joined"]
    assert_same(before, result.graph_module, given)


def test_bfloat16_adapters_are_added_up_in_float32() -> None:
    def program(v: dict[str, Tensor]) -> Tensor:
        return int8_linear(v, dtype=torch.bfloat16) + torch.mm(v["h"], v["b"])

    given = values(torch.bfloat16)
    before, result = folded(program, given)
    (product,) = nodes(result.graph_module, INT8_LINEAR)
    assert product.args[8] == torch.bfloat16
    exact = program({name: t.double() if name in ("h", "b") else t for name, t in given.items()})  # promotes
    error = (result.graph_module(*given.values()).double() - exact).abs().max()
    assert error <= (before(*given.values()).double() - exact).abs().max()


@pytest.mark.parametrize(
    ("reason", "program"),
    [
        (
            "a product that something else reads as well is added to it",
            lambda v: (lambda z: (int8_linear(v) + z, z.sum()))(torch.mm(v["h"], v["b"])),
        ),
        (SHARED, lambda v: (lambda y: (y + torch.mm(v["h"], v["b"]), y))(int8_linear(v))),
        (SHARED, lambda v: int8_linear(v) * 3.0 + torch.mm(v["h"], v["b"])),
    ],
    ids=["also read by something else", "int8 product read twice", "int8 product scaled"],
)
def test_it_says_what_it_leaves_alone(reason: str, program: Callable[[dict[str, Tensor]], object]) -> None:
    before, result = folded(program, values())
    assert [str(change) for change in result.changes] == [f"int8_linear: left alone ({reason})"]
    assert text(result.graph_module) == text(before)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("broadcast", lambda v: int8_linear(v) + torch.mm(v["h"][:1], v["b"])),
        ("rows not kept whole", lambda v: int8_linear(v).view(N, T) + torch.mm(v["h"], v["b"]).view(N, T)),
        ("scaled by a tensor", lambda v: int8_linear(v) + torch.mm(v["h"], v["b"]) * v["w_scale"]),
        ("no int8 product", lambda v: torch.mm(v["x_o"], v["w_o"]) + torch.mm(v["h"], v["b"])),
    ],
)
def test_what_is_no_low_rank_addend_is_no_change(name: str, program: Callable[[dict[str, Tensor]], object]) -> None:
    before, result = folded(program, values())
    assert not result.changes
    assert text(result.graph_module) == text(before)


def test_it_leaves_a_high_rank_alone() -> None:
    def program(v: dict[str, Tensor]) -> Tensor:
        return int8_linear(v) + torch.mm(v["h"], v["b"])

    assert folded(program, values(rank=MAX_RANK))[1].changes
    (declined,) = folded(program, values(rank=MAX_RANK + 1))[1].changes
    assert (declined.action, declined.reason) == (
        "left alone",
        "a product of rank 65 is added to it, folded are those of at most 64",
    )
