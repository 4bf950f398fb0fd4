"""Everything that is to be measured on a CUDA card, in one command of less than four minutes.

    python -m benchmarks.card                              # all, into runs/cuda/
    python -m benchmarks.card --parts steps --shapes 8b    # one shape
    python -m benchmarks.card --dry-run                    # every line of it on a CPU, in tiny sizes, not compiled

First all systems compile, in processes of their own and as many at once as the machine has room for; then each takes
its steps alone, the others waiting. What hangs, crashes or has no time left is listed, and the rest goes on. The report
is written after every result, so an interrupt leaves what is there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.card import plan, report, targets
from benchmarks.card.children import ROOT, Budget, Job, Pool, worker_command

PARTS = ("steps", "products", "checks")

PREPARED_SHARE = 0.62
"""Of the budget, until all systems that will be timed must have compiled."""

STAGES_OF_A_STEP = 4

ROOM_SHARE = 0.92
"""Of the card's memory that systems may take while they prepare at once."""


class Benchmark:
    """The processes of a run, and what came of them until now."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = targets.Results()
        self.pool = Pool(Budget(options.budget), self._take, self._miss)
        self.pairs: dict[Job, plan.Pair] = {}

    def run(self) -> None:
        """Prepares, measures, checks: what matters most first, and nothing beside what is timed."""
        steps = self._step_jobs() if "steps" in self.options.parts else []
        checks = self._check_jobs() if "checks" in self.options.parts else []
        products = self._products_jobs() if "products" in self.options.parts else []
        cold = [job for job in steps if self.pairs[job].is_cold]
        others = [job for job in steps if job not in cold]
        together = {"at_once": self.options.cores, "seconds": self.options.timeout}
        # Nothing is compiled there, so what takes long hangs.
        alone = {"at_once": 1, "seconds": self.options.timeout / 3}

        self.pool.advance([*products, *cold], **together)
        self._say("Products; meanwhile others start, on the CPU alone")
        self.pool.advance([*products, *others, *checks], **together, share=PREPARED_SHARE)
        self._say("Compiling with empty caches")
        self.pool.advance(cold, at_once=2, seconds=self.options.timeout, share=PREPARED_SHARE)
        self._say("Compiling the others")
        self.pool.advance(others, **together, share=PREPARED_SHARE, room=self._room())
        self._say("Timing, one after another")
        self.pool.advance(steps, **alone)
        self._say("Profiling, one after another")  # after all times: it may slow a process down
        first = [job for job in steps if self.pairs[job].has_profile]
        self.pool.advance(first, **alone)
        self.pool.close(first)
        self._say("Checks")
        self.pool.advance(checks, **together, room=self._room())
        self._say("Profiling the others")
        self.pool.advance(others, **alone)
        self.pool.close(others)
        self._again_alone([job for job in steps if (job.reason or "").startswith("out of memory")])

    def _again_alone(self, jobs: Sequence[Job]) -> None:
        """Tries once more what found no memory beside the others, from the start."""
        for job in jobs:
            again = self._step_job(replace(self.pairs[job], is_cold=False))  # its caches are not empty any more
            self.results.missing.pop(job.name, None)
            for _ in range(STAGES_OF_A_STEP):
                self.pool.advance([again], at_once=1, seconds=self.options.timeout)
            self.pool.close([again])

    def close(self) -> None:
        self.pool.close()
        report.write(self.results, self.options.output)

    def _step_jobs(self) -> list[Job]:
        jobs = []
        for pair in plan.selected(self.options.shapes, self.options.dry_run):
            if reason := plan.reason_missing(pair.system):
                self.results.missing[pair.name] = reason
            else:
                jobs.append(self._step_job(pair))
        return jobs

    def _step_job(self, pair: plan.Pair) -> Job:
        arguments = {
            "shape": asdict(pair.shape),
            "system": pair.system,
            "rounds": self.options.rounds,
            "has_profile": pair.has_profile,
            "is_eager": self.options.dry_run,
        }
        # A cold pair has a folder of its own, which must be new.
        job = self._job("step", pair.name, arguments, own_cache=pair.is_cold)
        job.gib = pair.shape.gib
        self.pairs[job] = pair
        return job

    def _check_jobs(self) -> list[Job]:
        """As many processes as there are cores, each with some of the checks."""
        words = self.options.checks or plan.CHECKS
        names = [name for name in plan.CHECKS if any(word in name for word in words)]
        groups = [names[first :: self.options.cores] for first in range(min(self.options.cores, len(names)))]
        return [
            self._job("checks", f"checks {', '.join(group)}", {"names": group, "is_eager": self.options.dry_run})
            for group in groups
        ]

    def _products_jobs(self) -> list[Job]:
        tiny = self.options.dry_run
        return [self._job("products", "products", {"repeats": 2 if tiny else 20, "is_tiny": tiny})]

    def _job(self, kind: str, name: str, arguments: dict[str, Any], own_cache: bool = False) -> Job:
        word = "".join(letter if letter.isalnum() else "-" for letter in name)[:80]
        log = self.options.output / "logs" / f"{word}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        if self.options.dry_run:
            one_thread = {"OMP_NUM_THREADS": "1"}
            return Job(name, worker_command(kind, {**arguments, "device": "cpu"}), log, environment=one_thread)
        cache = self.options.cache / (word if own_cache else "shared")
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            # Each of many processes would start a compile worker, and a thread, for every core.
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(2, self.options.cores // 2) if own_cache else 2),
            "OMP_NUM_THREADS": str(max(1, self.options.cores // 8)),
        }
        return Job(name, worker_command(kind, {**arguments, "device": "cuda"}), log, 1.0, environment)

    def _room(self) -> float:
        """GiB of the card that systems may take; without a card, or before its first answer, as much as they want."""
        card: float = self.results.machine.get("card_gib", 0.0)
        return card * ROOM_SHARE or float("inf")

    def _take(self, job: Job, answer: dict[str, Any]) -> None:
        """Files an answer where it belongs, prints it and writes the report."""
        machine = {name: answer.pop(name) for name in ("card", "card_gib", "versions") if name in answer}
        self.results.machine |= machine
        name = job.name
        if "check" in answer:
            name = answer.pop("check")
            self.results.checks[name] = answer
        elif "what" in answer:
            self.results.products.append(answer)
        elif job in self.pairs and answer:
            pair = self.pairs[job]
            step = self.results.steps.setdefault(pair.name, {"shape": pair.shape.name, "system": pair.system})
            step |= answer
            if pair.is_cold and "first_step_s" in answer:
                step["cold_s"] = answer["first_step_s"]
        else:
            if answer.get("end"):
                self.pool.close([job])
            return
        figures = {name: value for name, value in answer.items() if name not in ("kernels", "parts")}
        words = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        ]
        self._say(f"{name}: {', '.join(words)}")
        report.write(self.results, self.options.output)

    def _miss(self, job: Job) -> None:
        self.results.missing[job.name] = job.reason or ""
        self._say(f"{job.name}: not run to its end: {job.reason}")
        report.write(self.results, self.options.output)

    def _say(self, text: str) -> None:
        print(f"[{self.pool.budget.used():5.0f} s] {text}", flush=True)


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    add("--shapes", nargs="+", choices=plan.SHAPES, default=list(plan.SHAPES), help="of the steps (default: all)")
    add("--checks", nargs="+", metavar="WORDS", help="only checks with one of these in their name")
    add("--output", type=Path, default=ROOT / "runs" / "cuda", help="folder of the report (default: runs/cuda/)")
    add("--budget", type=float, default=235, help="seconds for all of it (default: %(default)s)")
    add(
        "--timeout",
        type=float,
        default=75,
        help="seconds for a process to compile, or for one check (default: %(default)s)",
    )
    add("--rounds", type=int, default=12, help="timed steps of each system (default: %(default)s)")
    add("--cores", type=int, default=len(os.sched_getaffinity(0)), help="processes at once (default: %(default)s)")
    add("--dry-run", action="store_true", help="on the CPU, tiny, not compiled: shows that it runs, measures nothing")
    options = parser.parse_args(words)
    for name in ("budget", "timeout", "rounds", "cores"):
        if getattr(options, name) <= 0:
            parser.error(f"argument --{name}: is {getattr(options, name)}, expected more than 0.")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was run and every check passed, 1 if not, 130 if it was interrupted."""
    options = parse_options(words)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the time limit of a scheduler, like Ctrl-C
    code = 0
    with tempfile.TemporaryDirectory(prefix="quaff-cuda-", ignore_cleanup_errors=True) as folder:
        options.cache = Path(folder)
        benchmark = Benchmark(options)
        try:
            benchmark.run()
        except KeyboardInterrupt:
            code = 130
        finally:
            benchmark.close()
            signal.signal(signal.SIGTERM, before)
    results = benchmark.results
    if options.dry_run:
        print("\nA dry run: the code works, its figures mean nothing.")
    print(f"\nOn {results.machine.get('card', 'no card')}\n\n{report.table(targets.rows(results))}\n")
    for name, reason in results.missing.items():
        print(f"Not run to its end: {name}: {reason}")
    print(f"Written: {options.output / 'cuda.md'} and cuda.json, {benchmark.pool.budget.used():.0f} s")
    failed = any(check["status"] == "failed" for check in results.checks.values())
    return code or int(failed or bool(results.missing))


if __name__ == "__main__":
    sys.exit(main())
