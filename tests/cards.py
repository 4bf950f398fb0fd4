"""A card that is not there: fake tensors on CUDA, and as much of a device as Inductor asks for while it writes code.

What runs on it is nothing; what can be looked at is all up to the code that would run: lowered graphs, the launches in
Inductor's programs, and each kernel of these compiled ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.overrides import TorchFunctionMode

from benchmarks.compile_ahead import CARDS
from quaff_fx import backend, inductor, ops
from quaff_fx.kernels import cuda, dispatch
from quaff_fx.passes import factors, join, launch, spec
from quaff_fx.passes.infrastructure import RunResult

DEVICE = torch.device("cuda", 0)


class Driver:
    """What Triton and Inductor ask the driver of a card, by its architecture: 90 is sm_90."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        properties = {"max_shared_mem": CARDS[architecture].shared_per_block}
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def get_device_interface(self) -> Any:
        return torch.cuda


class _WithoutCopies(TorchFunctionMode):
    """Leaves `Tensor.copy_` out, which asks a torch that was built without CUDA for the device of a fake tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and isinstance(args[0], FakeTensor):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def card(architecture: int = 90) -> Iterator[None]:
    """Makes torch, Inductor and Triton see one card of an architecture."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    properties = SimpleNamespace(
        name=f"sm_{architecture}",
        major=architecture // 10,
        minor=architecture % 10,
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=CARDS[architecture].threads,
        max_threads_per_block=1024,
        total_memory=80 * 2**30,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=CARDS[architecture].shared_per_block,
        shared_memory_per_multiprocessor=CARDS[architecture].shared,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
    )
    given: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "_get_device_properties": properties,
        "get_device_capability": divmod(architecture, 10),
        "is_bf16_supported": architecture >= 80,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_rng_state": torch.zeros(8, dtype=torch.uint8),
        "set_rng_state": None,
        "current_stream": SimpleNamespace(cuda_stream=0),
    }
    interface = "torch._dynamo.device_interface.CudaInterface"
    with ExitStack() as stack:
        stack.enter_context(_WithoutCopies())
        for name, value in given.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", mock.Mock(return_value=value), create=True))
        for owner in (interface, f"{interface}.Worker"):
            stack.enter_context(mock.patch(f"{owner}.get_device_properties", staticmethod(lambda *_: properties)))
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(Driver(architecture))
        _forget()
        try:
            yield
        finally:
            triton.runtime.driver._active = before
            _forget()


def _forget() -> None:
    """Clears what was asked of the device once and for all."""
    own = (dispatch.kernels_of, cuda.reason_without_triton, cuda.architecture)
    for function in (*own, *vars(torch.utils._triton).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@contextmanager
def as_on_card(architecture: int = 90) -> Iterator[None]:
    """Makes tensors on the CPU, which are really there, have the kernels of a card."""
    with card(architecture), ExitStack() as stack:
        kernels = dispatch.kernels_of(DEVICE)
        for module in (ops, factors, join, launch, spec):
            stack.enter_context(mock.patch.object(module, "kernels_of", return_value=kernels))
        yield


def lowered(graph: backend.Graph, architecture: int = 90) -> list[GraphModule]:
    """Returns the graphs that Inductor would get on a card: forward and backward, before `pipeline.lower`.

    AOTAutograd traces on the CPU, since a torch that was built without CUDA has no autograd of its tensors, but with
    the kernels of the card; what it made is moved.
    """
    made: list[GraphModule] = []

    def keep(graph_module: GraphModule, **_: object) -> RunResult:
        made.append(graph_module)
        return RunResult(graph_module, ())

    with as_on_card(architecture), mock.patch.object(backend.pipeline, "lower", keep):
        backend.lower(graph.graph_module, graph.fake_inputs, graph.autocast)
    return [_moved(graph_module) for graph_module in made]


def _moved(graph_module: GraphModule) -> GraphModule:
    """Returns the graph with every tensor on the card."""
    placeholders = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in placeholders if isinstance(value, FakeTensor))
    inputs = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            if isinstance(value, Tensor):
                with mode:
                    value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
            inputs.append(value)
        elif isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": DEVICE}
    graph_module.recompile()
    FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*inputs)
    return graph_module


def program(graph_module: GraphModule) -> str:
    """Returns the program that Inductor writes for a lowered graph; under `card`."""
    written: list[str] = []

    def write(lowering: GraphLowering) -> Any:
        code: Any = lowering.codegen()[0]
        written.append(getattr(code, "value", code))
        return SimpleNamespace(call=None, __file__="", key="", runner=None, recursively_apply_fns=None)

    inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with (
        mock.patch.object(GraphLowering, "compile_to_module", write),
        torch._inductor.config.patch(fx_graph_cache=False),
        tracing(TracingContext(mode)),
        mode,
    ):
        inductor.compile_fx.compile_fx_inner(graph_module, inputs)
    return written[0]
