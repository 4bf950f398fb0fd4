"""Runs of the Trainer that are killed and resumed are bit for bit the run that nobody interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import quaff_fx
from quaff_fx.errors import CheckpointError, ConfigError, QuaffWarning
from quaff_fx.files.saved_state import SavedState
from quaff_fx.stages import Stages
from quaff_fx.weights import QuantizedWeight, owners
from tests.documentation import code_of
from tests.models import float_llama, token_ids, with_lora

FILE = "quaff_state.safetensors"
STEPS = 6
CONFIG = {
    "calibration_steps": 4,  # forwards, two to a step of the optimizer
    "smoothing": "momentum",
    "share_activations": True,
    "outlier_budget": 0.05,
    "progress": False,
}


def model(config: dict[str, Any] | None = None) -> nn.Module:
    lora = with_lora(float_llama(initializer_range=0.1), lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    lora.enable_input_require_grads()  # the first block is like the others then: one graph to compile instead of two
    return quaff_fx.compile(lora.train(), CONFIG | (config or {}))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return TrainingArguments(**(settings | options))


def rows() -> list[dict[str, Tensor]]:
    """Four steps of the optimizer make an epoch."""
    return [{"input_ids": row, "labels": row} for row in token_ids(batch=16)]


def trainer(folder: Path, of: nn.Module | None = None, **options: Any) -> Trainer:
    return Trainer(
        model=model() if of is None else of,
        args=arguments(folder, **options),
        train_dataset=rows(),
        callbacks=[quaff_fx.QuaffCallback()],
    )


# --- what the processes run ----------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_while_calibrating() -> None:
    """Between the fourth forward, the second of a step, and its backward."""
    run = Stages.run

    def run_until(stages: Stages, module: nn.Module, *call: Any) -> Any:
        result = run(stages, module, *call)
        if stages.steps == 3 and module is stages.model:
            die()
        return result

    Stages.run = run_until


def dies_while_converting() -> None:
    """When five of the fourteen weights are int8: the conversion is due when the fourth step is to be saved."""
    attach, converted = owners.attach, []

    def attach_until(module: nn.Module, states: dict[str, Any], **weights: nn.Parameter) -> None:
        attach(module, states, **weights)
        converted.extend(each for each in states.values() if isinstance(each, QuantizedWeight))
        if len(converted) == 5:
            die()

    owners.attach = attach_until


def dies_while_saving_the_state() -> None:
    """When all of it is in the temporary file."""
    replace = Path.replace

    def replace_unless(path: Path, target: Path) -> Path:
        if Path(target).parent.name == "checkpoint-4":
            die()
        return replace(path, target)

    Path.replace = replace_unless


def dies_while_saving_the_trainer_state() -> None:
    """When half of it is written, after the state."""

    def save_half(self: TrainerState, path: str) -> None:
        whole(self, path)
        if "checkpoint-5" in path:
            Path(path).write_text(Path(path).read_text()[:200])
            die()

    whole, TrainerState.save_to_json = TrainerState.save_to_json, save_half


def run(folder: Path, prepare: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # no workers that outlive this process
    torch.manual_seed(0)
    if prepare is not None:
        prepare()
    names = {"Trainer": Trainer, "quaff_fx": quaff_fx, "model": model(), "arguments": arguments(folder), "rows": rows()}
    exec(code_of("training-loops.md", "Trainer"), names)


def in_new_process(folder: Path, prepare: Callable[[], None] | None = None) -> int | None:
    """Runs until it ends or dies; returns the exit code. The server has imported everything before it forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=run, args=(folder, prepare))
    process.start()
    process.join()
    return process.exitcode


# --- killed and resumed --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run to the end that keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert in_new_process(folder) == 0
    return folder


