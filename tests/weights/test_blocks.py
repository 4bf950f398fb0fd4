"""A block whose forward runs through a compiled call: it looks like its own class, with an int8 weight and without."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from quaff_fx.errors import WeightError
from quaff_fx.weights import owners
from quaff_fx.weights.int8_weight import Int8Weight
from tests.data import normal
from tests.weights.layers import (
    frozen,
    quantize,
)


class Block(nn.Module):
    """A block; its forward calls `super` and `__class__`, as code may."""

    def __init__(self) -> None:
        super().__init__()
        self.up = frozen(nn.Linear(12, 8))
        self.weight = nn.Parameter(normal(12, 12, seed=3), requires_grad=False)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """Doc of forward."""
        return self.up(x @ self.weight) * factor * isinstance(self, __class__)  # type: ignore[name-defined]


def test_a_block_looks_like_its_own_class() -> None:
    block = Block()
    owners.set_block(block, True)
    cls = type(block)
    assert cls is not Block
    assert isinstance(block, Block)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == ("Block", Block.__qualname__, Block.__module__)
    assert cls.__doc__ == Block.__doc__
    assert block.forward.__doc__ == "Doc of forward."
    assert inspect.signature(block.forward) == inspect.signature(Block().forward)
    assert owners.base_class(block) is Block
    other = Block()
    owners.set_block(other, True)
    assert type(other) is cls, "one class, or no two blocks would share a graph"
    owners.set_block(block, True)
    assert type(block) is cls
    owners.set_block(block, False)
    assert type(block) is Block


def test_a_block_runs_its_forward_through_what_it_was_given() -> None:
    block, x = Block(), normal(3, 12, seed=1)
    expected = block(x, factor=2.0)
    owners.set_block(block, True)
    assert torch.equal(block(x, factor=2.0), expected), "on its own without"
    seen: list[object] = []

    def run(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        seen.append((module, args, kwargs))
        return module.quaff_forward(*args, **kwargs)  # type: ignore[operator,no-any-return]

    block.__dict__[owners.RUN] = run
    hooked: list[nn.Module] = []
    with block.register_forward_hook(lambda module, *_: hooked.append(module)):
        assert torch.equal(block(x, factor=2.0), expected)
    assert torch.equal(block.forward(x, factor=2.0), expected), "also where the forward is called"
    assert seen == [(block, (x,), {"factor": 2.0})] * 2
    assert hooked == [block]


def test_a_block_that_owns_an_int8_weight() -> None:
    block, x = Block(), normal(3, 12, seed=1)
    expected = block(x)
    quantize(block, in_dim=0)
    assert type(block).__name__ == "QuaffBlock"
    owners.set_block(block, True)
    assert type(block).__name__ == "Block"
    assert isinstance(block.weight, Int8Weight)
    assert (block(x) - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(WeightError):
        block.weight = torch.zeros(12, 12)
    owners.set_block(block, False)
    assert type(block).__name__ == "QuaffBlock"
    assert isinstance(block.weight, Int8Weight)
    owners.set_block(block, True)
    owners.restore([(block, "weight")])
    assert type(block).__name__ == "Block"
    assert isinstance(block.weight, nn.Parameter)
    assert owners.base_class(block) is Block
    owners.set_block(block, False)
    assert type(block) is Block
