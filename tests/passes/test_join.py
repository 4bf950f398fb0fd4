"""The low-rank term of an int8 product joins its outlier term, where the kernel of the device takes one."""

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
from quaff_fx.passes import join
from quaff_fx.passes.join import JoinTerms
from tests.passes.tracing import nodes, text

INT8_LINEAR = torch.ops.quaff.int8_linear.default
T, K, N = 6, 8, 10


def values(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    integers = [torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for shape in ((T, K), (N, K))]
    floats = [torch.randn(shape, generator=generator) for shape in ((T, 3), (3, N), (T, 2), (2, N))]
    return *integers, torch.rand(T, generator=generator), floats[0], *(each.to(dtype) for each in floats[1:])


def program(a: Tensor, w: Tensor, s: Tensor, x_o: Tensor, w_o: Tensor, h: Tensor, b: Tensor) -> Tensor:
    y: Tensor = INT8_LINEAR(a, w, False, s, None, x_o, w_o, None, torch.float32, 127, 1, h, b)
    return y


def without_outliers(a: Tensor, w: Tensor, s: Tensor, x_o: Tensor, w_o: Tensor, h: Tensor, b: Tensor) -> Tensor:
    y: Tensor = INT8_LINEAR(a, w, False, s, None, None, None, None, torch.float32, 127, 1, h, b)
    return y


def outliers_alone(a: Tensor, w: Tensor, s: Tensor, x_o: Tensor, w_o: Tensor, h: Tensor, b: Tensor) -> Tensor:
    y: Tensor = INT8_LINEAR(a, w, False, s, None, x_o, w_o, None, torch.float32, 127, 1)
    return y


def traced(given: tuple[Tensor, ...], what: Callable[..., Tensor] = program) -> GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph_module: GraphModule = make_fx(what)(*(mode.from_tensor(tensor) for tensor in given))
    for node, name in zip(graph_module.graph.nodes, ("a", "w", "s", "x_o", "w_o", "h", "b"), strict=False):
        node._rename(f"{name}_")
    return graph_module


def test_both_terms_become_one_in_float32() -> None:
    given = values(torch.bfloat16)
    before, result = traced(given), JoinTerms()(traced(given))
    assert text(result.graph_module).splitlines()[7:-1] == [
        "convert_element_type_default = torch.ops.prims.convert_element_type.default(h_, torch.float32)",
        "convert_element_type_default_1 = torch.ops.prims.convert_element_type.default(w_o_, torch.float32)",
        "convert_element_type_default_2 = torch.ops.prims.convert_element_type.default(b_, torch.float32)",
        "cat_default = torch.ops.aten.cat.default([x_o_, convert_element_type_default], 1)",
        "cat_default_1 = torch.ops.aten.cat.default([convert_element_type_default_1, convert_element_type_default_2])",
        "int8_linear_default = quaff.int8_linear.default(a_, w_, False, s_, None, cat_default, cat_default_1, None, "
        "torch.float32, 127, 1)",
    ]
    assert [change.action for change in result.changes] == ["joined"]
    torch.testing.assert_close(result.graph_module(*given), before(*given), rtol=1e-6, atol=1e-5)


def test_twice_changes_nothing_more() -> None:
    once = JoinTerms()(traced(values(torch.float32))).graph_module
    code = text(once)
    assert JoinTerms()(once).changes == ()
    assert text(once) == code


def test_a_term_alone_takes_the_place_of_the_outliers() -> None:
    given = values(torch.float32)
    result = JoinTerms()(traced(given, without_outliers))
    (product,) = nodes(result.graph_module, INT8_LINEAR)
    assert [str(operand) for operand in product.args[5:7]] == ["h_", "b_"]
    assert len(product.args) == 11
    torch.testing.assert_close(result.graph_module(*given), without_outliers(*given))


@pytest.mark.parametrize(("dtype", "casts"), [(torch.float32, 0), (torch.float16, 1)])
def test_outliers_alone_are_cast_and_no_change(dtype: torch.dtype, casts: int) -> None:
    result = JoinTerms()(traced(values(dtype), outliers_alone))
    assert result.changes == ()
    assert len(nodes(result.graph_module, torch.ops.prims.convert_element_type.default)) == casts


def test_a_kernel_that_takes_both_keeps_both(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = dataclasses.replace(dispatch._REFERENCE, owns_low_rank=True)
    monkeypatch.setattr(join, "kernels_of", lambda _: kernels)
    graph_module = traced(values(torch.bfloat16))
    code = text(graph_module)
    assert JoinTerms()(graph_module).changes == ()
    assert text(graph_module) == code
