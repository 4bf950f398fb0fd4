"""Ctrl-C before every line of the product, in all that changes a model: the next call has to go on as if nothing was.

Each program runs once undisturbed, then once for each line of the product that it runs (the first and the last time
that it does), interrupted there; what was interrupted is called again, as a person does in a notebook. The result has
to be that of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import quaff_fx
import quaff_fx.weights as weights
from quaff_fx import api, calls, convert, forwards, observe, sites, stages
from quaff_fx.files import saved_state, snapshot
from quaff_fx.stages import ATTRIBUTE
from quaff_fx.weights import owners
from tests.blocks import Block

FILES = {
    module.__file__
    for module in (
        *(api, calls, convert, forwards, observe, sites, stages),
        *(weights.float, weights.int8_weight, weights.loaded, weights.owners, weights.quantized, weights.state),
        *(saved_state, snapshot),
    )
}
CONFIG = {"calibration_steps": 2, "progress": False}


@dataclass
class Counts:
    """How many interrupts there were, after how many the result was wrong, and where."""

    cases: int = 0
    wrong: int = 0
    examples: list[str] = field(default_factory=list)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))
        self.shared = nn.ModuleList([Block(32), Block(32)])
        self.shared[1].up.weight = self.shared[0].up.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.shared):
            x = block(x)
        return x


def batch(number: int) -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(number))


def compiled() -> Net:
    return quaff_fx.compile(Net(), CONFIG)


def converted() -> Net:
    return quaff_fx.calibrate(compiled(), [batch(0), batch(1)])


Again = Callable[[Callable[[], Any]], Any]
"""Calls a function until it is not interrupted any more."""


def train(again: Again) -> nn.Module:
    """Calibration by steps, the conversion, a step in int8."""
    model = compiled()

    def step(number: int) -> None:
        model.zero_grad()
        model(batch(number)).square().mean().backward()

    for number in range(3):
        again(lambda number=number: step(number))
    return model


def train_by_blocks(again: Again) -> nn.Module:
    """The same by code that calls the blocks on their own."""
    model = compiled()

    def step(number: int) -> None:
        model.zero_grad()
        x = batch(number)
        for block in (*model.blocks, *model.shared):
            x = block(x)
        x.square().mean().backward()

    for number in range(3):
        again(lambda number=number: step(number))
    return model


def calibrate(again: Again) -> nn.Module:
    """`calibrate` on two batches."""
    model = compiled()
    again(lambda: quaff_fx.calibrate(model, [batch(0), batch(1)]))
    return model


def compile_(again: Again) -> nn.Module:
    """`compile` of a float model."""
    model = Net()
    again(lambda: quaff_fx.compile(model, CONFIG))
    return quaff_fx.calibrate(model, [batch(0)])


def dequantize(again: Again) -> nn.Module:
    """`dequantize` of an int8 model; a second call of one that is done says that nothing is compiled."""
    model = converted()

    def to_float() -> None:
        if any(ATTRIBUTE in module.__dict__ or owners.states_of(module) for module in model.modules()):
            quaff_fx.dequantize(model)

    again(to_float)
    return model


def save(again: Again) -> nn.Module:
    """`save_state` in both stages, and what the files hold on a new model."""
    with tempfile.TemporaryDirectory() as folder:
        model = compiled()
        again(lambda: quaff_fx.save_state(model, folder))
        quaff_fx.calibrate(model, [batch(0)])
        again(lambda: quaff_fx.save_state(model, folder))
        assert [path.name for path in Path(folder).iterdir()] == [snapshot.FILE]
        other = compiled()
        quaff_fx.load_state(other, folder)
    return other


def load(again: Again) -> nn.Module:
    """`load_state` of a converted state into a new model, and then into the same one."""
    saved = quaff_fx.state_dict(converted())
    model = compiled()
    again(lambda: quaff_fx.load_state_dict(model, saved))
    again(lambda: quaff_fx.load_state_dict(model, saved))
    return model


def load_statistics(again: Again) -> nn.Module:
    """`load_state` of a state that was saved while the model was calibrating."""
    first = compiled()
    first(batch(0)).square().mean().backward()
    saved = quaff_fx.state_dict(first)
    model = compiled()
    again(lambda: quaff_fx.load_state_dict(model, saved))
    model(batch(1)).square().mean().backward()
    with torch.no_grad():
        model(batch(2))
    return model


PROGRAMS = (train, train_by_blocks, calibrate, compile_, dequantize, save, load, load_statistics)


def outcome(program: Callable[[Again], nn.Module], again: Again) -> dict[str, Any]:
    """What a program leaves: tensors, gradients, classes, the choice for each weight and how often it was seen."""
    # Eagerly, since compiling each time would take minutes; what is interrupted is not Inductor's.
    with torch.compiler.set_stance("force_eager"):
        model = program(again)
    found: dict[str, Any] = dict(model.state_dict())
    found |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"{name} class": type(module).__name__ for name, module in model.named_modules()}
    found["ties"], found["mode"] = len(list(model.parameters())), model.training
    if any(ATTRIBUTE in module.__dict__ for module in model.modules()):
        found["explained"] = str(quaff_fx.explain(model))
        found["steps"] = quaff_fx.explain(model).steps
    found["output"] = model(batch(9)).detach() if not any(map(owners.states_of, model.modules())) else None
    return found


def is_equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[key]) if isinstance(value, Tensor) else value == right[key]
        for key, value in left.items()
    )


class Lines:
    """Counts the lines of the product that run, and raises before the one that is numbered so."""

    def __init__(self, raise_at: int | None = None) -> None:
        self.raise_at = raise_at
        self.seen: dict[tuple[str, int], list[int]] = {}
        self.count = 0
        self.where = ""
        self._left: set[tuple[int, int]] = set()  # `with` lines that a frame has been at

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        path, line = frame.f_code.co_filename, frame.f_lineno
        if path not in FILES:
            return None
        if event != "line" or self._leaves_with(frame):
            return self
        self.seen.setdefault((path, line), []).append(self.count)
        self.count += 1
        if self.count - 1 == self.raise_at:
            self.where = f"{Path(path).name}:{line}"
            sys.settrace(None)
            raise KeyboardInterrupt
        return self

    def _leaves_with(self, frame: FrameType) -> bool:
        """A `with` block that ends comes back to its line. Python looks for no signal there, and an exception raised
        there would skip `__exit__` (its issue 29988).
        """
        key = (id(frame), frame.f_lineno)
        if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return False
        is_again = key in self._left
        self._left.symmetric_difference_update({key})
        return is_again

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def lines_of(program: Callable[[Again], nn.Module]) -> list[int]:
    """The numbers of the lines at which to interrupt: of each line of the product its first and its last time."""
    lines = Lines()

    def again(call: Callable[[], Any]) -> Any:
        with lines.on():
            return call()

    outcome(program, again)
    return sorted({number for numbers in lines.seen.values() for number in (numbers[0], numbers[-1])})


def interrupted(program: Callable[[Again], nn.Module], number: int) -> tuple[dict[str, Any], str]:
    """What a program leaves that is interrupted before the line of this number, and where that was."""
    lines = Lines(raise_at=number)

    def again(call: Callable[[], Any]) -> Any:
        if lines.where:
            return call()
        try:
            with lines.on():
                return call()
        except KeyboardInterrupt:
            return call()

    return outcome(program, again), lines.where


def run(programs: tuple[Callable[[Again], nn.Module], ...] = PROGRAMS, every: int = 1) -> Counts:
    """Interrupts each program at every line, or at each of `every` of them."""
    counts = Counts()
    for program in programs:
        expected = outcome(program, lambda call: call())
        for number in lines_of(program)[::every]:
            counts.cases += 1
            try:
                found, where = interrupted(program, number)
                what = "" if is_equal(found, expected) else "another result"
            except Exception as error:
                where, what = str(number), f"{type(error).__name__}: {error}"
            if what:
                counts.wrong += 1
                counts.examples.append(f"{program.__name__} at {where}: {what}"[:200])
    return counts


if __name__ == "__main__":
    print(run(every=int(sys.argv[1]) if len(sys.argv) > 1 else 1))
