"""Launches as graphs see them: tensors are allocated, kernels are nodes that Inductor launches, nothing else runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests import interpreted
from tests.data import integers, normal

pytest.importorskip("triton", reason="Triton is not installed; builds of torch for a CPU come without")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.install(monkeypatch)


def quantize(x: Tensor, channels: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    from quaff_fx.kernels.cuda.rows import quantize_activation

    return quantize_activation(x, channels, s, 127, 64)


def forward(a: Tensor, w: Tensor, a_scale: Tensor, a_outlier: Tensor, w_outlier: Tensor, b: Tensor) -> Tensor:
    from quaff_fx.kernels.cuda.product import int8_linear

    return int8_linear(
        a, w, transpose_w=False, activation_max=127, a_scale=a_scale, a_outlier=a_outlier, w_outlier=w_outlier,
        a_low_rank=a_outlier[:, :8], w_low_rank=b.t(), out_dtype=torch.bfloat16,
    )  # fmt: skip


def backward(a: Tensor, w: Tensor, a_scale: Tensor) -> Tensor:
    from quaff_fx.kernels.cuda.product import int8_linear

    return int8_linear(
        a, w, transpose_w=True, activation_max=127, a_scale=a_scale, out_dtype=torch.bfloat16, rotation=64
    )


def bf16(*shape: int, seed: int) -> Tensor:
    return normal(*shape, seed=seed, dtype=torch.bfloat16)


CASES: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Tensor, ...]], list[str]]] = {
    "quantize": (
        quantize,
        lambda t: (bf16(t, 192, seed=0), torch.tensor([3, 9]), torch.tensor([float("inf"), 2.0])),
        ["factor_kernel", "quantize_kernel"],
    ),
    "forward": (
        forward,
        lambda t: (
            integers(t, 192, seed=0), integers(72, 192, seed=1), normal(t, seed=2).abs(), bf16(t, 16, seed=3),
            bf16(3, 72, seed=4), bf16(72, 8, seed=5),
        ),
        ["int8_linear_kernel"],
    ),
    "backward": (
        backward,
        lambda t: (integers(t, 72, seed=0), integers(72, 192, seed=1), normal(t, seed=2).abs()),
        ["transpose_kernel", "int8_linear_kernel"],
    ),
}  # fmt: skip
CASE = pytest.mark.parametrize("case", CASES)
aten = torch.ops.aten
NO_WORK = {aten.empty.memory_format, aten.t.default, aten.slice.Tensor, aten.sym_size.int, aten.sym_stride.int}
"""What a graph may hold beside kernels: allocation, views and sizes."""


def kernel_names(graph_module: torch.fx.GraphModule) -> list[str]:
    """Returns the kernels of a graph, in order; fails if anything else computes."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    launches = graph_module.graph.find_nodes(op="call_function", target=triton_kernel_wrapper_mutation)
    assert not graph_module.graph.find_nodes(op="get_attr"), "a tensor became a constant of the graph"
    others = {node.target for node in graph_module.graph.nodes if node.op == "call_function"}
    torch_ops = {target for target in others if isinstance(target, torch._ops.OpOverload)}
    assert torch_ops <= NO_WORK
    return [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).base_fn.__name__ for node in launches]


@CASE
def test_a_traced_launch_is_empty_tensors_and_kernels(case: str) -> None:
    function, make, names = CASES[case]
    inputs = make(40)
    graph_module = make_fx(function, tracing_mode="fake")(*inputs)
    assert kernel_names(graph_module) == names
    torch.testing.assert_close(graph_module(*inputs), function(*inputs), rtol=0, atol=0, equal_nan=True)


@CASE
def test_one_graph_serves_any_number_of_tokens(case: str) -> None:
    function, make, names = CASES[case]
    graph_module = make_fx(function, tracing_mode="symbolic")(*make(40))
    assert kernel_names(graph_module) == names
    for tokens in (33, 150):
        inputs = make(tokens)
        torch.testing.assert_close(graph_module(*inputs), function(*inputs), rtol=0, atol=0, equal_nan=True)


@CASE
def test_eager_calls_leave_nothing_behind(case: str) -> None:
    """Torch keeps every kernel object that was ever launched through `wrap_triton`."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    function, make, _ = CASES[case]
    function(*make(40))
    kept = len(kernel_side_table.id_to_kernel)
    function(*make(41))
    assert len(kernel_side_table.id_to_kernel) == kept
