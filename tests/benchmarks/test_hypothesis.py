"""What is recorded of outlier channels: planted ones are found, moved ones are missed, and inputs are seen once."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from benchmarks import hypothesis
from benchmarks.hypothesis_recorder import RULES, Batch, Input, Observation, Recorder, rounding_noise, share_in
from tests.data import planted_outliers
from tests.models import float_llama, tiny_llama, token_ids, trained_tokenizer
from workloads import word_problems

CHANNELS = [3, 17]
BUDGET = 2 / 1024


def observed(later: list[int]) -> dict[str, Observation]:
    """What is observed by rule when `CHANNELS` are outliers while calibrating and `later` afterwards."""
    seen = Input(0, 0, ["q_proj"])
    seen.calibration = [Batch.of(planted_outliers(20, 1024, CHANNELS, factor=3000, seed=seed)) for seed in range(3)]
    seen.choose([BUDGET])
    seen.last = Batch.of(planted_outliers(20, 1024, later, factor=3000, seed=8))
    x = planted_outliers(20, 1024, later, factor=3000, seed=9)
    return {one.rule: one for one in seen.observe(x, Batch.of(x), step=3)}


@pytest.mark.parametrize("rule", RULES)
def test_outliers_that_stay_are_all_hit(rule: str) -> None:
    one = observed(CHANNELS)[rule]
    assert (one.channels, one.hit_rate, one.previous_batch) == (2, 1.0, 1.0)
    assert one.noise_chosen == one.noise_best < 0.001 * one.noise
    assert one.excess_chosen == one.excess_best > 0


@pytest.mark.parametrize("rule", RULES)
def test_outliers_that_move_are_missed(rule: str) -> None:
    one = observed([3, 40])[rule]
    assert (one.hit_rate, one.previous_batch) == (0.5, 1.0)
    assert one.noise > one.noise_chosen > 10 * one.noise_best
    assert 0 < one.excess_chosen < one.excess_best


def test_without_outliers_there_is_nothing_to_hit() -> None:
    one = observed([])
    assert math.isnan(one["mean_multiple"].hit_rate)
    assert not math.isnan(one["absmax_rank"].hit_rate)
    assert math.isnan(share_in(torch.tensor([], dtype=torch.int64), torch.tensor([1])))


def test_rounding_noise_is_the_mean_over_tokens_of_max_over_energy() -> None:
    x = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 2.0]])
    assert rounding_noise(x, torch.tensor([], dtype=torch.int64)) == pytest.approx((16 / 25 + 4 / 8) / 2)
    assert rounding_noise(x, torch.tensor([1])) == pytest.approx((9 / 25 + 4 / 8) / 2)


def test_linears_that_read_one_activation_are_one_input() -> None:
    model, ids = tiny_llama(), token_ids()
    recorder = Recorder(model, 0, [0.1], calibration_steps=2, every=2)
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    for step in range(5):
        model(input_ids=ids, attention_mask=mask)
        recorder.finish_step(step)
    names = [(one.layer, *one.projections) for one in recorder.inputs.values()]
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert names == [(layer, *projections) for layer in (0, 1) for projections in block]
    assert {one.step for one in recorder.observations} == {2, 4}
    assert len(recorder.observations) == 2 * len(RULES) * len(names)
    # The same batch again and again, and nothing trained: what was chosen is what there is.
    assert all(one.hit_rate == 1.0 for one in recorder.observations if one.rule == "absmax_rank")


def test_padding_is_not_observed() -> None:
    model, ids = tiny_llama(), token_ids()
    recorder = Recorder(model, 0, [0.1], calibration_steps=1, every=1)
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    model(input_ids=ids, attention_mask=mask)
    seen = next(iter(recorder.inputs.values())).calibration[0].absmax
    embedded = model.get_input_embeddings()(ids)
    normed = model.base_model.model.model.layers[0].input_layernorm(embedded)
    torch.testing.assert_close(seen, normed[:, :-4].flatten(0, 1).abs().amax(dim=0))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    float_llama(vocab_size=512, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    problems = word_problems.held_out_problems(100)
    trained_tokenizer([problem.question for problem in problems]).save_pretrained(tmp_path / "model")
    sizes = ["--steps", "5", "--calibration-steps", "2", "--every", "2", "--max-tokens", "320", "--threads", "1"]
    words = [
        "--model",
        str(tmp_path / "model"),
        "--output",
        str(tmp_path),
        "--budgets",
        "0.05",
        "0.1",
        "--seeds",
        "0",
        "3",
        *sizes,
    ]
    assert hypothesis.main(words) == 0
    with (tmp_path / "hypothesis.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Two seeds, steps 2 and 4, two layers, four inputs, two rules, two budgets.
    assert len(rows) == 2 * 2 * 2 * 4 * 2 * 2
    assert {int(row["channels"]) for row in rows} == {2, 4, 9}
    printed = capsys.readouterr().out
    assert "q_proj k_proj v_proj" in printed
    assert (tmp_path / "hypothesis.png").is_file()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--steps", "8"], "--steps: is 8, expected more than the steps that calibrate"),
        (["--every", "0"], "--every: is 0, expected at least 1"),
        (["--budgets", "1.5"], "expected shares above 0"),
        (["--seeds", "1", "1"], "--seeds: is [1, 1], expected different"),
    ],
)
def test_a_bad_option_is_named(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hypothesis.parse_options(words)
    assert text in capsys.readouterr().err
