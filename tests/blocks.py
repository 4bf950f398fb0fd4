"""A model of two small blocks, and the steps that tests of what people do with a model take with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quaff_fx

QUIET = {"progress": False, "calibration_steps": 2}

UNTRACED = pytest.mark.filterwarnings("ignore:.* was not traced by torch.compile:quaff_fx.QuaffWarning")
"""The mark of tests that keep blocks from being traced."""

EAGERLY = [pytest.mark.usefixtures("eager"), UNTRACED]
"""The marks of tests whose int8 products need no Inductor."""


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size).requires_grad_(False)
        self.down = nn.Linear(2 * size, size).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(2 * size))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.down(torch.tanh(self.up(x) * self.gain)) * scale


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=1.0)
        return x


class Net(nn.Module):
    """A body and a trainable head, as a decoder with its head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Body()
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def batch(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, seed: int = 0) -> float:
    """One forward and backward; no update, so that every step can be compared."""
    model.zero_grad()
    loss = model(batch(seed)).square().mean()
    loss.backward()
    return float(loss.detach())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compiled(**config: object) -> Net:
    return quaff_fx.compile(Net(), QUIET | config)


def converted(**config: object) -> Net:
    return quaff_fx.calibrate(compiled(**config), [batch(0), batch(1)])