def assert_same_checkpoint(left: Path, right: Path) -> None:
    for name in ("adapter_model.safetensors", FILE):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(folder / name, weights_only=False) for folder in (left, right)]
        for each in states:
            each.pop("numpy", None)
        torch.testing.assert_close(*states, rtol=0, atol=0)
    left_log, right_log = (json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (left, right))
    assert [entry["loss"] for entry in left_log] == [entry["loss"] for entry in right_log]
    assert len(left_log) == STEPS


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.compatibility("Training loops", "Trainer, resumed bit for bit, also after SIGKILL")
def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one(uninterrupted: Path, tmp_path: Path) -> None:
    """One checkpoint is kept, so each kill would lose the run if an older one were deleted too early."""
    deaths = [
        (dies_while_calibrating, "checkpoint-1", "observe"),
        (dies_while_converting, "checkpoint-1", "observe"),
        (dies_while_saving_the_state, "checkpoint-3", "quantize"),
        (dies_while_saving_the_trainer_state, "checkpoint-4", "quantize"),
    ]
    for prepare, last, stage in deaths:
        assert in_new_process(tmp_path, prepare) == -signal.SIGKILL, prepare.__name__
        assert quaff_fx.last_checkpoint(tmp_path) == str(tmp_path / last), prepare.__name__
        assert SavedState.read(tmp_path / last / FILE).stage == stage
    assert in_new_process(tmp_path) == 0
    assert_same_checkpoint(tmp_path / "checkpoint-6", uninterrupted / "checkpoint-6")


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, in an output folder of its own."""
    return Path(shutil.copytree(uninterrupted / "checkpoint-6", tmp_path / "checkpoint-6"))


def edit_trainer_state(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = checkpoint / "trainer_state.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def assert_refused(folder: Path, match: str, of: nn.Module | None = None) -> None:
    """Training from checkpoint-6 raises before a step; its files and the model's weights stay as they are."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = trainer(folder, of)
    with pytest.raises(CheckpointError, match=match) as caught:
        refused.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert ", expected " in str(caught.value)
    assert quaff_fx.explain(refused.model).steps == 0
    assert quaff_fx.explain(refused.model).stage == "observe"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


@pytest.mark.compile
@pytest.mark.slow
class TestRefused:
    def test_saved_without_the_callback(self, checkpoint: Path) -> None:
        edit_trainer_state(checkpoint, lambda values: values["stateful_callbacks"].pop("QuaffCallback"))
        assert_refused(checkpoint.parent, "checkpoint-6: was saved without QuaffCallback")
        assert quaff_fx.last_checkpoint(checkpoint.parent) is None

    def test_without_its_state_file(self, checkpoint: Path) -> None:
        (checkpoint / FILE).unlink()
        assert_refused(checkpoint.parent, r"checkpoint-6: has no quaff_state\.safetensors of this checkpoint")

    def test_with_the_state_file_of_another_checkpoint(self, checkpoint: Path) -> None:
        (checkpoint / FILE).write_bytes(quaff_fx.save_state(model(), checkpoint.parent).read_bytes())
        assert_refused(checkpoint.parent, r"checkpoint-6: has no quaff_state\.safetensors of this checkpoint")

    def test_with_a_truncated_file(self, checkpoint: Path) -> None:
        (checkpoint / "scheduler.pt").write_bytes((checkpoint / "scheduler.pt").read_bytes() + b"0")
        assert_refused(checkpoint.parent, r"scheduler\.pt: is not the file that was saved")
        assert quaff_fx.last_checkpoint(checkpoint.parent) is None

    def test_with_another_config(self, checkpoint: Path) -> None:
        assert_refused(checkpoint.parent, "config: momentum is 0.5, expected 0.1", model({"momentum": 0.5}))

    def test_a_model_that_is_not_compiled(self, checkpoint: Path) -> None:
        plain = with_lora(float_llama(), target_modules=["q_proj", "down_proj"])
        with pytest.raises(ConfigError, match="model: was not compiled by quaff_fx"):
            trainer(checkpoint.parent, plain).train()


