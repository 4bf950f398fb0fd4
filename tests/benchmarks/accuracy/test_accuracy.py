"""The accuracy benchmark: each method against its formula, and the command on a tiny model from end to end."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy import bench, forms, layers, methods, results, tasks, texts
from benchmarks.peers import QuaffLinear
from tests.data import dequantized_rows, normal, planted_outliers, quaff_output, sqnr_db
from tests.models import float_llama, tiny_llama, token_ids
from workloads import word_problems

CHANNELS = [3, 17]
QUESTIONS = [texts.Question("sums", f"What is {i} + 1?\nA. {i}\nB. {i + 1}\nC. 0\nD. 9", "B") for i in range(8)]
PLAYS = ["To be, or not to be, that is the question. " * 200, "Now is the winter of our discontent. " * 200]


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "plays", lambda: PLAYS)
    monkeypatch.setattr(texts, "questions", lambda: QUESTIONS)


# --- layers ----------------------------------------------------------------------------------------------------------


def linear() -> nn.Linear:
    made = nn.Linear(64, 48)
    made.weight.data = normal(48, 64, seed=3, std=0.05)
    return made.requires_grad_(False)


def outlying(seed: int = 2) -> torch.Tensor:
    return planted_outliers(20, 64, CHANNELS, factor=60, seed=seed)


def int8_rows(matrix: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = matrix.abs().amax(dim=1) / limit
    return (matrix / scale.unsqueeze(1)).round().to(torch.int8), scale


def expected_output(x: torch.Tensor, weight: torch.Tensor, limit: int, apart: list[int]) -> torch.Tensor:
    """x Wᵀ in float64, W8A8 but for the channels `apart`, which are exact."""
    inside = x.double().clone()
    inside[:, apart] = 0
    x_int8, x_scale = int8_rows(inside, limit)
    w_int8, w_scale = int8_rows(weight.double(), 127)
    return quaff_output(x_int8, x_scale, x.double()[:, apart], w_int8, w_scale, weight.double()[:, apart].t())


def assert_equal_but_for_edges(y: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Float32 against float64: a value on a rounding edge may fall to either side, one step in a few products."""
    step = x.abs().amax(dim=1, keepdim=True) / 63 * w.abs().max()
    error = (y.double() - expected).abs()
    assert (error <= 1.01 * step).all()
    assert (error > 1e-4 * expected.abs().max()).double().mean() < 0.05, "edges are rare"


