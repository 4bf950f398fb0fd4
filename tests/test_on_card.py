"""What a compiled model would run on a card: its lowered graphs, Inductor's programs for them, and what they compute.

There is no card: programs are looked at (`tests/cards.py`), and kernels are interpreted (`tests/interpreted.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import quaff_fx
from quaff_fx import backend
from quaff_fx.passes import pipeline
from tests import cards, interpreted
from tests.models import Run, tiny_llama, token_ids

pytestmark = [pytest.mark.compile, pytest.mark.slow]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@cache
def graph_of(dtype: torch.dtype, **config: Any) -> backend.Graph:
    """The rewritten graph of a later block of a tiny Llama with LoRA on every linear."""
    model = tiny_llama(3, **(SIZES | config)).to(dtype)
    run = Run(quaff_fx.compile(model, {"progress": False, "calibration_steps": 1}))
    for _ in range(2):
        run.step(token_ids(2, 64))
    return quaff_fx.graphs(run.model)[-1]


@cache
def programs(dtype: torch.dtype) -> tuple[str, ...]:
    written = []
    for graph_module in cards.lowered(graph_of(dtype)):
        with cards.card():
            written.append(cards.program(pipeline.lower(graph_module).graph_module))
    return tuple(written)


def launches(program: str) -> list[str]:
    """The kernels that a program launches, in order, by the names of their functions."""
    body = program[program.index("def call(") :]
    return [re.sub(r"_\d+$", "", name) for name in re.findall(r"(\w+)\.run\(", body)]


def written_int8(program: str) -> list[str]:
    """The int8 tensors that a program makes room for."""
    return re.findall(r"= empty_strided_cuda\((\([^)]*\)), \([^)]*\), torch\.int8\)", program)


def test_forward_launches_one_kernel_for_each_product_and_each_quantized_activation() -> None:
    names = launches(programs(torch.bfloat16)[0])
    assert names.count("int8_linear_kernel") == 7
    assert names.count("quantize_kernel") == 4, "q, k and v share one, gate and up another"
    assert "transpose_kernel" not in names


def test_backward_transposes_each_weight_and_multiplies_once() -> None:
    names = launches(programs(torch.bfloat16)[1])
    assert names.count("int8_linear_kernel") == names.count("transpose_kernel") == 7
    assert "quantize_kernel" not in names, "Inductor fuses it with what makes the gradient"


def test_nothing_is_in_memory_twice() -> None:
    forward, backward = programs(torch.bfloat16)
    assert len(written_int8(forward)) <= 4, "an activation's integers, once for all that multiply it"
    # Of each of seven products the gradient's integers and the transposed weight; some in the place of others.
    assert len(written_int8(backward)) <= 14
    x = r"\(128, 256\), \(256, 1\), torch\.bfloat16|\(2, 64, 256\), \(16384, 256, 1\), torch\.bfloat16"
    # Two normalized activations, the residual, three products of that width and q, rotated: some reuse others' memory.
    assert len(re.findall(f"empty_strided_cuda\\(({x})\\)", forward)) <= 7


def test_no_cast_and_no_join_of_low_rank_operands_is_left() -> None:
    graphs = []
    for graph_module in cards.lowered(graph_of(torch.bfloat16)):
        with cards.card():
            graphs.append(pipeline.lower(graph_module).stages[-1].text)
    forward, backward = graphs
    matrices = re.findall(r'"(\w+)\[(\d+, \d+)\]" = torch\.ops\.aten\.cat\.default', forward + backward)
    # The first factors of q, k, v and of gate, up; forward they are joined, backward what multiplies them.
    assert sorted(matrices) == [("bf16", shape) for shape in ("12, 256", "128, 12", "128, 8", "8, 256")]
    assert not re.findall(r"convert_element_type\.default\((?:slice|mm)\w*, torch\.float32\)", forward + backward)


def test_one_product_of_the_first_factors_that_read_one_activation() -> None:
    forward, backward = programs(torch.bfloat16)
    assert forward.count("extern_kernels.mm(") == 4, "q k v, o, gate up, down"
    # Backward: seven dy B, seven dyᵀ h, and the gradients of the first factors, joined alike.
    assert backward.count("extern_kernels.mm(") == 7 + 7 + 4


# --- what they compute ---------------------------------------------------------------------------------------------


class Recorded:
    """A block's rewritten graph with the tensors that a training step gave it."""

    def __init__(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[backend.Graph | GraphModule, tuple[Any, ...]]] = []

        def record(graph_module: GraphModule, _: Sequence[Any]) -> Any:
            def run(*args: Any) -> Any:
                self.calls.append((graph_module, args))
                return graph_module.forward(*args)

            return run

        monkeypatch.setattr(backend, "_compile", record)
        model = tiny_llama(3, **(SIZES | {"hidden_size": 128, "intermediate_size": 192})).to(dtype)
        run = Run(quaff_fx.compile(model, {"progress": False, "calibration_steps": 1}))
        for _ in range(2):
            run.step(token_ids(1, 19))
        self.graph = quaff_fx.graphs(run.model)[-1]
        self.args = next(args for graph, args in reversed(self.calls) if graph is self.graph.graph_module)


def results(lowered: list[GraphModule], args: Sequence[Any]) -> list[Tensor]:
    """What forward returns, and the gradients that backward makes of it for a gradient of ones."""
    forward, backward = lowered
    count = sum(node.op == "placeholder" for node in backward.graph.nodes)
    tangents = sum(node.name.startswith("tangents") for node in backward.graph.nodes)
    with torch.no_grad():
        made = list(forward(*args))
        outputs, saved = made[: len(made) - count + tangents], made[len(made) - count + tangents :]
        gradients = backward(*saved, *(torch.ones_like(output) for output in outputs[:tangents]))
    return [each.float() for each in (*outputs, *gradients) if isinstance(each, Tensor)]


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 50.0), (torch.bfloat16, 30.0), (torch.float16, 45.0)])
def test_a_step_gives_what_it_gives_on_a_cpu(dtype: torch.dtype, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(dtype, monkeypatch)
    graph = recorded.graph
    expected = results([r.graph_module for r in backend.lower(graph.graph_module, graph.fake_inputs)], recorded.args)
    with cards.as_on_card():
        lowered = [r.graph_module for r in backend.lower(graph.graph_module, graph.fake_inputs)]
    assert all("triton_kernel_wrapper" in str(graph_module.graph) for graph_module in lowered)
    interpreted.install(monkeypatch)
    found = results(lowered, recorded.args)
    assert len(found) == len(expected) > 7
    for index, (here, there) in enumerate(zip(found, expected, strict=True)):
        noise = (here - there).norm() / there.norm()
        assert -20 * torch.log10(noise) >= least, f"result {index}: {-20 * torch.log10(noise):.1f} dB"
