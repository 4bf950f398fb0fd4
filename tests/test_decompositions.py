"""What Inductor gets on a CPU and, on fake tensors, on CUDA."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._inductor import decomposition as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quaff_fx import decompositions

TOKENS, IN, OUT, OUTLIERS = 24, 36, 52, 2  # in_features no multiple of 8: CUDA pads


def traced(device: str, op: str) -> str:
    """The code of one quaff op after its decompositions, traced on fake tensors of a device."""
    decompositions.register()
    # Inductor's own decompositions index tensors, which a CPU build of torch cannot do on fake CUDA tensors.
    table = {op: function for op, function in decompositions.decompositions.items() if op.namespace == "quaff"}
    with FakeTensorMode():

        def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        weight = (fake(OUT, IN, dtype=torch.int8), fake(OUT))
        arguments = {
            "rotated": (fake(TOKENS, IN), fake(OUTLIERS, dtype=torch.int64), fake(OUTLIERS), 127, 4),
            "quantize_activation": (fake(TOKENS, IN), fake(OUTLIERS, dtype=torch.int64), fake(OUTLIERS), 127, 1),
            "linear": (
                fake(2, TOKENS // 2, IN),
                fake(TOKENS, IN, dtype=torch.int8),
                fake(TOKENS),
                fake(TOKENS, OUTLIERS),
                *weight,
                fake(OUTLIERS, OUT),
                fake(OUT),
                127,
                1,
            ),
            "linear_grad_input": (fake(2, TOKENS // 2, OUT), *weight, 127, 1),
        }[op]
        function = getattr(torch.ops.quaff, "quantize_activation" if op == "rotated" else op).default
        graph = make_fx(lambda *tensors: function(*tensors, *arguments[-2:]), decomposition_table=table)(
            *arguments[:-2]
        )
    return graph.code


@pytest.mark.parametrize("op", ["linear", "linear_grad_input"])
def test_one_int8_product_per_direction_on_a_cpu(op):
    code = traced("cpu", op)
    assert code.count("torch.ops.quaff.int8_linear.default(") == 1
    assert "_int_mm" not in code
    assert "torch.ops.quaff.linear" not in code


@pytest.mark.parametrize("op", ["linear", "linear_grad_input"])
def test_one_int8_product_per_direction_on_cuda(op):
    code = traced("cuda", op)
    assert code.count("torch.ops.aten._int_mm.default(") == 1
    assert "quaff" not in code
    assert "constant_pad_nd" in code


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quantizing_an_activation_is_pointwise_aten(device):
    code = traced(device, "quantize_activation")
    assert "quaff" not in code
    assert "torch.int8" in code
    assert "mm" not in code


def test_a_rotated_activation_is_one_op_on_a_cpu_and_pointwise_aten_on_cuda():
    assert traced("cpu", "rotated").count("torch.ops.quaff.quantize_rows.default(") == 1
    code = traced("cuda", "rotated")
    assert "quaff" not in code
    assert "mm" not in code
    assert "torch.int8" in code


def test_the_cache_salt_changes_with_the_sources(monkeypatch, tmp_path):
    salt = decompositions.cache_salt()
    assert salt == decompositions.cache_salt()
    copied = shutil.copytree(decompositions.SOURCES, tmp_path / "copy", ignore=shutil.ignore_patterns("passes"))
    monkeypatch.setattr(decompositions, "SOURCES", copied)
    assert decompositions.cache_salt() == salt
    with (copied / "kernels" / "cpu" / "int8_tile.h").open("a") as header:
        header.write("// changed")
    assert decompositions.cache_salt() != salt


def test_what_was_compiled_before_does_not_hide_the_decompositions(monkeypatch) -> None:
    """Inductor copies its table when anything is compiled for the first time."""
    table = inductor.decompositions
    without = {op: decomposition for op, decomposition in table.items() if "quaff" not in str(op)}
    monkeypatch.setattr(inductor, "decompositions", without)
    inductor.fast_random_decomps.cache_clear()
    assert torch.ops.quaff.linear.default not in inductor.select_decomp_table()
    monkeypatch.undo()
    decompositions.register()
    assert torch.ops.quaff.linear.default in inductor.select_decomp_table()
