"""Ops that kernels of Triton compute become their launches; what kernels compute is in tests/kernels/cuda."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from quaff_fx.errors import PassError
from quaff_fx.passes import spec
from quaff_fx.passes.launch import LaunchKernels
from tests import cards, interpreted
from tests.passes.tracing import nodes, text

pytest.importorskip("triton", reason="Triton is not installed")

ATEN, QUAFF = torch.ops.aten, torch.ops.quaff
LAUNCH = torch.ops.higher_order.triton_kernel_wrapper_functional
T, K, N = 6, 64, 32


def values() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, T // 2, K, generator=generator)
    w = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    w_scale = torch.rand(N, generator=generator) / 127
    return x, torch.tensor([3, 40]), torch.full((2,), torch.inf), w, w_scale, torch.randn(2, N, generator=generator)


def program(x: Tensor, channels: Tensor, s: Tensor, w: Tensor, w_scale: Tensor, w_o: Tensor) -> tuple[Tensor, Tensor]:
    """A normalized activation that a linear and an adapter read, each through a view of its own."""
    normalized = x * 2.0
    parts = QUAFF.quantize_rows(ATEN.view(ATEN.alias(normalized), [T, K]), channels, s, 127, 64)
    y = QUAFF.int8_linear(parts[0], w, False, parts[1], w_scale, parts[2], w_o, None, torch.float32, 127, 1)
    return y, ATEN.view(normalized, [T, K]).sum(1)


def traced(what: Callable[..., object] = program) -> GraphModule:
    """The lowered graph, with the kernels of a card."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph_module: GraphModule = make_fx(what)(*(mode.from_tensor(tensor) for tensor in values()))
    return graph_module


def test_each_op_becomes_its_launches_and_the_result_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with cards.as_on_card():
        before = traced()
        result = LaunchKernels()(traced())
        spec.check_lowered(result.graph_module)
    assert [change.action for change in result.changes] == ["launched", "launched"]
    assert len(nodes(result.graph_module, LAUNCH)) == 3, "the quantizer's factors and rows, and the product"
    assert "quaff" not in text(result.graph_module)
    expected = before(*values())
    interpreted.install(monkeypatch)
    for found, there in zip(result.graph_module(*values()), expected, strict=True):
        torch.testing.assert_close(found, there, rtol=1e-3, atol=1e-2)


def test_what_reads_the_same_activation_reads_one_view_of_it() -> None:
    with cards.as_on_card():
        graph_module = LaunchKernels()(traced()).graph_module
    (view,) = nodes(graph_module, ATEN.view.default)
    assert {user.target for user in view.users} == {LAUNCH, ATEN.sum.dim_IntList}


def test_twice_changes_nothing_more() -> None:
    with cards.as_on_card():
        once = LaunchKernels()(traced()).graph_module
        code = text(once)
        assert LaunchKernels()(once).changes == ()
    assert text(once) == code


def test_it_leaves_the_kernels_of_a_cpu_alone() -> None:
    graph_module = traced()
    code = text(graph_module)
    assert LaunchKernels()(graph_module).changes == ()
    assert text(graph_module) == code


def test_an_op_that_was_not_launched_is_refused() -> None:
    with cards.as_on_card(), pytest.raises(PassError, match="expected the launches of its kernel"):
        spec.check_lowered(traced())
