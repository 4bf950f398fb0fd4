"""Which backward belongs to which forward, and who waits for whom while weights change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quaff_fx.api import stages_of
from quaff_fx.forwards import Forwards, is_in_backward
from tests.blocks import EAGERLY, batch, compiled, step

pytestmark = EAGERLY


def weight() -> Tensor:
    return torch.ones(3, requires_grad=True)


@dataclass
class Output:
    hidden: Tensor
    text: str = ""


def test_outputs_may_lie_in_any_structure() -> None:
    for wrap in (lambda y: (None, [y]), lambda y: {"loss": y}, lambda y: Output(y), lambda y: {"a": (Output(y), 3)}):
        model = compiled()
        body = model.forward
        model.forward = lambda x, body=body, wrap=wrap: wrap(body(x))
        output = model(batch())
        while not isinstance(output, Tensor):
            parts = vars(output) if isinstance(output, Output) else output
            parts = parts.values() if isinstance(parts, dict) else parts
            output = next(part for part in parts if isinstance(part, (Tensor, tuple, list, dict, Output)))
        output.sum().backward()
        assert stages_of(model).steps == 1


def test_an_interrupted_backward_counts_nothing() -> None:
    model = compiled()

    class Stopped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            raise KeyboardInterrupt

    x = Stopped.apply(batch().requires_grad_())
    with pytest.raises(KeyboardInterrupt):
        model(x).square().mean().backward()
    assert stages_of(model).steps == 0
    step(model)
    assert stages_of(model).steps == 1


def test_a_backward_that_runs_twice_is_one_step() -> None:
    model = compiled()
    output = model(batch())
    output.mean().backward(retain_graph=True)
    output.square().mean().backward()
    assert stages_of(model).steps == 1


def test_what_has_no_backward_is_not_awaited() -> None:
    forwards, called = Forwards(), []
    with torch.no_grad():
        assert forwards.await_backward((weight() * 2).sum(), lambda: called.append(1)) is None
    assert forwards.await_backward(weight(), lambda: called.append(1)) is None, "a leaf: nothing was computed"
    assert forwards.await_backward("no tensor", lambda: called.append(1)) is None
    assert (forwards.awaited, forwards.trainer, called) == (0, None, [])


def test_a_backward_is_heard_when_all_of_it_has_run() -> None:
    forwards, leaf, seen = Forwards(), weight(), []
    loss = (leaf * 2).sum()
    forwards.await_backward({"loss": loss}, lambda: seen.append((leaf.grad is not None, is_in_backward())))
    assert (forwards.awaited, forwards.trainer) == (1, threading.get_ident())
    loss.backward()
    assert seen == [(True, True)]
    assert not is_in_backward()
    assert forwards.awaited == 0


def test_a_graph_that_is_let_go_is_awaited_no_more() -> None:
    forwards = Forwards()
    first, second = ((weight() * 2).sum() for _ in range(2))
    forwards.await_backward(first, lambda: None)
    forwards.await_backward(second, lambda: None)
    assert forwards.awaited == 2
    del first
    assert forwards.awaited == 1


def test_a_thread_is_inside_while_it_runs_a_forward_alone() -> None:
    forwards = Forwards()

    def interrupted() -> None:
        with forwards.entered():
            assert forwards.is_inside
            assert in_thread(lambda: forwards.is_inside) is False
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not forwards.is_inside


def test_what_a_thread_keeps_is_its_own() -> None:
    forwards = Forwards()
    forwards.loose = "mine"
    assert in_thread(lambda: forwards.loose) is None
    assert forwards.loose == "mine"


def in_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(60)


def test_weights_change_when_the_forwards_of_others_have_ended_and_these_wait_meanwhile() -> None:
    forwards, order = Forwards(), []
    is_inside, may_end, is_changing, may_stop = (threading.Event() for _ in range(4))

    def evaluate() -> None:
        with forwards.entered():
            is_inside.set()
            assert may_end.wait(60)
            order.append("forward ended")

    def change() -> None:
        with forwards.alone():
            order.append("changing")
            is_changing.set()
            assert may_stop.wait(60)
            order.append("changed")

    def evaluate_again() -> None:
        with forwards.entered():
            order.append("forward")

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(evaluate)]
        assert is_inside.wait(60)
        running.append(pool.submit(change))
        assert not is_changing.wait(0.1)
        may_end.set()
        assert is_changing.wait(60)
        running.append(pool.submit(evaluate_again))
        assert wait(running[2:], 0.1).not_done
        may_stop.set()
        for each in running:
            each.result(60)
    assert order == ["forward ended", "changing", "changed", "forward"]


def test_the_thread_that_changes_weights_may_run_forwards_and_change_more() -> None:
    forwards = Forwards()
    with forwards.entered(), forwards.alone(), forwards.alone(), forwards.entered():
        pass
    assert in_thread(lambda: forwards.entered().__enter__()) is None, "all is given back"
