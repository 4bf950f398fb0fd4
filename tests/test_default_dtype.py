"""What a process has set as default dtype and device changes nothing of an int8 model, whenever it is set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import quaff_fx
from tests.models import Run, float_llama, tiny_llama, token_ids, with_lora

CONFIG = {"calibration_steps": 1, "outlier_budget": 0.05, "progress": False}
DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As scripts set it that build a model in another dtype and leave it so."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every tensor of the int8 state: weights, scales, outlier columns and channels."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: tensor.detach().clone() for name, tensor in found.items() if ".quaff_" in name}
    assert any(name.endswith(".w_scale") for name in state)
    return state


@pytest.fixture(scope="module")
def as_usual() -> tuple[Run, dict[str, Tensor]]:
    return trained(contextlib.nullcontext, contextlib.nullcontext)


def trained(
    calibrating: Callable[[], contextlib.AbstractContextManager[None]],
    training: Callable[[], contextlib.AbstractContextManager[None]],
) -> tuple[Run, dict[str, Tensor]]:
    """A calibration step and the conversion in one surrounding, int8 steps and an evaluation in another."""
    run = Run(tiny_llama(blocks=2))
    ids = token_ids()
    with calibrating():
        quaff_fx.compile(run.model, CONFIG)
        quaff_fx.calibrate(run.model, [{"input_ids": ids}])
    with training():
        run.step(ids)
        run.step(ids)
        with torch.no_grad():
            run.losses.append(run.model(input_ids=ids, labels=ids).loss.item())
    return run, tensors(run.model)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("when", ["calibrating", "training", "always"])
def test_the_default_dtype_changes_nothing(
    as_usual: tuple[Run, dict[str, Tensor]], dtype: torch.dtype, when: str
) -> None:
    """In bfloat16 conversion raised; set after it, the process aborted in the kernel."""

    def on() -> contextlib.AbstractContextManager[None]:
        return default_dtype(dtype)

    off = contextlib.nullcontext
    run, state = trained(off if when == "training" else on, off if when == "calibrating" else on)
    wanted, wanted_state = as_usual
    assert state.keys() == wanted_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == wanted_state[name].dtype, name
        torch.testing.assert_close(tensor, wanted_state[name], rtol=0, atol=0, equal_nan=True)
    # transformers' own code makes masks and rotary tables in the default dtype.
    assert run.losses == pytest.approx(wanted.losses, rel=1e-2)
    for name, gradient in run.gradients[-1].items():
        assert gradient.dtype == wanted.gradients[-1][name].dtype


@pytest.mark.compile
@pytest.mark.slow
def test_a_default_device_without_memory_changes_nothing(as_usual: tuple[Run, dict[str, Tensor]]) -> None:
    """Between a meta device that was set to build a model and the steps of another."""
    run = Run(tiny_llama(blocks=2))
    batch = [{"input_ids": token_ids()}]
    with default_device("meta"):
        quaff_fx.compile(run.model, CONFIG)
    quaff_fx.calibrate(run.model, batch)
    for name, tensor in tensors(run.model).items():
        torch.testing.assert_close(tensor, as_usual[1][name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_loaded_as_int8_are_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    """Their scales were kept in the default dtype."""
    float_llama().save_pretrained(tmp_path)
    from transformers import LlamaForCausalLM

    def scales() -> dict[str, Tensor]:
        model = quaff_fx.from_pretrained(LlamaForCausalLM, tmp_path, dtype=torch.float32)
        return tensors(with_lora(model))

    wanted = scales()
    with default_dtype(dtype):
        got = scales()
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0, equal_nan=True)
