"""Ctrl-C at lines of what changes a model: here at each twentieth, `benchmarks/reliability.py` tries every one."""

from __future__ import annotations

import pytest
from torch import nn

import quaff_fx
from tests import interrupts
from tests.blocks import UNTRACED

pytestmark = [
    pytest.mark.slow,
    UNTRACED,
    # By the traceback of the interrupt.
    pytest.mark.filterwarnings("ignore:.*MiB are still referenced after conversion:quaff_fx.QuaffWarning"),
]


@pytest.mark.parametrize("program", interrupts.PROGRAMS, ids=lambda program: program.__name__)
def test_the_next_call_goes_on_as_if_nothing_had_happened(program) -> None:
    counts = interrupts.run((program,), every=20)
    assert counts.cases > 5
    assert counts.wrong == 0, "\n".join(counts.examples)


def test_another_result_is_seen() -> None:
    def forgetful(again: interrupts.Again) -> nn.Module:
        model, calls = interrupts.compiled(), []

        def calibrate() -> None:
            calls.append(None)
            quaff_fx.calibrate(model, [interrupts.batch(len(calls))])

        again(calibrate)
        return model

    counts = interrupts.run((forgetful,), every=50)
    assert counts.wrong > 0
    assert "another result" in counts.examples[0]
