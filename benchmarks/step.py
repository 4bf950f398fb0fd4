"""A LoRA training step of quaff_fx beside other systems: time, memory, start-up and loss.

    python benchmarks/step.py                                  # two Llama blocks of a 1B model, 1 x 512 tokens
    python benchmarks/step.py --shape smollm2 --batch-size 4
    python benchmarks/step.py --systems float32 quaff_fx --profile "quaff_fx, 8 bits"

Each system runs in a process of its own, so peak memory is its own, and all take turns, so a change of the machine's
clock or load meets all alike. A step is forward, backward and AdamW on the adapters (r = 16 on all linears of the
blocks); no KV cache, the loss counts all tokens. Writes the table as CSV, and as a chart if matplotlib is there, into
runs/. Start-up counts from the float model to the end of the first real step: calibration, conversion and compilation
with empty caches.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):
    # What peers log at import and in every step would break the progress bar; not so where a test imports this file.
    logging.disable(logging.WARNING)

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import peers  # noqa: E402
from benchmarks.roofline import rooflines  # noqa: E402
from benchmarks.step_results import Record, footer, printed_table, table_rows, write_chart, write_csv  # noqa: E402
from benchmarks.step_worker import WHOLE, Failed, Worker  # noqa: E402
from workloads import smollm2  # noqa: E402


def measure(options: argparse.Namespace) -> tuple[list[Record], dict[str, str], dict[str, str]]:
    """Starts the systems one after another, then lets them take turns.

    Returns a record per system, the reason for each that is missing, and profiles by name.
    """
    records: list[Record] = []
    missing: dict[str, str] = {}
    profiles: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    systems = selected_systems(options)
    with contextlib.ExitStack() as stack:
        # The whole of the work is unknown: compiling takes seconds or minutes.
        bar = stack.enter_context(tqdm(total=len(systems) * (1 + options.rounds), unit="turn"))
        for system in systems:
            bar.set_description(f"Starting {system.name}")
            worker = Worker(system, options)
            stack.callback(worker.close)
            answer = worker.receive()
            if isinstance(answer, Failed):
                missing[system.name] = answer.reason
                bar.total -= options.rounds
            else:
                records.append(Record(system, answer))
                workers[system.name] = worker
            bar.update()
        for turn in range(options.rounds):
            # Each round starts with another system, so none is always behind the same one.
            first = turn % max(1, len(records))
            for record in records[first:] + records[:first]:
                bar.set_description(f"Round {turn + 1}, {record.system.name}")
                answer = workers[record.system.name].ask("turn", options.steps)
                if isinstance(answer, Failed):
                    missing[record.system.name] = answer.reason
                else:
                    record.turns.append(answer)
                bar.update()
            records = [record for record in records if record.system.name not in missing]
        for record in records:
            if record.system.name in options.profile:
                profiles[record.system.name] = workers[record.system.name].ask("profile", options.steps)
    return records, missing, profiles


def selected_systems(options: argparse.Namespace) -> list[peers.System]:
    """All, or those with one of the words in their name; a word that is a whole name means that system alone."""
    names = [system.name for system in peers.SYSTEMS]
    wanted = {
        name
        for word in options.systems or names
        for name in ([word] if word in names else [name for name in names if word in name])
    }
    return [system for system in peers.SYSTEMS if system.name in wanted]


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=("llama-1b", "smollm2", *WHOLE, "tiny"), default="llama-1b", help="(default: %(default)s)")
    add("--layers", type=int, default=2, help="blocks of llama-1b and tiny (default: %(default)s)")
    add("--batch-size", type=int, default=1, help="(default: %(default)s)")
    add("--tokens", type=int, default=512, help="in a sequence (default: %(default)s)")
    add("--rounds", type=int, default=5, help="turns of each system (default: %(default)s)")
    add("--steps", type=int, default=2, help="steps in a turn (default: %(default)s)")
    add("--systems", nargs="+", metavar="WORDS", help="only those with one of these in their name, or these")
    add("--profile", nargs="+", metavar="NAME", default=[], help="print the ops of these systems after the table")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--output", type=Path, default=ROOT / "runs", help="folder for CSV and chart (default: runs/)")
    add(
        "--keep-cache", action="store_true", help="compile into the usual cache: a faster start, which then says little"
    )
    add("--verbose", action="store_true", help="print where a system failed")
    options = parser.parse_args(arguments)
    for name in ("layers", "batch_size", "tokens", "rounds", "steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: is {value}, expected at least 1.")
    if not selected_systems(options):
        names = ", ".join(repr(system.name) for system in peers.SYSTEMS)
        parser.error(f"argument --systems: {' '.join(options.systems)} matches none, expected part of one of {names}.")
    for name in options.profile:
        if name not in [system.name for system in selected_systems(options)]:
            parser.error(f"argument --profile: {name!r} is not measured, expected the whole name of a system.")
    return options


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    if options.shape == "smollm2":
        smollm2.fetch_smollm2()  # here, where its progress shows, and not in each worker
    records, missing, profiles = measure(options)
    if not records:
        print("\n".join(f"Not run: {name}: {reason}" for name, reason in missing.items()))
        return 1
    rows = table_rows(records, options.batch_size * options.tokens)
    roofs = rooflines({record.system.activation_max for record in records}, records[0].started.linears, options)
    text = f"{printed_table(rows)}\n\n{footer(records, missing, roofs, options)}"
    print(f"\n{text}")
    for name, profile in profiles.items():
        print(f"\n{name}, {profile}")
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"step-{options.shape}-{options.batch_size}x{options.tokens}"
    write_csv(rows, stem.with_suffix(".csv"))
    title = f"LoRA training step, {options.shape}, {options.batch_size} × {options.tokens} tokens"
    reason = write_chart(rows, title, stem.with_suffix(".png"))
    print(f"\nWritten: {stem}.csv{f'; {reason}' if reason else ' and .png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