@pytest.mark.parametrize("limit", [127, 63])
class TestLayers:
    def test_plain(self, limit: int) -> None:
        frozen, x = linear(), outlying()
        y = layers.Int8Linear(frozen, limit)(x) - frozen.bias
        assert_equal_but_for_edges(y, expected_output(x, frozen.weight, limit, []), x, frozen.weight)

    def test_llm_int8_multiplies_the_columns_over_six_in_float(self, limit: int) -> None:
        frozen, x = linear(), outlying()
        assert (x.abs().amax(dim=0) >= 6).nonzero().flatten().tolist() == CHANNELS
        y = layers.LLMInt8Linear(frozen, limit)(x) - frozen.bias
        expected = expected_output(x, frozen.weight, limit, CHANNELS)
        inside = x.clone()
        inside[:, CHANNELS] = 0
        assert_equal_but_for_edges(y, expected, inside, frozen.weight)

    @pytest.mark.parametrize("is_static", [True, False])
    def test_smooth_quant(self, limit: int, is_static: bool) -> None:
        frozen, x = linear(), outlying()
        x_absmax = outlying(seed=7).abs().amax(dim=0)
        layer = layers.SmoothQuantLinear(frozen, limit, x_absmax if is_static else None)
        seen = (x_absmax if is_static else x.abs().amax(dim=0)).double()
        s = (seen / frozen.weight.double().abs().amax(dim=0)).sqrt()
        smoothed, w = x.double() / s, frozen.weight.double() * s
        assert_equal_but_for_edges(layer(x) - frozen.bias, expected_output(smoothed, w, limit, []), smoothed, w)

    @pytest.mark.parametrize("kind", ["plain", "LLM.int8", "static", "dynamic"])
    def test_grad_input_is_within_rounding_of_float64(self, limit: int, kind: str) -> None:
        frozen, x = linear(), outlying().requires_grad_()
        made = {
            "plain": lambda: layers.Int8Linear(frozen, limit),
            "LLM.int8": lambda: layers.LLMInt8Linear(frozen, limit),
            "static": lambda: layers.SmoothQuantLinear(frozen, limit, x.detach().abs().amax(dim=0)),
            "dynamic": lambda: layers.SmoothQuantLinear(frozen, limit, None),
        }
        grad_output = normal(20, 48, seed=4)
        made[kind]()(x).backward(grad_output)
        s = torch.ones(64, dtype=torch.float64)
        if kind in ("static", "dynamic"):
            s = (x.detach().double().abs().amax(dim=0) / frozen.weight.double().abs().amax(dim=0)).sqrt()
        w = frozen.weight.double() * s
        w_int8, w_scale = int8_rows(w, 127)
        g_scale = (grad_output.double() * w_scale).abs().amax(dim=1, keepdim=True) / limit
        bound = g_scale / 2 * w_int8.double().abs().sum(dim=0) + grad_output.double().abs() @ (
            w_scale.unsqueeze(1) / 2
        ).expand(-1, 64)
        error = (x.grad.double() * s - grad_output.double() @ w).abs()
        assert (error <= 1.001 * bound + 1e-6).all()

    def test_outliers_cost_plain_int8_most(self, limit: int) -> None:
        frozen, x = linear(), outlying()
        exact = frozen(x)
        quality = {
            "plain": sqnr_db(exact, layers.Int8Linear(frozen, limit)(x)),
            "LLM.int8": sqnr_db(exact, layers.LLMInt8Linear(frozen, limit)(x)),
            "SmoothQuant": sqnr_db(exact, layers.SmoothQuantLinear(frozen, limit, None)(x)),
        }
        assert min(quality["LLM.int8"], quality["SmoothQuant"]) > quality["plain"] + 3, quality

    def test_a_zero_row_stays_zero(self, limit: int) -> None:
        x = outlying()
        x[5] = 0
        frozen = linear()
        for layer in (
            layers.Int8Linear(frozen, limit),
            layers.LLMInt8Linear(frozen, limit),
            layers.SmoothQuantLinear(frozen, limit, None),
        ):
            assert torch.equal(layer(x)[5], frozen.bias)

    def test_the_papers_rule_finds_nothing_without_outliers(self, limit: int) -> None:
        frozen, x = linear(), normal(20, 64, seed=1)
        quaff = QuaffLinear(frozen, limit, fills_budget=False)
        quaff(x)
        assert len(quaff.outlier_channels) == 0
        w_int8 = (frozen.weight.double() / (frozen.weight.abs().max().double() / 127)).round().to(torch.int8)
        x_int8, x_scale = int8_rows(x.double(), limit)
        w_scale = (frozen.weight.abs().max().double() / 127).expand(48)
        expected = quaff_output(x_int8, x_scale, x[:, :0], w_int8, w_scale, frozen.weight[:, :0].t())
        assert_equal_but_for_edges(quaff(x) - frozen.bias, expected, x, frozen.weight)


class TestWeightValues:
    def test_int8(self) -> None:
        changed, exact = layers.int8_weight_values(linear()), linear()
        w_int8, w_scale = int8_rows(exact.weight.double(), 127)
        torch.testing.assert_close(changed.weight.double(), dequantized_rows(w_int8, w_scale), rtol=1e-5, atol=0)

    def test_nf4_has_sixteen_values_a_block(self) -> None:
        pytest.importorskip("bitsandbytes")
        changed, exact = layers.nf4_weight_values(linear()), linear()
        for block, before in zip(changed.weight.flatten().split(64), exact.weight.flatten().split(64), strict=True):
            assert len(block.unique()) <= 16
            # The widest gap between two of its levels is 0.304 of the block's absmax; its own rounding is added.
            assert (block - before).abs().max() <= 0.17 * before.abs().max()


# --- models ----------------------------------------------------------------------------------------------------------


