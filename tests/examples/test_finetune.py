"""The example program, run as a person would on a tiny random model, without any network."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # what python does for a program in that folder

import finetune  # noqa: E402
from measurements import Measurements, comparison_table, frozen_weight_bytes  # noqa: E402

from tests.models import chat_llama  # noqa: E402

MAX_TOKENS = 256


def options(folder: Path, output: Path, **changes: object) -> list[str]:
    values = {"model": folder, "output": output, "steps": 8, "calibration-steps": 2, "max-tokens": MAX_TOKENS}
    values |= {"batch-size": 8, "learning-rate": 1e-2, "threads": 2, **changes}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, str(EXAMPLES / "finetune.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(stream: object, text: str) -> None:
    """Reads a stream until `text` was in it. Progress bars end no lines, so it reads characters."""
    seen = ""
    while text not in seen:
        character = stream.read(1)  # type: ignore[attr-defined]
        assert character, f"the program ended without {text!r}: {seen}"
        seen += character


class TestProgram:
    def test_trains_in_float_and_saves_the_adapter(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        report = tmp_path / "report.json"
        code = finetune.main([*options(folder, tmp_path / "adapter", report=report), "--no-quaff"])
        printed = capsys.readouterr().out
        assert code == 0
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        result = Measurements.load(report)
        assert result.loss_after < result.loss_before - 0.1
        # Per block: q and o 64 x 64, k and v 32 x 64, gate, up and down 128 x 64; in float32.
        assert result.frozen_weight_bytes == 2 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
        assert result.peak_memory >= result.steady_memory > 0
        assert printed.count("Expected: 28080") == 2, "answers before and after"

    @pytest.mark.slow
    def test_the_same_options_give_the_same_losses(self, folder: Path, tmp_path: Path) -> None:
        losses = []
        for name in ("first", "second"):
            report = tmp_path / f"{name}.json"
            finetune.main([*options(folder, tmp_path / name, report=report), "--no-quaff"])
            result = Measurements.load(report)
            losses.append((result.loss_before, result.loss_after))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    @pytest.mark.compile
    @pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"]], ids=["plain", "checkpointing"])
    def test_quaff_learns_with_a_fraction_of_the_weight_bytes(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
    ) -> None:
        reports = {name: tmp_path / f"{name}.json" for name in ("float", "quaff")}
        for name, report in reports.items():
            words = options(folder, tmp_path / name, report=report)
            assert finetune.main([*words, *more, *(["--no-quaff"] if name == "float" else [])]) == 0
        results = {name: Measurements.load(report) for name, report in reports.items()}
        assert (tmp_path / "quaff" / "adapter_model.safetensors").is_file()
        assert results["quaff"].loss_before == pytest.approx(results["float"].loss_before, rel=1e-5)
        # Both learn the same from the same batches: a tenth of what was learnt is far more than int8 rounding makes.
        learnt = results["float"].loss_before - results["float"].loss_after
        assert results["quaff"].loss_after == pytest.approx(results["float"].loss_after, abs=0.1 * learnt)
        # A quarter for int8; the rest is scales and outlier columns, a large share of such small layers.
        assert results["quaff"].frozen_weight_bytes < 0.5 * results["float"].frozen_weight_bytes

    @pytest.mark.compile
    @pytest.mark.slow
    def test_compare_prints_a_row_for_each_method(self, folder: Path, tmp_path: Path) -> None:
        with start([*options(folder, tmp_path), "--compare"]) as program:
            printed, errors = program.communicate()
        assert program.returncode == 0, errors
        table = printed[printed.index("median") :]
        for method in finetune.METHODS:
            assert f"\n{method} " in table
            assert (tmp_path / method / "adapter_model.safetensors").is_file()


class TestInterrupt:
    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_saves_the_adapter_and_says_so(self, folder: Path, tmp_path: Path, number: signal.Signals) -> None:
        with start([*options(folder, tmp_path / "adapter", steps=300, **{"batch-size": 2}), "--no-quaff"]) as program:
            wait_for(program.stderr, ", loss=")  # the first step is done, hundreds are left
            program.send_signal(number)
            printed, errors = program.communicate()
        assert program.returncode == 130, errors
        assert f"Saved the adapter to {tmp_path / 'adapter'} after " in printed
        assert "Stopping after this step" in errors
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

    @pytest.mark.slow
    def test_compare_passes_it_on_and_waits(self, folder: Path, tmp_path: Path) -> None:
        with start([*options(folder, tmp_path, steps=300, **{"batch-size": 2}), "--compare"]) as program:
            wait_for(program.stderr, ", loss=")  # the first step is done, hundreds are left
            program.send_signal(signal.SIGINT)
            printed, errors = program.communicate()
        assert program.returncode == 130, errors
        assert (tmp_path / "eager" / "adapter_model.safetensors").is_file()
        assert "=== compiled ===" not in printed

    def test_a_second_one_ends_the_program_at_once(self) -> None:
        # Tests that were started in the background of a shell ignore the signal.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with finetune.StopRequest() as stop:
                signal.raise_signal(signal.SIGINT)
                assert stop.requested
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_handlers_are_as_before_afterwards(self) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with finetune.StopRequest():
            pass
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class TestOptions:
    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["--steps", "0"], "argument --steps: is '0', expected a whole number of at least 1."),
            (["--steps", "many"], "argument --steps: is 'many', expected a whole number of at least 1."),
            (["--steps", "10"], "argument --steps: is 10, expected more than 10: the first 8 calibrate and 2 compile."),
            (["--seed", "-1"], "argument --seed: is '-1', expected a whole number of at least 0."),
            (["--learning-rate", "nan"], "argument --learning-rate: is 'nan', expected a number between 0 and 1."),
            (["--outlier-budget", "5"], "argument --outlier-budget: is '5', expected a number between 0 and 0.25."),
            (["--activation-bits", "4"], "argument --activation-bits: invalid choice: 4"),
            (["--compare", "--no-quaff"], "argument --compare: expected neither --no-quaff nor --report beside it."),
            (["--compile-blocks"], "argument --compile-blocks: expected --no-quaff beside it"),
            (["--output", __file__], "is a file, expected a folder."),
            (["--step", "20"], "unrecognized arguments: --step 20"),
        ],
        ids=" ".join,
    )
    def test_a_bad_option_is_named(self, words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            finetune.parse_options(words)
        assert exit_.value.code == 2
        assert text in capsys.readouterr().err

    def test_a_model_that_is_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tmp_path.joinpath("empty").mkdir()
        assert finetune.main(options(tmp_path / "empty", tmp_path / "adapter")) == 2
        assert f"--model {tmp_path / 'empty'}: cannot be loaded." in capsys.readouterr().err

    def test_too_few_tokens(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert finetune.main(options(folder, tmp_path / "adapter", **{"max-tokens": 16})) == 2
        assert "max_tokens: is 16, and only 0 of the 64 problems asked for fit" in capsys.readouterr().err

    def test_target_modules(self) -> None:
        assert finetune.target_modules(chat_llama()) == finetune.LLAMA_PROJECTIONS
        assert finetune.target_modules(torch.nn.Linear(2, 2)) == "all-linear"


def test_comparison_table() -> None:
    results = {"eager": Measurements(2.1, 243.6, 2787.0, 2754.0, 424_673_280, 1.3431, 0.9024)}
    *_, row = comparison_table(results).splitlines()
    assert row.split() == ["eager", "2100", "244", "2787", "2754", "424,673,280", "1.3431", "0.9024"]


def test_frozen_weight_bytes_counts_what_is_under_adapters_only() -> None:
    assert frozen_weight_bytes(chat_llama()) == 0
