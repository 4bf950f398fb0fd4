"""Processes that do their work in stages, and what happens to one that hangs, crashes or has no time left."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

HELD_SHARE = 0.45
"""Of a job's memory while it waits between two stages: weights, without the activations of a step."""


class Budget:
    """Seconds for the whole command."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begin = time.monotonic()

    def used(self) -> float:
        return time.monotonic() - self._begin

    def left(self) -> float:
        return self.seconds - self.used()


@dataclass(eq=False)
class Job:
    """A process of `command`, which is not started yet.

    It answers with one JSON object in a line: first when it has started, then each time that a line tells it to go on.
    An answer with ``"more": true`` is followed by others of the same stage.

    Attributes:
        gib: of the card's memory it takes in a stage but the first. log: where its other output goes.
        reason: why it ended, None while it has not; "" if it came to its end.
    """

    name: str
    command: Sequence[str]
    log: Path
    gib: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None
    process: subprocess.Popen[str] | None = None
    stages: int = 0

    def go_on(self, events: queue.Queue[tuple[Job, Any]]) -> None:
        """Starts the process, or tells it to begin its next stage; what it answers goes into `events`."""
        self.stages += 1
        if self.process is not None:
            assert self.process.stdin is not None
            try:
                self.process.stdin.write("\n")
                self.process.stdin.flush()
            except (BrokenPipeError, ValueError):
                return  # it has ended, which `events` tells
            return
        with self.log.open("w") as log:
            # A session of its own: what it has started ends with it, and Ctrl-C reaches it through here alone.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                cwd=ROOT,
                env={**os.environ, **self.environment},
            )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.Queue[tuple[Job, Any]]) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for line in answers:
                events.put((self, json.loads(line)))
        with contextlib.suppress(BrokenPipeError):  # it may have ended before it was told to go on
            self.process.stdin.close()
        events.put((self, None))

    def end(self, reason: str) -> None:
        """Ends the process and all it has started."""
        if self.reason is None:
            self.reason = reason
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def reason_ended(self) -> str:
        """Why its output ended; empty if it came to its end."""
        assert self.process is not None
        code = self.process.wait()
        if code == 0:
            return ""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"its process ended with exit code {code}" + (f": {lines[-1].strip()[:200]}" if lines else "")


class Pool:
    """Leads jobs through their stages; each answer goes to `on_answer`, each end with a reason to `on_end`."""

    def __init__(
        self, budget: Budget, on_answer: Callable[[Job, dict[str, Any]], None], on_end: Callable[[Job], None]
    ) -> None:
        self.budget = budget
        self.on_answer, self.on_end = on_answer, on_end
        self._events: queue.Queue[tuple[Job, Any]] = queue.Queue()
        self._jobs: list[Job] = []

    def advance(
        self,
        jobs: Sequence[Job],
        *,
        at_once: int,
        seconds: float,
        share: float = 1.0,
        room: float = math.inf,
    ) -> None:
        """Leads each of the jobs that have not ended through its next stage.

        Args:
            at_once: how many run at the same time. seconds: for each answer of one; who takes longer is ended.
            share: of the budget that may be used up at the end of this; who is not ready then is ended.
            room: GiB of the card for all together; one alone may take more.
        """
        self._jobs += [job for job in jobs if job not in self._jobs]
        waiting = [job for job in jobs if job.reason is None]
        running: dict[Job, float] = {}
        while waiting or running:
            left = self.budget.seconds * share - self.budget.used()
            if left <= 0:
                for job in [*waiting, *running]:
                    done = "was not ready" if job in running else "was not begun"
                    self._end(job, f"{done} when {self.budget.used():.0f} s of {self.budget.seconds:.0f} s were used")
                return
            for job in list(waiting):
                fits = self._gib(running) + job.gib * (job.stages > 0) <= room
                if len(running) < at_once and (fits or not running):
                    waiting.remove(job)
                    job.go_on(self._events)
                    running[job] = time.monotonic() + seconds
            try:
                pause = min([left, *(deadline - time.monotonic() for deadline in running.values())])
                job, answer = self._events.get(timeout=max(0.0, pause))
            except queue.Empty:
                for job in [job for job, deadline in running.items() if deadline <= time.monotonic()]:
                    del running[job]
                    self._end(job, f"gave no answer within {seconds:.0f} s")
                continue
            if job.reason is not None:
                continue
            if answer is None or "failed" in answer:
                running.pop(job, None)
                waiting = [other for other in waiting if other is not job]
                self._end(job, job.reason_ended() if answer is None else answer["failed"])
                continue
            if answer.pop("more", False):
                running[job] = time.monotonic() + seconds
            else:
                running.pop(job, None)
            self.on_answer(job, answer)

    def _gib(self, running: Mapping[Job, float]) -> float:
        """What the jobs take now; one that has only started has not touched the card."""
        alive = [job for job in self._jobs if job.reason is None and job.stages > 1]
        return sum(job.gib * (1 if job in running else HELD_SHARE) for job in alive)

    def _end(self, job: Job, reason: str) -> None:
        job.end(reason)
        if reason:
            self.on_end(job)

    def close(self, jobs: Sequence[Job] | None = None) -> None:
        """Ends these jobs, or all."""
        for job in list(self._jobs if jobs is None else jobs):
            job.end("")


def worker_command(kind: str, arguments: Mapping[str, Any]) -> list[str]:
    """Returns what runs `worker.py`."""
    return [sys.executable, "-m", "benchmarks.card.worker", kind, json.dumps(arguments)]