def test_injected_outliers_change_nothing_but_their_channels() -> None:
    found = []
    for seed in range(2):
        model, ids = float_llama(), token_ids()
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
            before = model.model.layers[1].input_layernorm(torch.ones(1, 48))
            methods.inject_outliers(model, 100.0, seed)
            after = model.model.layers[1].input_layernorm(torch.ones(1, 48))
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        found.append(set(((after / before).squeeze(0) > 50).nonzero().flatten().tolist()))
    assert [len(channels) for channels in found] == [methods.INJECTED_CHANNELS] * 2
    assert found[0].isdisjoint(found[1])


def test_injection_needs_its_norms() -> None:
    with pytest.raises(ValueError, match="expected blocks like those of Llama"):
        methods.inject_outliers(nn.Sequential(nn.Linear(4, 4)), 100.0, seed=0)
    with pytest.raises(ValueError, match="seed: is 12, expected one that leaves 4 of 48"):
        methods.inject_outliers(float_llama(), 100.0, seed=12)


def test_losses_are_those_of_the_model() -> None:
    model, ids = tiny_llama().eval(), token_ids()
    labels = ids.clone()
    labels[:, :10] = word_problems.IGNORED_LABEL
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found = tasks.losses(model, [batch])["loss"]
    each = [model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss.item() for i in range(2)]
    assert found == pytest.approx(each, rel=1e-5)


def test_gradient_distance() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    measures = tasks.gradient_distance([a, b], [b, b])
    assert measures["cosine"] == pytest.approx([math.sqrt(0.5), 1.0])
    assert measures["relative error"] == pytest.approx([math.sqrt(0.5), 0.0])


@pytest.mark.parametrize(
    ("text", "answer"), [("a\n#### 15", "15"), ("#### 1\n#### 1,234 apples", "1234"), ("15", ""), ("####", "")]
)
def test_final_number(text: str, answer: str) -> None:
    assert tasks.final_number(text) == answer


# --- texts -----------------------------------------------------------------------------------------------------------

PROMPT = """The following are multiple choice questions (with answers) about birds.

Q: Which bird
swims?
(A) Robin (B) Penguin (C) Wren (D) Swift
A: Let's think step by step. Penguins do. The answer is (B).

Q: Not a question.
A: The answer is (A).
"""


def test_questions_lose_their_solutions() -> None:
    (question,) = texts.parsed_questions({"some_birds": PROMPT})
    assert question == texts.Question("some birds", "Which bird\nswims?\nA. Robin\nB. Penguin\nC. Wren\nD. Swift", "B")


def test_a_play_begins_with_its_first_act() -> None:
    assert texts.after_cast("Hamlet\n\nACTORS\n\nACT I.\n\nScene") == "ACT I.\n\nScene"
    assert texts.after_cast("no acts") == "no acts"


def test_windows_are_spread_over_all_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = tasks.text_windows(tokenizer, PLAYS, 5, 32)
    assert windows.shape == (5, 32)
    starts = [tokenizer.decode(window) in (PLAYS[0] * 2) for window in windows]
    assert starts == [True, True, True, False, False]
    with pytest.raises(ValueError, match="expected fewer"):
        tasks.text_windows(tokenizer, ["short"], 1, 32)


def test_questions_take_turns_of_subjects(tokenizer: PreTrainedTokenizerBase) -> None:
    other = texts.Question("birds", "Which?\nA. a\nB. b\nC. c\nD. d", "D")
    ((batch, right),) = tasks.question_batches(tokenizer, [*QUESTIONS, other], 1, 2, 160)
    assert sorted(right.tolist()) == [1, 3]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    with pytest.raises(ValueError, match="expected as many"):
        tasks.question_batches(tokenizer, QUESTIONS, 5, 2, 160)


# --- results ---------------------------------------------------------------------------------------------------------


class TestEstimate:
    def test_of_one_seed_is_over_windows(self) -> None:
        values = torch.randn(200, dtype=torch.float64).tolist()
        found = results.estimate([values])
        mean, error = torch.tensor(values).mean().item(), torch.tensor(values).std().item() / math.sqrt(200)
        assert (found.mean, found.error) == pytest.approx((mean, error), rel=1e-5)
        assert (found.low, found.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)

    def test_seeds_widen_it(self) -> None:
        same = [[0.1, 0.2, 0.3, 0.2]] * 2
        apart = [[0.1, 0.2, 0.3, 0.2], [-0.3, -0.2, -0.1, -0.2]]
        assert results.estimate(same).is_resolved
        found = results.estimate(apart)
        assert not found.is_resolved
        assert found.by_seed == pytest.approx((0.2, -0.2))


