"""What a person is told while a model is trained, each thing once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import quaff_fx
from quaff_fx import notices
from quaff_fx.api import stages_of
from quaff_fx.errors import QuaffWarning
from quaff_fx.notices import Notices
from tests.blocks import EAGERLY, QUIET, Net, batch, compiled, step

pytestmark = EAGERLY


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


def test_a_weight_whose_values_alone_are_read_stays_float() -> None:
    """Their values are read: that much is right, and nothing is gained. A warning says so, and who reads them."""

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4).requires_grad_(False)
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.gain * self.inner.weight.norm(dim=1)

    model, x = quaff_fx.compile(nn.ModuleList([Norms(), Norms()])[0], QUIET), torch.randn(2, 4)
    with pytest.warns(QuaffWarning, match=r"no linear reads any of its 1 frozen weights \(but norm does\)"):
        model(x).sum().backward()
    weight = model.inner.weight
    with warnings.catch_warnings(), torch.compiler.set_stance("default"):
        warnings.simplefilter("error", QuaffWarning)
        model(x).sum().backward()
        model(x).sum().backward()
    assert model.inner.weight is weight
    (row,) = quaff_fx.explain(model).rows
    assert (row.stage, row.reason) == ("float", "no linear reads it")


@pytest.fixture
def said(recwarn: pytest.WarningsRecorder) -> Callable[[], list[str]]:
    """What was said since it was last asked."""

    def texts() -> list[str]:
        found = [str(warning.message) for warning in recwarn if warning.category is QuaffWarning]
        recwarn.clear()
        return found

    return texts


def test_a_backward_that_is_heard_begins_the_count_anew(said: Callable[[], list[str]]) -> None:
    told = Notices(Net())
    for _ in range(2):
        for _ in range(notices.UNHEARD_LIMIT - 1):
            told.forward_was_observed(1, 2, 0)
        told.step_was_counted()
    assert said() == []
    for _ in range(notices.UNHEARD_LIMIT):
        told.forward_was_observed(1, 2, 0)
    assert len(said()) == 1


def test_many_calibration_steps_have_more_patience(said: Callable[[], list[str]]) -> None:
    told, wanted = Notices(Net()), notices.UNHEARD_LIMIT
    for _ in range(2 * wanted - 1):
        told.forward_was_observed(0, wanted, 0)
    assert said() == []
    told.forward_was_observed(0, wanted, 0)
    assert len(said()) == 1


def test_a_hook_in_a_block_is_told_when_training_goes_on_with_it(said: Callable[[], list[str]]) -> None:
    model = Net()
    told, first, second = Notices(model), model.body.blocks[0], model.body.blocks[1]
    for _ in range(notices.HOOKED_LIMIT - 1):
        told.block_was_hooked(first, first.up)
        told.block_was_hooked(second, second.down)
        with torch.no_grad():
            told.block_was_hooked(first, first.up)
    assert said() == []
    told.block_was_hooked(second, second.down)
    told.block_was_hooked(first, first.up)
    (text,) = said()
    assert text.startswith("body.blocks.1.down: has a hook and lies in a block, expected none while training")


def test_what_was_not_traced_is_named_once_and_a_recurrent_module_is_its_reason(
    said: Callable[[], list[str]],
) -> None:
    model = Net()
    told = Notices(model)
    told.recurrent_modules(model.body.blocks)
    assert said() == []
    model.body.blocks[1].lstm = nn.LSTM(4, 4)
    told.recurrent_modules(model.body.blocks)
    told.block_was_untraced(model.body.blocks[0])
    (text,) = said()
    assert text.startswith("body.blocks.1: calls lstm, a recurrent module of torch")
    again = Notices(model)
    again.block_was_untraced(model.body.blocks[0])
    again.block_was_untraced(model.body.blocks[1])
    (text,) = said()
    assert text.startswith("body.blocks.0: was not traced by torch.compile, expected a graph")


def test_the_root_has_no_name_but_its_class(said: Callable[[], list[str]]) -> None:
    model = Net()
    Notices(model).block_was_untraced(model)
    assert [text.split(":")[0] for text in said()] == ["Net"]
