"""`explain`: facts of each weight and their sums, before the conversion and after."""

from __future__ import annotations

import pytest
from torch import nn

import quaff_fx
from quaff_fx.errors import ConfigError
from quaff_fx.reports.explain import Explanation, Row
from tests.blocks import EAGERLY, batch, compiled, converted, step
from tests.models import tiny_llama

pytestmark = EAGERLY


def test_explain_of_a_plain_model() -> None:
    with pytest.raises(ConfigError, match="was not compiled by quaff_fx"):
        quaff_fx.explain(tiny_llama())


def row(name: str, stage: str = "int8", reason: str = "", flops: int = 10, channels: tuple[int, ...] = ()) -> Row:
    bits = 8 if stage == "int8" else None
    after = 2**20 if stage == "int8" else 4 * 2**20
    return Row(name, f"{name}.weight", (8, 12), stage, bits, channels, 4 * 2**20, after, reason, flops)


EXPLANATION = Explanation(
    (
        row("a", channels=(5, 1, 2, 3, 4, 6)),
        row("b", flops=20),
        row("c", "float", "weight is trainable", 30),
        row("d", "float", "weight is trainable", 40),
    ),
    "quantize",
    2,
    2,
    "the reference",
    ("a.weight (norm)", "b.weight (norm)"),
)


def test_shares_are_of_all_multiply_adds_and_bytes_of_the_rewritten_weights() -> None:
    assert EXPLANATION.int8_share == 0.3
    assert EXPLANATION.left_alone == {"weight is trainable": pytest.approx(0.7)}
    assert EXPLANATION.bytes_before == 8 * 2**20
    assert EXPLANATION.bytes_after == 2 * 2**20


def test_the_table_has_a_line_for_each_int8_weight_and_one_for_each_reason() -> None:
    lines = str(EXPLANATION).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["a", "b", "c"]
    assert "int8 (a8)" in lines[2]
    assert "5 1 2 3 +2" in lines[2]
    assert "c and 1 more" in lines[4]
    assert "weight is trainable (70.0% of multiply-adds)" in lines[4]
    assert lines[5] == (
        "2 weights are int8: 30.0% of all linear multiply-adds; weight memory 8.00 → 2.00 MiB (0.250); products: the "
        "reference"
    )
    assert lines[6] == "also dequantized in each forward: a.weight (norm) and 1 more"


def test_a_model_without_any_work_has_shares_of_nothing() -> None:
    empty = Explanation((), "observe", 0, 8, "the reference")
    assert empty.int8_share == 0
    assert empty.left_alone == {}
    assert empty.summary() == "observing: 0 of 8 calibration steps done, all weights are float"


def test_what_it_says_before_and_after_the_conversion() -> None:
    model = compiled()
    step(model)
    before = quaff_fx.explain(model)
    assert (before.stage, before.steps, before.calibration_steps) == ("observe", 1, 2)
    assert {each.stage for each in before.rows if not each.reason} == {"observed"}
    assert before.bytes_before == before.bytes_after
    step(model)
    step(model)
    after = quaff_fx.explain(model)
    assert after.stage == "quantize"
    up = next(each for each in after.rows if each.name == "body.blocks.0.up")
    assert (up.stage, up.shape, up.activation_bits in (7, 8)) == ("int8", (64, 32), True)
    assert up.flops == 2 * batch().numel() * 64, "of both calibration steps"
    assert up.bytes_before == 4 * 64 * 32 > up.bytes_after
    assert after.left_alone.keys() == {"weight is trainable"}


def test_the_model_may_be_wrapped() -> None:
    model = converted()
    assert quaff_fx.explain(nn.Sequential(model)).rows == quaff_fx.explain(model).rows


def test_an_excluded_weight_has_its_reason() -> None:
    model = quaff_fx.calibrate(compiled(exclude=("down",)), [batch()])
    reasons = {each.name: each.reason for each in quaff_fx.explain(model).rows}
    assert reasons["body.blocks.1.down"] == "excluded by the config"
    assert reasons["body.blocks.1.up"] == ""