def cell(method: str, task: str, stage: str = "before", seed: int = 0) -> results.Cell:
    return results.Cell(method, 32 if method == "float32" else 8, "LoRA", seed, stage, task)


RESULTS = {
    cell("float32", "words"): {"loss": [1.0, 2.0, 5.0]},
    cell("other", "words"): {"loss": [1.5, 2.5, 5.5]},
    cell("other", "words", "injected 100"): {"loss": [1.75, 2.75]},
    cell("float32", "choices"): {"loss": [1.0, 1.0], "choice": [0.0, 1.0], "correct": [1.0, 0.0]},
    cell("other", "choices"): {"loss": [1.0, 2.0], "choice": [0.0, 2.0], "correct": [1.0, 1.0]},
    cell("float32", "training", "after"): {"loss": [3.0, 2.0]},
    cell("other", "training", "after"): {"loss": [3.5, 1.5]},
}


class TestRows:
    def test_differences_are_paired(self) -> None:
        found = {(r.method, r.stage, r.task, r.measure): r.value for r in results.rows(RESULTS)}
        assert found["other", "before", "words", "Δ loss"].mean == 0.5
        assert found["other", "before", "words", "Δ loss"].error == 0
        assert found["other", "injected 100", "words", "added loss"].mean == 0.25
        assert found["other", "before", "choices", "agreement"].mean == 0.5
        assert found["other", "before", "choices", "Δ correct"].mean == 0.5
        assert found["other", "after", "training", "distance of loss"].mean == 0.5
        assert ("float32", "before", "words", "Δ loss") not in found

    def test_table(self) -> None:
        columns = {"Δ": ("before", "words", "Δ loss"), "same": ("before", "choices", "agreement")}
        lines = results.table(results.rows(RESULTS), columns, ["LoRA"]).splitlines()
        assert lines[2].split() == ["float32", "32", "2.6667"]
        assert lines[3].split() == ["other", "8", "+0.5000", "±", "0.0000", "*", "0.5000"]


class TestStore:
    def test_keeps_what_it_is_given(self, tmp_path: Path) -> None:
        store = results.Store(tmp_path, {"steps": 3})
        store.save(cell("a", "words"), {"exclude": ("x",)}, {"loss": [1.0]})
        again = results.Store(tmp_path, {"steps": 3})
        assert again.load(cell("a", "words"), {"exclude": ("x",)}) == {"loss": [1.0]}
        assert again.load(cell("a", "words"), {"exclude": ("y",)}) is None, "another config"
        assert again.load(cell("a", "words", seed=1), None) is None
        assert not list(tmp_path.rglob("*.incomplete"))

    def test_refuses_other_settings(self, tmp_path: Path) -> None:
        results.Store(tmp_path, {"steps": 3, "model": "m"})
        with pytest.raises(results.SettingsError, match=r"steps 3, now 4.*Name another folder"):
            results.Store(tmp_path, {"steps": 4, "model": "m"})


# --- the command -----------------------------------------------------------------------------------------------------


def options(folder: Path, output: Path, *words: str, steps: int = 2) -> list[str]:
    sizes = ["--steps", str(steps), "--max-tokens", "320", "--words", "4", "--windows", "4", "--choices", "4"]
    return ["--model", str(folder), "--output", str(output), "--threads", "1", "--stop-at-errors", *sizes, *words]


FLOAT_AND_BASELINES = [
    "--methods",
    "float32",
    "plain W8A8",
    "SmoothQuant",
    "LLM.int8",
    "int8 weights",
    "bfloat16",
    "--seeds",
    "0",
]


