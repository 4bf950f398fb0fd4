"""What counts as a training step, and what may change between two of them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import quaff_fx
from quaff_fx.api import stages_of
from quaff_fx.errors import CalibrationError
from tests.blocks import EAGERLY, QUIET, Net, batch, compiled, converted, gradients, step
from tests.models import Run, cosine, tiny_llama, token_ids

pytestmark = EAGERLY


def by_blocks(model: Net, x: Tensor) -> Tensor:
    for block in model.body.blocks:
        x = block(x)
    return model.head(x)


WAYS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "the model": lambda model, x: model(x),
    "its forward": lambda model, x: model.forward(x),
    "the body inside it": lambda model, x: model.head(model.body(x)),
    "the body's forward": lambda model, x: model.head(model.body.forward(x)),
    "the blocks": by_blocks,
    "a part of its loss at a time": lambda model, x: sum(model.head(h) for h in model.body(x).unbind(1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_step_counts_however_the_blocks_are_reached_and_in_any_mode(way, training) -> None:
    model, reference = compiled().train(training), compiled()
    for seed in range(4):
        model.zero_grad()
        WAYS[way](model, batch(seed)).square().mean().backward()
        assert stages_of(model).steps == min(seed + 1, 2)
        step(reference, seed)
    assert stages_of(model).stage == "quantize"
    channels = [[row.outlier_channels for row in quaff_fx.explain(m).rows] for m in (model, reference)]
    assert channels[0] == channels[1]


def test_a_forward_without_a_backward_does_not_count() -> None:
    model = compiled()
    for seed in range(4):
        model(batch(seed))
        with torch.no_grad():
            model(batch(seed))
        with torch.inference_mode():
            model(batch(seed))
    assert stages_of(model).steps == 0
    step(model)
    assert stages_of(model).steps == 1


def test_what_is_not_backpropagated_is_not_in_the_statistics() -> None:
    model, other = compiled(), compiled()
    for seed in range(2):
        with torch.no_grad():
            model(100 * batch(seed + 7))
        model(100 * batch(seed + 8))
        step(model, seed)
        step(other, seed)
    for name, seen in stages_of(model).calibration.statistics.items():
        assert torch.equal(seen.absmax_sum, stages_of(other).calibration.statistics[name].absmax_sum), name


def test_a_forward_without_gradients_belongs_to_the_step_that_converts() -> None:
    model = compiled(calibration_steps=1)
    step(model)
    assert stages_of(model).stage == "observe"
    with torch.no_grad():
        reference = model(batch())
    assert stages_of(model).stage == "quantize"
    assert torch.equal(model(batch()), reference)


def test_nothing_is_converted_while_a_backward_is_to_come() -> None:
    """A policy, then a reference without gradients, then the backward of the policy."""
    model = compiled(calibration_steps=1)
    step(model)
    del model._modules["head"]  # the head of a step is not that of the next
    model.head = nn.Linear(32, 4)
    stages = stages_of(model)
    stages.calibration = type(stages.calibration)()
    policy = model(batch())
    stages.calibration = type(stages.calibration)(1, {}, {})
    with torch.no_grad():
        reference = model(batch())
    assert stages.stage == "observe"
    assert torch.equal(policy, reference)
    policy.sum().backward()
    model(batch())
    assert stages.stage == "quantize"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning:torch.utils.checkpoint")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("smoothing", ["split", "momentum"])
@pytest.mark.parametrize("is_int8", [False, True], ids=["calibrating", "int8"])
def test_two_forwards_before_one_backward_under_checkpointing(use_reentrant, smoothing, is_int8) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.body.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return self.head(x)

    model = quaff_fx.compile(Checkpointed(), QUIET | {"smoothing": smoothing})
    if is_int8:
        quaff_fx.calibrate(model, [batch(0), batch(1)])
    twin = Checkpointed()
    for number in range(4):
        for each in (model, twin):
            each.zero_grad()
            first, second = (each(batch(seed).requires_grad_()).square().mean() for seed in (number, number + 9))
            torch.nn.functional.softplus(first - second).backward()
        assert cosine(gradients(model), gradients(twin)) > 0.99
    assert stages_of(model).stage == "quantize"


def test_pairs_commit_one_smoothing_scale_for_both() -> None:
    model = converted(smoothing="momentum")
    outliers = stages_of(model)._int8[0][1].outliers
    step(model)
    first = model(batch(1))
    scale = outliers.smoothing_scale.clone()
    second = model(3 * batch(2))
    assert torch.equal(outliers.smoothing_scale, scale)
    (first.sum() + second.sum()).backward()
    model(batch(1))
    assert not torch.equal(outliers.smoothing_scale, scale)


@pytest.mark.compile
@pytest.mark.slow
def test_training_says_nothing() -> None:
    model = compiled()
    with warnings.catch_warnings(), torch.compiler.set_stance("default"):
        warnings.simplefilter("error", quaff_fx.QuaffWarning)
        for seed in range(4):
            step(model, seed)
            with torch.no_grad():
                model(batch(seed))


def test_a_step_that_reads_no_weight_is_told_at_once() -> None:
    model = compiled()
    model.forward = lambda x: model.head(x)
    with pytest.raises(CalibrationError, match="read none of the frozen weights"):
        model(batch())


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_what_is_made_under_inference_mode_can_be_trained(context) -> None:
    model = Net()
    with context():
        quaff_fx.compile(model, QUIET | {"smoothing": "momentum"})
        quaff_fx.calibrate(model, [batch(0), batch(1)])
    expected = converted(smoothing="momentum")
    for seed in range(3):
        assert step(model, seed) == step(expected, seed)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


def test_a_conversion_under_inference_mode_can_be_trained() -> None:
    model = compiled(calibration_steps=1)
    step(model)
    with torch.inference_mode():
        model(batch())
    assert stages_of(model).stage == "quantize"
    step(model)


def test_an_evaluation_in_another_thread_is_not_observed_and_never_meets_half_a_model() -> None:
    model, alone = compiled(calibration_steps=6), compiled(calibration_steps=6)
    outputs: list[Tensor] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def evaluate() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    outputs.append(model.body(5 * batch(99)))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        for seed in range(9):
            step(model, seed)
            step(alone, seed)
    finally:
        stop.set()
        thread.join()
    assert not errors
    with torch.no_grad():
        in_int8 = alone.body(5 * batch(99))
        in_float = Net().body(5 * batch(99))
    assert all(torch.equal(output, in_float) or torch.equal(output, in_int8) for output in outputs)
    first, second = ([row.outlier_channels for row in quaff_fx.explain(m).rows] for m in (model, alone))
    assert first == second


def test_nan_names_the_layer_and_converts_nothing() -> None:
    model = quaff_fx.compile(tiny_llama(), QUIET | {"calibration_steps": 1})
    layer = model.base_model.model.model.layers[1]
    good = layer.post_attention_layernorm.weight.data.clone()
    layer.post_attention_layernorm.weight.data[3] = torch.nan
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.gate_proj\.weight: its input has NaN"):
        Run(model).step(token_ids())
    assert quaff_fx.explain(model).steps == 0
    assert quaff_fx.explain(model).stage == "observe"
    layer.post_attention_layernorm.weight.data.copy_(good)
    Run(model).step(token_ids())
    assert quaff_fx.explain(model).steps == 1