@pytest.mark.compile
@pytest.mark.slow
def test_a_checkpoint_that_lies_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    resumed, args = model(), arguments(tmp_path / "output")
    begin = (args, TrainerState.load_from_json(str(checkpoint / "trainer_state.json")), TrainerControl())
    with pytest.raises(CheckpointError, match=r"tell where the checkpoint lies: QuaffCallback\(resume_from=folder\)"):
        quaff_fx.QuaffCallback().on_train_begin(*begin, model=resumed)
    assert quaff_fx.explain(resumed).stage == "observe"
    quaff_fx.QuaffCallback(resume_from=checkpoint).on_train_begin(*begin, model=resumed)
    assert quaff_fx.save_state(resumed, tmp_path).read_bytes() == (checkpoint / FILE).read_bytes()


@pytest.mark.compile
@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_with_its_smoothing_scales(checkpoint: Path, tmp_path: Path) -> None:
    best, args, callback = model(), arguments(tmp_path), quaff_fx.QuaffCallback()
    callback.on_train_begin(args, TrainerState(), TrainerControl(), model=best)
    quaff_fx.load_state(best, checkpoint)
    for module in best.modules():
        if isinstance(module, QuantizedWeight):
            module.outliers.smoothing_scale.mul_(2)
    args.load_best_model_at_end = True
    callback.on_train_end(args, TrainerState(best_model_checkpoint=str(checkpoint)), TrainerControl())
    assert quaff_fx.save_state(best, tmp_path).read_bytes() == (checkpoint / FILE).read_bytes()

    callback.on_train_begin(args, TrainerState(), TrainerControl(), model=best)
    (checkpoint / FILE).unlink()
    with pytest.warns(QuaffWarning, match="only its adapter was loaded"):
        callback.on_train_end(args, TrainerState(best_model_checkpoint=str(checkpoint)), TrainerControl())


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"torch_compile": True}, "torch_compile is True, expected none with quaff_fx: quaff_fx.compile compiles"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint is True, expected none .* in the middle of a step"),
    ],
    ids=str,
)
def test_options_that_cannot_work(tmp_path: Path, option: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        trainer(tmp_path, **option)


def began(folder: Path, step: int = 0) -> quaff_fx.QuaffCallback:
    """A callback in a training that has begun."""
    callback, trainer_state = quaff_fx.QuaffCallback(), TrainerState()
    callback.on_train_begin(arguments(folder), trainer_state, TrainerControl(), model=model())
    trainer_state.global_step = step
    return callback


def test_a_search_of_hyperparameters_cannot_be_resumed(tmp_path: Path) -> None:
    begin = (arguments(tmp_path), TrainerState(is_hyper_param_search=True), TrainerControl())
    with pytest.raises(ConfigError, match="Trainer: is searching hyperparameters"):
        quaff_fx.QuaffCallback().on_train_begin(*begin)


def test_nothing_is_written_unless_a_step_is_whole(tmp_path: Path) -> None:
    """The Trainer asks for the state of callbacks whenever it begins, after a step that failed as well."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    callback = began(tmp_path, step=1)
    assert callback.state()["attributes"]["files"] is None
    callback.on_step_begin()
    callback.state()
    assert list(folder.iterdir()) == []
    callback.on_step_end()
    assert set(callback.state()["attributes"]["files"]) == {FILE}
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_processes_that_calibrate_are_warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    callback = began(tmp_path, step=1)
    callback.on_step_end()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(QuaffWarning, match="checkpoint-1: cannot be resumed from. model: is still observed, by 2"):
        assert callback.state()["attributes"]["files"] is None


def test_last_checkpoint_of_nothing(tmp_path: Path) -> None:
    assert quaff_fx.last_checkpoint(tmp_path / "nothing") is None
    for name, content in (("checkpoint-3", "[]"), ("checkpoint-x", "{}"), ("checkpoint-4", '{"stateful_callbacks"')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(content)
    assert quaff_fx.last_checkpoint(tmp_path) is None


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "quaff_fx.trainer")
    monkeypatch.delattr(quaff_fx, "trainer", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"quaff_fx\.QuaffCallback: needs transformers, which cannot be imported"):
        _ = quaff_fx.QuaffCallback
    with pytest.raises(AttributeError, match="has no attribute 'Callback'"):
        _ = quaff_fx.Callback
