"""How often quaff_fx can be brought to give something wrong: in its kernels, its files, its training that is cut off.

``python benchmarks/reliability.py`` attacks four things and prints one row for each. A case is wrong if its result is
another than that of an independent reference, or of the run that nobody disturbed; nothing may be. The cases are drawn
from a seed, so a row can be had again, but for the kills, which come at times of a clock.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """What came of an attack.

    Attributes:
        cases: how many there were; None if it could not be made. wrong: how many gave something wrong.
        how: what a case is, or why there is none. examples: what was wrong.
    """

    name: str
    cases: int | None
    wrong: int | None
    how: str
    examples: tuple[str, ...] = ()


def kernels(cases: int, seed: int) -> Row:
    """Int8 products and quantizers of random shapes and values beside the reference."""
    how = "random shapes, values and layouts, compared with the reference bit for bit"
    counts = _module("tests.kernels.fuzz").run(cases=cases, seed=seed)
    return Row("kernels", counts.cases, counts.wrong, how, _examples(counts))


def malformed_files(cases: int, seed: int) -> Row:
    """Files and states with bits flipped, parts cut off, fields changed, tensors exchanged."""
    found = _module("tests.malformed").run(cases, seed)
    total, refused, equal = (sum(getattr(each, n) for each in found.values()) for n in ("cases", "refused", "equal"))
    how = (
        f"state files and dicts, safetensors headers, indices, trainer_state.json: {refused} refused with a QuaffError "
        f"or passed over for an older checkpoint, {equal} read as before"
    )
    examples = tuple(example for each in found.values() for example in _examples(each))
    return Row("malformed files", total, sum(each.wrong for each in found.values()), how, examples)


def kills(cases: int, seed: int) -> Row:
    """Training that is killed and resumed."""
    counts = _module("tests.kills").run(cases, seed)
    how = f"SIGKILL at random, half of them while it saves: {counts.runs} runs resumed to their end, equal bit for bit"
    return Row("kills", counts.cases, counts.wrong, how, _examples(counts))


def interrupts(cases: int, seed: int) -> Row:
    """Ctrl-C at every step of a calibration and conversion."""
    counts = _module("tests.interrupts").run()
    how = "Ctrl-C at every step of calibration and conversion, then the run goes on, equal bit for bit"
    return Row("interrupts", counts.cases, counts.wrong, how, _examples(counts))


ATTACKS: dict[str, tuple[Callable[[int, int], Row], int]] = {
    "kernels": (kernels, 2000),
    "malformed": (malformed_files, 4000),
    "kills": (kills, 20),
    "interrupts": (interrupts, 0),
}
"""What can be attacked and how often it is unless it is said; `interrupts` has a number of its own."""


class MissingError(Exception):
    """Code of the tests that an attack needs is not there."""


def _module(name: str) -> Any:
    """A module of the tests; they lie in the checkout only."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingError(
            f"{name}: cannot be imported ({error}), expected the checkout with the test extra. "
            "Install it with pip install -e '.[test]'."
        ) from error


def _examples(counts: Any) -> tuple[str, ...]:
    found = getattr(counts, "examples", None) or {}
    return tuple(f"{what} ({where})" for what, where in found.items()) if isinstance(found, dict) else tuple(found)


def row(name: str, cases: int | None, seed: int) -> Row:
    """Makes one attack; where it cannot be made its row says so."""
    attack, usual = ATTACKS[name]
    try:
        return attack(usual if cases is None else cases, seed)
    except MissingError as error:
        return Row(name, None, None, str(error))


def table(rows: list[Row]) -> str:
    """The rows as text."""
    cells = [
        (each.name, *("–" if n is None else f"{n:,}" for n in (each.cases, each.wrong)), each.how) for each in rows
    ]
    headers = ("what was attacked", "cases", "wrong", "how")
    return tabulate(
        cells, headers, tablefmt="github", colalign=("left", "right", "right", "left"), disable_numparse=True
    )


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ", ".join(f"{name} {cases}" for name, (_, cases) in ATTACKS.items() if cases)
    parser.add_argument("--cases", type=int, help=f"of each attack (default: {usual})")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, metavar="NAME", help=f"some of {', '.join(ATTACKS)}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    if options.cases is not None and options.cases < 1:
        parser.error(f"--cases: is {options.cases}, expected at least 1")
    return options


def main(words: list[str] | None = None) -> int:
    """Prints the table; returns 1 if anything was wrong or could not be tried."""
    options, rows = parse_options(words), []
    for name in options.only or ATTACKS:
        begin = time.monotonic()
        rows.append(row(name, options.cases, options.seed))
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    for each in rows:
        for example in each.examples:
            print(f"wrong in {each.name}: {example}")
    return int(any(each.wrong != 0 for each in rows))


if __name__ == "__main__":
    sys.exit(main())
