"""Training that is killed at random times and resumed, again and again, beside training that nobody interrupted."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from transformers import Trainer

import quaff_fx
from tests.documentation import code_of
from tests.test_trainer import FILE, arguments, model, rows

STEPS = 12
_SAVE_SECONDS = 0.3
"""Kills that are meant for a save come this long after its folder has appeared, or earlier."""


@dataclass
class Counts:
    """How often training was killed, and how many runs then did not end as the uninterrupted one.

    Attributes:
        cases: kills. runs: runs that were killed and brought to their end. wrong: of these, those that were refused,
            failed, or ended in another way. examples: what was different, one per kind.
    """

    cases: int = 0
    runs: int = 0
    wrong: int = 0
    examples: dict[str, str] = field(default_factory=dict)


def train(folder: Path) -> None:
    """The loop of docs/training-loops.md, from the last checkpoint on, with a save after each step."""
    log = os.open(_log(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # no workers that outlive this process
    torch.manual_seed(0)
    settings = arguments(folder, max_steps=STEPS)
    names = {"Trainer": Trainer, "quaff_fx": quaff_fx, "model": model(), "arguments": settings, "rows": rows()}
    exec(code_of("training-loops.md", "Trainer"), names)


def run(kills: int, seed: int = 0) -> Counts:
    """Kills training `kills` times with SIGKILL, half of them while it saves; every run is brought to its end."""
    draw, counts = random.Random(seed), Counts()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def started(folder: Path) -> BaseProcess:
        process = context.Process(target=train, args=(folder,))
        process.start()
        return process

    with tempfile.TemporaryDirectory() as name:
        uninterrupted, folder = Path(name) / "uninterrupted", Path(name) / "killed"
        begin = time.monotonic()
        process = started(uninterrupted)
        process.join()
        seconds = time.monotonic() - begin
        if process.exitcode != 0:
            raise RuntimeError(
                f"training: ended with {process.exitcode} ({_last_line(uninterrupted)}) before anything was killed, "
                "expected 0. Mend training first."
            )
        while counts.cases < kills or folder.exists():
            process = started(folder)
            if counts.cases < kills:
                _wait(process, folder, draw, seconds)
            else:
                process.join()
            is_over = not process.is_alive()
            with contextlib.suppress(ProcessLookupError):  # it may end right now
                if not is_over:
                    os.kill(process.pid, signal.SIGKILL)
            process.join()
            if process.exitcode == -signal.SIGKILL:
                if is_over:
                    raise RuntimeError("training: was killed by another, expected memory enough for it. Free some.")
                counts.cases += 1
                continue
            counts.runs += 1
            problem = _last_line(folder) if process.exitcode else _difference(folder, uninterrupted)
            if problem:
                counts.wrong += 1
                counts.examples.setdefault(problem, f"seed {seed}, after {counts.cases} kills")
            shutil.rmtree(folder, ignore_errors=True)
            _log(folder).unlink(missing_ok=True)
    return counts


def _wait(process: BaseProcess, folder: Path, draw: random.Random, seconds: float) -> None:
    """Returns at a random time of the run, or of its next save."""
    limit = draw.uniform(0, seconds)
    if draw.random() < 0.5:
        process.join(limit)
        return
    before = _checkpoints(folder)
    while process.is_alive() and _checkpoints(folder) <= before:
        time.sleep(0.001)
    process.join(draw.uniform(0, _SAVE_SECONDS))


def _log(folder: Path) -> Path:
    """What processes have printed that train in `folder`."""
    return folder.with_suffix(".log")


def _last_line(folder: Path) -> str:
    lines = _log(folder).read_text(errors="replace").split("\n") if _log(folder).exists() else []
    return next((line for line in reversed(lines) if line.strip()), "nothing was printed")


def _checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _difference(folder: Path, uninterrupted: Path) -> str:
    """What is different in the last checkpoints, empty if nothing is."""
    left, right = (each / f"checkpoint-{STEPS}" for each in (folder, uninterrupted))
    if quaff_fx.last_checkpoint(folder) != str(left):
        return "the last checkpoint is not whole"
    for name in ("adapter_model.safetensors", FILE):
        if (left / name).read_bytes() != (right / name).read_bytes():
            return f"{name} differs"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(each / name, weights_only=False) for each in (left, right)]
        for each in states:
            each.pop("numpy", None)
        try:
            torch.testing.assert_close(*states, rtol=0, atol=0)
        except AssertionError:
            return f"{name} differs"
    logs = [json.loads((each / "trainer_state.json").read_text())["log_history"] for each in (left, right)]
    losses = [[entry.get("loss") for entry in log] for log in logs]
    return "" if losses[0] == losses[1] and len(losses[0]) == STEPS else "losses differ"
