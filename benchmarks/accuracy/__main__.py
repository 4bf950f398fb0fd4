"""As good as full precision? Fine-tuning on frozen weights in int8 beside float32 and other ways of quantizing.

    python -m benchmarks.accuracy                               # SmolLM2-135M, a few hours on two cores
    python -m benchmarks.accuracy --seeds 0 1 2 3               # one more, beside those that are there
    python -m benchmarks.accuracy --methods quaff_fx "plain W8A8" --stages before --eager
    python -m benchmarks.accuracy --ablations                   # what each choice in the default is worth
    python -m benchmarks.accuracy --model my/model --output runs/my-model

Everything is compared with float32 in pairs: the same held-out problem, window or question, the same first values of
the adapter, the same training problems. Nothing that is measured was trained or calibrated on.

    before     fine-tuning: held-out word problems, Shakespeare, MMLU's example questions, the gradient of the adapters
    after      LoRA fine-tuning on word problems
    injected   outliers that change nothing in float32, at the fewest bits
    adapters   prompt tuning, P-tuning and IA³ beside LoRA

A seed is that of the adapter, of the calibration and training problems, and of the channels that get outliers.

Each result is stored at once. The same command, started again, goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    logging.disable(logging.WARNING)  # what libraries log and warn of would break the progress bar
    warnings.simplefilter("ignore", FutureWarning)

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.accuracy.bench import (
    INJECTED_FACTORS,
    STAGES,
    TASKS,
    Bench,
    methods_of,
    planned,
    sizes,
    stored,
)
from benchmarks.accuracy.methods import ABLATIONS, ADAPTERS, METHODS
from benchmarks.accuracy.results import (
    Results,
    SettingsError,
    Store,
    rows,
    table,
    write_charts,
    write_csv,
)
from workloads import smollm2

ROOT = Path(__file__).resolve().parents[2]

COLUMNS: dict[str, dict[str, tuple[str, str, str]]] = {
    "Before fine-tuning": {
        "word problems,\nΔ loss": ("before", "words", "Δ loss"),
        "Shakespeare,\nΔ loss": ("before", "shakespeare", "Δ loss"),
        "MMLU,\naccuracy": ("before", "choices", "correct"),
        "MMLU,\nsame choice": ("before", "choices", "agreement"),
        "MMLU,\nΔ loss": ("before", "choices", "Δ loss"),
        "gradient\ncosine": ("before", "gradient", "cosine"),
    },
    "After fine-tuning with LoRA": {
        "word problems,\nΔ loss": ("after", "words", "Δ loss"),
        "Shakespeare,\nΔ loss": ("after", "shakespeare", "Δ loss"),
        "MMLU,\naccuracy": ("after", "choices", "correct"),
        "MMLU,\nsame choice": ("after", "choices", "agreement"),
        "MMLU,\nΔ loss": ("after", "choices", "Δ loss"),
        "training loss,\ndistance": ("after", "training", "distance of loss"),
        "right\nanswers": ("after", "answers", "correct"),
    },
    "Injected outliers, before fine-tuning: word problems": {
        f"× {factor},\nadded loss": (f"injected {factor}", "words", "added loss") for factor in INJECTED_FACTORS
    },
    "Adapters: word problems": {
        "loss before": ("before", "words", "loss"),
        "loss after": ("after", "words", "loss"),
        "Δ loss after": ("after", "words", "Δ loss"),
    },
}


def measure_all(options: argparse.Namespace, store: Store) -> tuple[Results, dict[str, str]]:
    """Returns all results, stored ones and new ones, and the reason for each row that is missing."""
    groups = stored(options, store) if options.report else planned(options)
    known = {cell: store.load(cell, group.method.config) for group in groups for cell in group.cells}
    found: Results = {cell: measures for cell, measures in known.items() if measures is not None}
    reasons: dict[str, str] = {}
    if options.report:
        return found, reasons
    with tqdm(total=len(known), initial=len(found), unit="result") as bar:
        bench = Bench(options) if len(found) < len(known) else None
        for group in groups:
            missing = {cell for cell in group.cells if cell not in found}
            if not missing:
                continue
            first = group.cells[0]
            bar.set_description(f"{first.method}, {first.bits} bits, {first.adapter}, seed {first.seed}, {first.stage}")
            reason = group.method.reason_missing()
            if reason is None:
                assert bench is not None
                try:
                    for cell, measures in bench.measure(group, missing):
                        store.save(cell, group.method.config, measures)
                        found[cell] = measures
                        bar.update()
                except Exception as error:
                    if options.stop_at_errors:
                        raise
                    reason = f"{type(error).__name__}: {error}"
            if reason is not None:
                reasons[f"{first.method}, {first.bits} bits, {first.adapter}, {first.stage}"] = reason
    return {cell: found[cell] for cell in known if cell in found}, reasons


def report(results: Results, reasons: dict[str, str], options: argparse.Namespace) -> None:
    """Prints the tables and writes CSV and charts."""
    found = rows(results)
    for title, columns in COLUMNS.items():
        is_of_adapters = title.startswith("Adapters")
        if is_of_adapters and {cell.adapter for cell in results} <= {"LoRA"}:
            continue
        shown = [row for row in found if not is_of_adapters or row.method in adapted_names()]
        if text := table(shown, columns, list(ADAPTERS) if is_of_adapters else ["LoRA"]):
            print(f"\n{title}\n\n{text}")
    seeds = " ".join(str(seed) for seed in sorted({cell.seed for cell in results}))
    problems = f"{options.words} {'validation' if options.ablations else 'held-out'} problems"
    print(
        f"\n{options.model}: {problems}, {options.windows} windows of Shakespeare, "
        f"{options.choices} questions; {options.steps} steps of {options.batch_size} × {options.max_tokens} tokens; "
        f"seeds {seeds}.\nΔ: mean of the paired differences to float32 ± standard error; the row of float32 has its "
        "loss.\nIn brackets the lowest and highest seed. * The 95 % interval, over windows and seeds, excludes zero."
    )
    for name, reason in reasons.items():
        print(f"Not run: {name}: {reason}")
    write_csv(found, options.output / "accuracy.csv")
    charts = write_charts(results, found, f"{options.model}, LoRA", options.output)
    print(f"\nWritten: {options.output / 'accuracy.csv'}; {charts}")


def adapted_names() -> set[str]:
    return {method.name for method in METHODS if method.is_adapted}


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default="smollm2", help="folder or model id (default: SmolLM2-135M-Instruct, from a wheel)")
    add("--methods", nargs="+", metavar="WORDS", help="those with one of these in their name, and float32")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="(default: all)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="everything once for each (default: 0 1 2)")
    add("--steps", type=int, default=24, help="of fine-tuning (default: %(default)s)")
    add("--batch-size", type=int, default=2, help="problems in a step (default: %(default)s)")
    add("--max-tokens", type=int, default=192, help="in a problem or window (default: %(default)s)")
    add("--words", type=int, default=24, help="held-out word problems (default: %(default)s)")
    add("--windows", type=int, default=24, help="windows of Shakespeare (default: %(default)s)")
    add("--choices", type=int, default=96, help="questions of MMLU (default: %(default)s)")
    add("--answers", type=int, default=0, help="held-out word problems to answer after training; slow (default: none)")
    add("--eager", action="store_true", help="run quaff_fx without compiling its int8 blocks: the same numbers")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--output", type=Path, default=ROOT / "runs" / "accuracy", help="folder for results (default: runs/accuracy)")
    add(
        "--ablations",
        action="store_true",
        help=f"{len(ABLATIONS) - 1} forms of Quaff's linear, emulated; word problems are not the held-out ones",
    )
    add("--report", action="store_true", help="measure nothing; the tables of all that the folder holds, of any method")
    add("--stop-at-errors", action="store_true", help="fail where a method fails, instead of going on with the next")
    if "--ablations" in arguments:
        folder = ROOT / "runs" / "ablations"
        parser.set_defaults(stages=["before"], tasks=["gradient"], output=folder)
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "max_tokens", "words", "windows", "choices", "answers", "threads"):
        value, least = getattr(options, name), 0 if name == "answers" else 1
        if value is not None and value < least:
            parser.error(f"argument --{name.replace('_', '-')}: is {value}, expected at least {least}.")
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        parser.error(f"argument --seeds: is {options.seeds}, expected different numbers of 0 or more.")
    for word in options.methods or []:
        if not any(word in method.name for method in methods_of(options)):
            names = ", ".join(repr(method.name) for method in methods_of(options))
            parser.error(f"argument --methods: {word!r} matches none, expected part of one of {names}.")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"argument --output: {options.output} is a file, expected a folder. Name another.")
    return options


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    disable_progress_bar()  # loading takes a second, and its bar would stand beside the one that matters
    settings = {"model": options.model, "eager": options.eager, **asdict(sizes(options))}
    if options.ablations:
        settings["ablations"] = True
    try:
        results, reasons = measure_all(options, Store(options.output, settings))
    except (SettingsError, smollm2.DownloadError) as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. {options.output} keeps what is finished; the same command goes on.", file=sys.stderr)
        return 130
    report(results, reasons, options)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
