"""The Dynamo backend: what it records, a second backward, loops that Dynamo unrolls, and running without Inductor."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quaff_fx
from quaff_fx import backend
from quaff_fx.errors import QuaffWarning
from quaff_fx.kernels import cpu, dispatch
from tests.models import Run, cosine, tiny_llama, token_ids

CONFIG = {"calibration_steps": 1, "progress": False}

pytestmark = [pytest.mark.compile, pytest.mark.slow]


def converted(model: nn.Module) -> Run:
    """Calibrated and made int8; nothing is compiled yet."""
    quaff_fx.calibrate(quaff_fx.compile(model, CONFIG), [{"input_ids": token_ids()}])
    return Run(model.train())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- two backwards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first_step", [True, False])
@pytest.mark.parametrize("in_thread", [True, False])
def test_two_losses_of_one_forward_have_a_backward_each(is_first_step: bool, in_thread: bool) -> None:
    """The saved activations were given to backward to write into: a donated-buffer error."""
    run, ids = converted(tiny_llama()), token_ids()
    if not is_first_step:
        run.step(ids)
    run.model.zero_grad()
    output = run.model(input_ids=ids, labels=ids)

    def backward() -> None:
        output.loss.backward(retain_graph=True)
        output.logits.square().mean().backward()

    if in_thread:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    else:
        backward()
    separate = gradients(run.model)
    run.model.zero_grad()
    output = run.model(input_ids=ids, labels=ids)
    (output.loss + output.logits.square().mean()).backward()
    assert cosine(separate, gradients(run.model)) > 0.999  # each backward rounds its own gradient


def test_the_same_backward_twice_gives_the_same_gradients_twice() -> None:
    run, ids = converted(tiny_llama()), token_ids()
    loss = run.model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    once = gradients(run.model)
    loss.backward()
    for name, gradient in gradients(run.model).items():
        assert torch.equal(gradient, 2 * once[name]), name


# --- what is recorded ------------------------------------------------------------------------------------------------


def test_an_interrupted_compilation_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    run, ids = converted(tiny_llama()), token_ids()
    real = backend._compile

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "_compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.step(ids)
    assert quaff_fx.graphs(run.model) == ()
    monkeypatch.setattr(backend, "_compile", real)
    loss = run.step(ids)
    assert len(quaff_fx.graphs(run.model)) > 0
    assert loss == converted(tiny_llama()).step(ids)


def test_an_error_about_the_graph_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    run = converted(tiny_llama())

    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug in a lowering")

    monkeypatch.setattr(backend, "_compile", broken)
    with pytest.raises(Exception, match="a bug in a lowering"):
        run.step(token_ids())


# --- without Inductor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", ["split", "momentum"])
def test_without_inductor_the_steps_are_the_same_but_for_rounding(
    monkeypatch: pytest.MonkeyPatch, smoothing: str
) -> None:
    ids = token_ids()
    runs = []
    for is_compiled in (True, False):
        if not is_compiled:
            monkeypatch.setattr(cpu, "obstacle", lambda: cpu.Obstacle("a test", "None."))
        dispatch.warn_of.cache_clear()
        model = tiny_llama()
        quaff_fx.compile(model, {**CONFIG, "smoothing": smoothing})
        quaff_fx.calibrate(model, [{"input_ids": ids}])
        run = Run(model.train())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                run.step(ids)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                run.losses.append(model.eval()(input_ids=ids, labels=ids).loss.item())
        told = [str(warning.message) for warning in caught if issubclass(warning.category, QuaffWarning)]
        assert len(told) == (0 if is_compiled else 1)
        runs.append(run)
    compiled, plain = runs
    assert plain.losses[:3] == pytest.approx(compiled.losses[:3], rel=1e-4)
    assert plain.losses[3] == pytest.approx(compiled.losses[3], rel=1e-2)
    for left, right in zip(plain.gradients, compiled.gradients, strict=True):
        assert cosine(left, right) > 0.999


# --- loops in Python -------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32).requires_grad_(False)
        self.bias = nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.inner(h) + x + self.bias)


class Recurrent(nn.Module):
    """A cell in a loop over time: one graph for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.ModuleDict({"only": Cell()})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = self.cell["only"](x[:, t], h)
        return h.square().mean()


def test_unrolled_loops_are_told_of_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new length compiled for tens of seconds, without a word."""
    compiled = []
    real = backend._compile
    monkeypatch.setattr(backend, "_compile", lambda *args: (compiled.append(1), real(*args))[1])
    torch.manual_seed(0)
    model = quaff_fx.compile(Recurrent(), {**CONFIG, "scope": "model"})
    inputs = {length: torch.randn(3, length, 32) for length in range(4, 10)}
    quaff_fx.calibrate(model, [inputs[4]])
    told: dict[int, list[str]] = {}
    for length in (4, 4, 5, 6, 7, 8, 9, 4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = model(inputs[length])
            loss.backward()
        assert torch.isfinite(loss)
        told.setdefault(length, []).extend(str(w.message) for w in caught if issubclass(w.category, QuaffWarning))
    assert [length for length, texts in told.items() if texts] == [5]
    (text,) = told[5]
    assert text.startswith("model: a loop in Python around frozen linears was unrolled to 5 rounds and, before, to 4")
    assert (
        "from the 5th on runs uncompiled: right, in int8, but slower. Put what the loop calls into an nn.Modul" in text
    )
    assert len(compiled) == backend.COMPILED_LOOPS
    assert [backend.loop_length(graph) for graph in quaff_fx.api.stages_of(model).graphs] == [4, 5, 6, 7, 8, 9]


def test_a_few_uses_of_one_weight_are_no_loop() -> None:
    def graph(*sites: str) -> backend.Graph:
        changes = tuple(backend.Change(site, "quantized") for site in sites)
        return backend.Graph((backend.Stage("a pass", "", changes),), None, ())  # type: ignore[arg-type]

    assert backend.loop_length(graph("w", "w", "w")) == 0
    assert backend.loop_length(graph("w", "w", "w", "w", *(f"w{i}" for i in range(9)))) == 4
