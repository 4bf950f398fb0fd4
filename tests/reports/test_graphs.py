"""`graphs`: none while a model calibrates, then those it has traced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quaff_fx
from quaff_fx.errors import ConfigError
from tests.blocks import compiled, step
from tests.models import int8_products


def calls(text: str, op: str) -> list[str]:
    """The lines of a graph that call an op; the comments quote the model's own code."""
    return [line for line in text.splitlines() if "#" not in line and f"torch.ops.quaff.{op}.default(" in line]


def test_a_plain_model_has_none_to_show() -> None:
    with pytest.raises(ConfigError, match="was not compiled by quaff_fx"):
        quaff_fx.graphs(nn.Linear(4, 4))


def test_none_while_it_calibrates() -> None:
    model = compiled()
    step(model)
    assert quaff_fx.graphs(model) == ()


@pytest.mark.compile
@pytest.mark.slow
def test_each_is_shown_as_captured_rewritten_and_lowered() -> None:
    model = compiled(calibration_steps=1)
    for seed in range(3):
        step(model, seed)
    found = quaff_fx.graphs(model)
    assert isinstance(found, tuple)
    assert len(found) == 2, "of the first block, whose input needs no gradient, and of the other"
    for graph in found:
        assert len(calls(graph.captured, "dequantize_weight")) == 2
        assert len(calls(graph.rewritten, "linear")) == 2
        assert calls(graph.rewritten, "dequantize_weight") == []
        assert graph.captured in str(graph)
        assert graph.rewritten in str(graph)
    assert [int8_products(graph.lowered) for graph in found] == [[2, 1], [2, 2]]
    torch._dynamo.reset()
    step(model)
    assert quaff_fx.graphs(model)[:2] == found, "the oldest first"