@pytest.fixture(scope="module")
def measured(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of everything but quaff_fx."""
    output = tmp_path_factory.mktemp("accuracy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "plays", lambda: PLAYS)
        patch.setattr(texts, "questions", lambda: QUESTIONS)
        patch.setattr(tasks, "ANSWER_TOKENS", 4)
        assert accuracy.main(options(folder, output, *FLOAT_AND_BASELINES, "--answers", "2")) == 0
    return output


def numbers(output: Path) -> list[dict[str, str]]:
    with (output / "accuracy.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_command_measures_everything(measured: Path) -> None:
    place = ("method", "bits", "adapter", "stage", "task", "measure")
    found = {tuple(row[name] for name in place) for row in numbers(measured)}
    for method in methods.METHODS:
        for bits in method.bits if any(word in method.name for word in FLOAT_AND_BASELINES[1:]) else ():
            row = (method.name, str(bits))
            measures = [("before", "words", "loss"), ("after", "words", "loss"), ("after", "answers", "correct")]
            measures += [(stage, task, "loss") for stage in ("before", "after") for task in ("shakespeare", "choices")]
            if method.name != "float32":
                measures += [("before", "gradient", "cosine"), ("after", "words", "Δ loss")]
            if method.is_stressed and bits == min(method.bits):
                measures += [(f"injected {factor}", "words", "added loss") for factor in (100, 1000)]
            for measure in measures:
                assert (*row[:2], "LoRA", *measure) in found
    for adapter in methods.ADAPTERS:
        assert ("float32", "32", adapter, "after", "words", "loss") in found
    assert (measured / "accuracy.png").is_file()
    assert (measured / "training.png").is_file()


def test_numbers_make_sense(measured: Path) -> None:
    means = {
        (row["method"], row["bits"], row["stage"], row["measure"]): float(row["mean"])
        for row in numbers(measured)
        if row["task"] in ("words", "gradient") and row["adapter"] == "LoRA"
    }
    assert means["plain W8A8", "8", "before", "cosine"] > means["plain W8A8", "7", "before", "cosine"] > 0.9
    assert means["int8 weights alone", "32", "before", "cosine"] > means["plain W8A8", "8", "before", "cosine"]
    assert abs(means["plain W8A8", "8", "before", "Δ loss"]) < 0.01
    assert means["float32", "32", "after", "loss"] < means["float32", "32", "before", "loss"]
    assert abs(means["float32", "32", "injected 1000", "added loss"]) < 1e-3
    # Random weights have no outliers to lose, and 1000 times one channel leaves nothing of the others.
    assert means["plain W8A8", "7", "injected 1000", "added loss"] != 0


def test_a_second_run_measures_nothing_and_says_the_same(
    folder: Path, measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (measured / "accuracy.csv").read_text()
    monkeypatch.setattr(accuracy, "Bench", None)
    assert accuracy.main(options(folder, measured, *FLOAT_AND_BASELINES, "--answers", "2")) == 0
    assert (measured / "accuracy.csv").read_text() == before
    printed = capsys.readouterr().out
    for title in accuracy.COLUMNS:
        assert title in printed


def test_only_what_is_missing_is_measured_again(folder: Path, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = numbers(measured)
    (lost,) = measured.glob("cells/plain-W8A8_7_LoRA_seed-0_before_shakespeare.json")
    lost.unlink()
    monkeypatch.setattr(tasks, "train", None)
    monkeypatch.setattr(tasks, "choices", None)
    assert accuracy.main(options(folder, measured, *FLOAT_AND_BASELINES, "--answers", "2")) == 0
    assert numbers(measured) == before


def test_a_report_has_all_that_is_stored(
    folder: Path, measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "Bench", None)
    before = sorted(map(str, numbers(measured)))
    words = ["--report", "--methods", "float32", "--stages", "before", "--answers", "2"]
    assert accuracy.main(options(folder, measured, *words)) == 0
    assert sorted(map(str, numbers(measured))) == before
    capsys.readouterr()
    words[-1] = "3"  # of another number of answers there is none
    assert accuracy.main(options(folder, measured, *words)) == 0
    assert not [row for row in numbers(measured) if row["task"] == "answers"]


def test_other_options_are_refused(folder: Path, measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(options(folder, measured, steps=3)) == 2
    assert "steps 2, now 3" in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "choices", interrupt)
    words = options(folder, tmp_path, "--methods", "float32", "--stages", "before")
    assert accuracy.main(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert {path.stem.rpartition("_")[2] for path in (tmp_path / "cells").iterdir()} == {"words", "shakespeare"}


def test_a_method_that_fails_does_not_stop_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such instruction")

    broken = methods.Method("broken", fail, bits=(8,))
    missing = methods.Method("missing", fail, bits=(8,), reason_missing=lambda: "not installed")
    monkeypatch.setattr(bench, "METHODS", (broken, missing, methods.METHODS[0]))
    words = options(folder, tmp_path, "--stages", "before", "--tasks", "words")
    words.remove("--stop-at-errors")
    assert accuracy.main(words) == 1
    printed = capsys.readouterr().out
    assert "Not run: broken, 8 bits, LoRA, before: RuntimeError: no such instruction" in printed
    assert "Not run: missing, 8 bits, LoRA, before: not installed" in printed
    assert "Before fine-tuning" in printed


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--steps", "0"], "--steps: is 0, expected at least 1"),
        (["--answers", "-1"], "--answers: is -1, expected at least 0"),
        (["--seeds", "1", "1"], "--seeds: is [1, 1], expected different"),
        (["--methods", "nothing"], "'nothing' matches none, expected part of one of 'float32'"),
        (["--output", __file__], "is a file, expected a folder"),
        (["--stages", "never"], "invalid choice"),
    ],
)
def test_a_bad_option_is_named(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        accuracy.parse_options(words)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_methods_are_chosen_by_words_or_whole_names() -> None:
    def chosen(*words: str) -> list[str]:
        parsed = accuracy.parse_options(["--methods", *words] if words else [])
        return [method.name for method in bench.selected_methods(parsed)]

    assert chosen("LLM") == ["float32", "LLM.int8"]
    assert len(chosen("quaff_fx")) == 1 + len(methods.CONFIGS)
    assert set(chosen()).isdisjoint(forms.FORMS)
    assert chosen("exponent", "--ablations")[1:] == [name for name in forms.FORMS if "exponent" in name]


def test_ablations_run_on_validation_problems(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(
        folder,
        tmp_path,
        "--ablations",
        "--seeds",
        "0",
        "--methods",
        "default",
        "√ scale shared, max",
        "--tasks",
        "words",
        "gradient",
    )
    assert accuracy.main(words) == 0
    found = {
        (row["method"], row["bits"]): float(row["mean"]) for row in numbers(tmp_path) if row["measure"] == "cosine"
    }
    assert found.keys() == {(name, bits) for name in ("default", "√ scale shared, max") for bits in ("8", "7")}
    assert 1 > found["default", "8"] > found["default", "7"] > 0.99
    printed = capsys.readouterr().out
    assert "validation problems" in printed
    assert "accuracy.csv; accuracy.png beside it" in printed
    assert not (tmp_path / "training.png").exists()
    sizes = bench.sizes(accuracy.parse_options(words))
    held_out, validation, training = (
        {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}
        for batches in (
            tasks.Material(tokenizer, sizes).words,
            tasks.Material(tokenizer, sizes, is_validation=True).words,
            tasks.Material(tokenizer, sizes).training(0),
        )
    )
    assert validation.isdisjoint(held_out | training)


@pytest.mark.compile
@pytest.mark.slow
def test_quaff_fx_rows_run_the_product(folder: Path, tmp_path: Path) -> None:
    words = [
        "--methods",
        "quaff_fx: default",
        "--eager",
        "--stages",
        "before",
        "after",
        "--tasks",
        "words",
        "gradient",
        "--seeds",
        "1",
    ]
    assert accuracy.main(options(folder, tmp_path, *words)) == 0
    found = [row for row in numbers(tmp_path) if row["method"] == "quaff_fx: default"]
    cosines = {row["bits"]: float(row["mean"]) for row in found if row["measure"] == "cosine"}
    assert 1 - 1e-7 > cosines["8"] > cosines["7"] > 0.99
    deltas = [float(row["mean"]) for row in found if row["measure"] == "Δ loss" and row["stage"] == "after"]
    assert len(deltas) == 2
    assert all(0 < abs(delta) < 0.05 for delta in deltas)
