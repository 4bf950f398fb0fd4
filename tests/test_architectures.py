"""Every way of multiplying by a frozen weight, and models that are no Llama."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

import quaff_fx
from tests.models import VOCABULARY, Run, cosine, token_ids, with_lora

pytestmark = pytest.mark.compile

QUIET = {"progress": False, "calibration_steps": 1}


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


def test_gpt2_conv1d():
    def build() -> nn.Module:
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=48,
            n_layer=2,
            n_head=4,
            vocab_size=VOCABULARY,
            n_positions=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
        return with_lora(
            GPT2LMHeadModel(config), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
        ).train()

    reference = Run(build())
    reference.step(token_ids())
    run = Run(quaff_fx.compile(build(), QUIET))
    run.step(token_ids())
    run.step(token_ids())
    assert cosine(run.gradients[1], reference.gradients[0]) > 0.999
    explanation = quaff_fx.explain(run.model)
    assert sum(row.stage == "int8" for row in explanation.rows) == 2 * 4
    assert explanation.rows[0].shape == (48, 144)
    graph = quaff_fx.graphs(run.model)[-1]
    assert graph.rewritten.count("torch.ops.quaff.linear.default(") == 4


def test_model_without_blocks_is_compiled_whole():
    model = nn.Sequential(nn.Linear(40, 56), nn.ReLU(), nn.Linear(56, 8)).requires_grad_(False)
    model.append(nn.Linear(8, 8))
    quaff_fx.compile(model, QUIET)
    trained(model, torch.randn(12, 40))
    assert [row.stage for row in quaff_fx.explain(model).rows] == ["int8", "int8", "float"]


def test_inputs_of_two_three_and_four_dimensions():
    torch.manual_seed(0)
    for shape in ((6, 40), (2, 3, 40), (2, 1, 3, 40)):
        model = nn.Sequential(nn.Linear(40, 40).requires_grad_(False), nn.Linear(40, 40))
        quaff_fx.compile(model, QUIET)
        x = torch.randn(*shape)
        expected = model(x)
        result = model(x)
        assert result.shape == shape
        assert torch.nn.functional.mse_loss(result, expected) < 1e-4


def test_a_linear_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(40, 40).requires_grad_(False)
            self.gain = nn.Parameter(torch.ones(40))

        def forward(self, x):
            return self.shared(torch.tanh(self.shared(x) * self.gain))

    torch.manual_seed(0)
    model = Twice()
    x = torch.randn(10, 40)
    expected = trained(model, x)
    quaff_fx.compile(model, QUIET)
    assert cosine(trained(model, x), expected) > 0.999
    assert quaff_fx.graphs(model)[-1].rewritten.count("torch.ops.quaff.linear.default(") == 2


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
