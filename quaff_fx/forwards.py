"""The forwards of a model: which thread is in one, whose backward is still to come, and when weights may change."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_in_backward() -> bool:
    """Tells whether this thread is in a backward: activation checkpointing replays forwards there."""
    return _current_backward() != -1


class Awaited:
    """A forward whose backward has not run to its end. The graph of its outputs keeps it alive, and calls it.

    A backward that is interrupted was none: the forward may be backpropagated again, or thrown away.
    """

    def __init__(self, then: Callable[[], None]) -> None:
        self.then: Callable[[], None] | None = then
        self._backward = -1

    def __call__(self, _: Tensor) -> None:
        """Called in backward, once for each output that it goes through."""
        if self._backward != (backward := _current_backward()):
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        if self.then is not None:
            self.then()
            self.then = None

    def watch(self, result: Any) -> bool:
        """Makes the backward through any tensor of `result` call this; False if none has a backward."""
        outputs = [tensor for tensor in _tensors_in(result) if tensor.requires_grad and tensor.grad_fn is not None]
        for tensor in outputs:
            tensor.register_hook(self)  # type: ignore[no-untyped-call]
        return bool(outputs)


class Forwards:
    """What runs of a model at this moment, in all threads.

    Attributes:
        trainer: the thread whose forward had a backward, the last one; None before the first.
    """

    def __init__(self) -> None:
        self.trainer: int | None = None
        self._awaited: list[weakref.ref[Awaited]] = []
        self._here = _Here()
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}
        self._alone: int | None = None

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in a forward."""
        return self._here.forward is not None and self._here.forward() is not None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While this thread runs a forward; waits for a thread that changes the weights."""
        here, forward = threading.get_ident(), _Forward()
        with self._changed:
            self._changed.wait_for(lambda: self._alone in (None, here))
            self._inside[here] = self._inside.get(here, 0) + 1
        try:
            self._here.forward = weakref.ref(forward)
            yield
        finally:
            self._here.forward = None
            with self._changed:
                self._inside[here] -= 1
                if not self._inside[here]:
                    del self._inside[here]
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this thread changes the weights; waits for the forwards of the others."""
        here = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._alone in (None, here))
            before, self._alone = self._alone, here
            try:
                self._changed.wait_for(lambda: not self._inside.keys() - {here})
            except BaseException:
                self._alone = before
                raise
        try:
            yield
        finally:
            with self._changed:
                self._alone = before
                self._changed.notify_all()

    def await_backward(self, result: Any, then: Callable[[], None]) -> Awaited | None:
        """Calls `then` when a backward of `result` has run to its end; None if there can be none."""
        awaited = Awaited(then)
        if not awaited.watch(result):
            return None
        self.trainer = threading.get_ident()
        self._awaited = [reference for reference in self._awaited if _is_awaited(reference)]
        self._awaited.append(weakref.ref(awaited))
        return awaited

    @property
    def awaited(self) -> int:
        """How many forwards may still be backpropagated: the graph of their outputs is alive."""
        return sum(map(_is_awaited, self._awaited))

    @property
    def loose(self) -> Any:
        """What this thread keeps of a forward that consists of calls of blocks alone."""
        return self._here.loose

    @loose.setter
    def loose(self, value: Any) -> None:
        self._here.loose = value


class _Forward:
    """Alive while a forward runs, also if what should end it was interrupted."""


class _Here(threading.local):
    forward: weakref.ref[_Forward] | None = None
    loose: Any = None


def _current_backward() -> int:
    """The number of the backward that this thread is in, -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def _is_awaited(reference: weakref.ref[Awaited]) -> bool:
    awaited = reference()
    return awaited is not None and awaited.then is not None


def _tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yields the tensors in an output of a model: in mappings, sequences and objects with fields."""
    if isinstance(value, Tensor):
        yield value
    elif depth < 8:
        inner: Any = ()
        if isinstance(value, Mapping):
            inner = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = value
        elif dataclasses.is_dataclass(value) or (
            hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type))
        ):
            inner = vars(value).values()
        for item in inner:
            yield from _tensors_in(item, depth + 1)
