"""What counts as a training step, and what may change between two of them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import quaff_fx
from quaff_fx import notices
from quaff_fx.api import stages_of
from quaff_fx.errors import CalibrationError
from tests.blocks import QUIET, Net, batch, converted, gradients, step
from tests.models import cosine


@pytest.fixture(autouse=True)
def eager():
    """int8 products without Inductor: what is counted and when is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(**config: object) -> Net:
    return quaff_fx.compile(Net(), QUIET | config)


@dataclass
class Output:
    hidden: Tensor
    text: str = ""


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


def test_forwards_that_are_never_backpropagated_are_told_once() -> None:
    model, kept = compiled(), []
    with pytest.warns(quaff_fx.QuaffWarning, match=r"16 forwards with gradients .* \(0 are\) .* \(16 are\)") as found:
        kept += [model(batch()) for _ in range(3 * notices.UNHEARD_LIMIT)]
    assert len([warning for warning in found if issubclass(warning.category, quaff_fx.QuaffWarning)]) == 1


def test_a_conversion_that_waits_for_kept_outputs_is_told() -> None:
    model, kept = compiled(), []
    for seed in range(3):
        step(model, seed)
        kept.append(model(batch(seed)))
    with pytest.warns(quaff_fx.QuaffWarning, match=r"\(3 are\) and no output of an earlier forward is kept"):
        kept += [model(batch(seed)) for seed in range(2 * notices.UNHEARD_LIMIT)]
    assert stages_of(model).stage == "observe"
    kept.clear()
    step(model)
    assert stages_of(model).stage == "quantize"


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


def test_weights_that_no_linear_reads_stay_float_with_a_word_at_the_first_step() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8).requires_grad_(False)
            self.delta = nn.Parameter(torch.zeros(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.inner.weight.t() + self.delta)

    model = quaff_fx.compile(nn.Sequential(Added(), Added()), QUIET)
    x = torch.randn(3, 8)
    with pytest.warns(quaff_fx.QuaffWarning, match=r"no linear reads any of its 2 frozen weights \(but add does\)"):
        model(x).sum().backward()
    for _ in range(3):
        model(x).sum().backward()
    assert {row.reason for row in quaff_fx.explain(model).rows if "inner" in row.name} == {"no linear reads it"}
    assert quaff_fx.explain(model).int8_share == 0


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


def test_a_recurrent_module_is_told_at_the_first_step_with_the_way_out() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 16, batch_first=True).requires_grad_(False)
            self.out = nn.Linear(16, 4).requires_grad_(False)
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0]) + self.bias

    model = quaff_fx.compile(Tagger(), QUIET)
    with pytest.warns(quaff_fx.QuaffWarning, match=r"calls lstm, .*allow_rnn = True"):
        model(torch.randn(2, 3, 8)).sum().backward()
    for _ in range(3):
        model(torch.randn(2, 3, 8)).sum().backward()
    rows = {row.weight: row for row in quaff_fx.explain(model).rows}
    assert rows["out.weight"].stage == "int8"
    assert rows["lstm.weight_ih_l0"].reason == "not only linears over one dimension read it"
    assert rows["lstm.weight_ih_l0"].flops > rows["out.weight"].flops
