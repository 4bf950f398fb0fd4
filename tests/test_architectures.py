"""Every way of multiplying by a frozen weight, and models that are no Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import quaff_fx
from quaff_fx.api import stages_of
from quaff_fx.weights import owners
from tests.architectures import ARCHITECTURES, Batch
from tests.models import cosine

pytestmark = [pytest.mark.compile, pytest.mark.slow]

QUIET = {"progress": False, "calibration_steps": 1}

LEAST = {8: 0.98, 7: 0.95}
"""Least cosine similarity of a parameter's gradient with float's, median over parameters, by activation bits."""


@dataclass
class Step:
    loss: float
    gradients: dict[str, Tensor]


def step(model: nn.Module, batch: Batch) -> Step:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return Step(loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@dataclass
class Outcome:
    """What one architecture did: its float step, its calibrating step, its first quantized step at 8 and 7 bits."""

    model: nn.Module
    reference: Step
    calibrating: Step
    quantized: dict[int, Step]

    def cosines(self, bits: int) -> dict[str, float]:
        """Per parameter whose gradient is not zero in float."""
        got, expected = self.quantized[bits].gradients, self.reference.gradients
        return {
            name: torch.cosine_similarity(got[name].flatten(), gradient.flatten(), dim=0).item()
            for name, gradient in expected.items()
            if gradient.abs().max() > 0
        }


@pytest.fixture(scope="module")
def outcome_of() -> Callable[[str], Outcome]:
    done: dict[str, Outcome] = {}

    def run(name: str) -> Outcome:
        if name not in done:
            torch._dynamo.pgo.reset_code_state()
            architecture = ARCHITECTURES[name]
            batch = architecture.batch()
            model = quaff_fx.compile(architecture.model(), QUIET | {"activation_bits": 8})
            reference = step(architecture.model(), batch)
            calibrating, compiled = step(model, batch), step(model, batch)
            quantized = {8: compiled, 7: eager_step_at_seven_bits(architecture.model(), batch)}
            done[name] = Outcome(model, reference, calibrating, quantized)
        return done[name]

    return run


def eager_step_at_seven_bits(model: nn.Module, batch: Batch) -> Step:
    """The numbers of the compiled step, without the minutes that Inductor takes."""
    quaff_fx.compile(model, QUIET | {"activation_bits": 7})
    quaff_fx.calibrate(model, [batch])
    for block in stages_of(model).blocks:
        del block.__dict__[owners.RUN]
    return step(model, batch)


@pytest.mark.parametrize("name", ARCHITECTURES)
class TestArchitecture:
    @pytest.mark.compatibility("Models")
    def test_gradients_follow_float(self, outcome_of, name, record_property):
        outcome = outcome_of(name)
        explanation = quaff_fx.explain(outcome.model)
        frozen = sum(row.flops for row in explanation.rows if row.reason != "weight is trainable")
        int8 = sum(row.flops for row in explanation.rows if row.stage == "int8")
        record_property("int8 share", f"{explanation.int8_share:.0%}")
        record_property("of what is frozen", f"{int8 / frozen:.0%}")
        left_alone = {why: share for why, share in explanation.left_alone.items() if why != "weight is trainable"}
        record_property("left in float", "; ".join(f"{share:.0%} {why}" for why, share in left_alone.items()))
        for bits, least in LEAST.items():
            assert outcome.quantized[bits].gradients.keys() == outcome.reference.gradients.keys()
            for parameter, gradient in outcome.reference.gradients.items():
                if gradient.abs().max() > 0:
                    assert outcome.quantized[bits].gradients[parameter].abs().max() > 0, f"{bits} bits: {parameter}"
            similarity = torch.tensor(list(outcome.cosines(bits).values())).median().item()
            record_property(f"gradient cosine, {bits} bits", f"{similarity:.3f}")
            assert similarity > least, bits

    def test_what_is_int8(self, outcome_of, name):
        architecture, explanation = ARCHITECTURES[name], quaff_fx.explain(outcome_of(name).model)
        assert explanation.int8_share == pytest.approx(architecture.int8_share, abs=1e-3)
        assert explanation.left_alone.keys() - {"weight is trainable"} == architecture.left_alone
        assert explanation.int8_share + sum(explanation.left_alone.values()) == pytest.approx(1)
        for reason, share in explanation.left_alone.items():
            assert f"{reason} ({share:.1%} of multiply-adds)" in str(explanation)

    def test_training_goes_on(self, outcome_of, name):
        outcome, batch = outcome_of(name), ARCHITECTURES[name].batch()
        assert outcome.calibrating.loss == pytest.approx(outcome.reference.loss, rel=1e-6)
        assert outcome.quantized[8].loss == pytest.approx(outcome.reference.loss, rel=5e-3)
        assert outcome.quantized[8].loss != outcome.reference.loss
        model = outcome.model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(4):
                losses.append(step(model, batch).loss)
                optimizer.step()
        assert losses[-1] < losses[0]


def test_one_training_graph_serves_all_blocks_of_a_class(outcome_of):
    # Encoder and decoder blocks are two classes; of each the first block of T5 has a position bias of its own.
    for name, graphs in {"Llama": 1, "GPT-2 (Conv1D)": 1, "T5": 4, "Whisper": 2}.items():
        assert len(quaff_fx.graphs(outcome_of(name).model)) == graphs, name


def test_products_of_a_shared_linear_and_of_conv1d(outcome_of):
    for name, products in {"a linear called twice": 2, "GPT-2 (Conv1D)": 4}.items():
        graph = quaff_fx.graphs(outcome_of(name).model)[-1]
        assert graph.rewritten.count("torch.ops.quaff.linear.default(") == products, name


class Products(nn.Module):
    """One block that multiplies by frozen weights in every form that is a linear, and by some that is not."""

    def __init__(self, size: int) -> None:
        super().__init__()
        scale = size**-0.5
        for name in ("by_linear", "by_transpose", "by_matmul", "by_addmm", "left_operand", "both_ways"):
            self.register_parameter(name, nn.Parameter(torch.randn(size, size) * scale, requires_grad=False))
        self.inner = nn.Linear(size, size).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x):
        x = functional.linear(x, self.by_linear) * self.gain
        x = torch.tanh(x @ self.by_transpose.T)
        x = torch.tanh(x @ self.by_matmul)
        x = torch.addmm(self.gain, x, self.by_addmm)
        x = torch.tanh(self.left_operand @ x.t()).t()
        x = x @ self.both_ways + functional.linear(x, self.both_ways)
        return x + self.inner(x)


def trained(model: nn.Module, x: torch.Tensor, steps: int = 2) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        model.zero_grad()
        model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_every_form_of_a_linear(scope):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Products(48), Products(48))

    x = torch.randn(20, 48)
    expected = trained(build(), x)
    model = quaff_fx.compile(build(), QUIET | {"scope": scope})
    got = trained(model, x)
    assert cosine(got, expected) > 0.995
    rows = {row.name: row for row in quaff_fx.explain(model).rows}
    stages = {row.weight: (row.stage, row.reason) for row in quaff_fx.explain(model).rows if row.name.startswith("0")}
    assert rows["0.inner"].stage == "int8"
    for name in ("by_linear", "by_transpose", "by_matmul", "by_addmm"):
        assert stages[f"0.{name}"] == ("int8", "")
    for name in ("left_operand", "both_ways"):
        assert stages[f"0.{name}"] == ("float", "not only linears over one dimension read it")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40).requires_grad_(False), nn.Linear(40, 40)).to(dtype)
    x = torch.randn(12, 40, dtype=dtype)
    expected = trained(model, x, steps=1)
    quaff_fx.compile(model, QUIET)
    got = trained(model, x)
    assert all(gradient.dtype == dtype for gradient in got.values())
    assert cosine(got, expected) > 0.999


def test_trainable_bias_of_a_frozen_weight_gets_its_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 8))
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)
    x = torch.randn(12, 40)
    expected = trained(model, x, steps=1)
    quaff_fx.compile(model, QUIET)
    got = trained(model, x)
    assert expected.keys() == got.keys() == {"0.bias", "2.bias"}
    assert cosine(got, expected) > 0.999
