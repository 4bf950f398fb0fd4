"""`docs/compatibility.md` is what the tests marked with `compatibility` did: written by a run of them, never by hand.

    python -m pytest -m compatibility --write-compatibility

A test takes part by ``@pytest.mark.compatibility(section)``, where the row is the id of its parameter, or
``@pytest.mark.compatibility(section, row)``; what it records with pytest's `record_property` becomes columns. Several
tests may share a row: it works if all of them pass. An expected failure is a row that says why it does not work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"

COMMAND = "python -m pytest -m compatibility --write-compatibility"
INTRODUCTION = f"""# Compatibility

Each row is a test, or several, of the run that wrote this page: `{COMMAND}`.
Models are tiny and random, so that every one of them trains on two cores in seconds.

*int8 share* is the share of all linear multiply-adds, adapters included (rank 4 on width 48 makes them an eighth); *of
what is frozen* leaves trainable weights out. Experts count as if all were used. *gradient cosine* is the cosine
similarity of a trainable parameter's gradient in the first quantized step with float's, median over parameters.
"""
SECTIONS = ("Models", "Adapters", "Merging", "Running modes", "Training loops")
WORKS = "works"


@dataclass
class Row:
    """What became of the tests of one row."""

    results: set[str] = field(default_factory=set)
    columns: dict[str, str] = field(default_factory=dict)
    tests: list[str] = field(default_factory=list)

    def result(self) -> str:
        return "; ".join(sorted(self.results - {WORKS})) or WORKS


Rows = dict[tuple[str, str], Row]


def row_of(item: pytest.Item) -> tuple[str, str] | None:
    """Returns the section and row of a marked test, None of any other.

    Raises:
        pytest.UsageError: there is no such section, or the marker names no row and the test has no parameter.
    """
    marker = item.get_closest_marker("compatibility")
    if marker is None:
        return None
    section, *row = marker.args
    if section not in SECTIONS:
        raise pytest.UsageError(f"{item.nodeid}: section is {section!r}, expected one of {', '.join(SECTIONS)}.")
    if not row and not hasattr(item, "callspec"):
        raise pytest.UsageError(f"{item.nodeid}: has no parameter, expected a row. Write compatibility(section, row).")
    return section, row[0] if row else item.callspec.id


class Collector:
    """A pytest plugin that notes the rows of the collected tests, and what each test did."""

    def __init__(self) -> None:
        self.rows: Rows = {}
        self.has_failed = False
        self._row_of_test: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if (key := row_of(item)) is not None:
                self._row_of_test[item.nodeid] = key
                self.rows.setdefault(key, Row()).tests.append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        key = self._row_of_test.get(report.nodeid)
        if key is None:
            return
        row = self.rows[key]
        if report.failed:
            self.has_failed = True
        elif report.skipped:
            reason = getattr(report, "wasxfail", None)
            what = "not tried" if reason is None else "does not work"
            text = str(report.longrepr[2]).removeprefix("Skipped: ") if reason is None else reason
            row.results.add(f"{what}: {text.removeprefix('reason: ')}")
        elif report.when == "call":
            row.results.add(WORKS)
        if report.when == "teardown":
            row.columns |= {name: str(value) for name, value in report.user_properties}


def page(rows: Rows) -> str:
    """Returns the text of `docs/compatibility.md`."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        found = {name: row for (of, name), row in rows.items() if of == section}
        if not found:
            continue
        columns = list(dict.fromkeys(column for row in found.values() for column in row.columns))
        table = [
            [name, row.result(), *(row.columns.get(column, "") for column in columns)] for name, row in found.items()
        ]
        headers = ["", "result", *columns]
        parts.append(f"## {section}\n\n{tabulate(table, headers, tablefmt='github', disable_numparse=True)}\n")
    return "\n".join(parts)


def documented_rows(text: str) -> set[tuple[str, str]]:
    """Returns the section and first cell of every row of the page."""
    found, section = set(), ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("|") and not line.startswith("|-"):
            found.add((section, line.split("|")[1].strip()))
    return {row for row in found if row[1]}


def write(collector: Collector, exit_status: int) -> str:
    """Writes the page and returns what is to be said about it; a run with failures writes nothing."""
    if collector.has_failed or exit_status != pytest.ExitCode.OK:
        return "docs/compatibility.md: was not written, because not every test passed."
    left_out = documented_rows(PAGE.read_text(encoding="utf-8")) - set(collector.rows) if PAGE.exists() else set()
    PAGE.write_text(page(collector.rows), encoding="utf-8")
    lost = f" Rows of before that were not run are gone: {sorted(left_out)}." if left_out else ""
    return f"docs/compatibility.md: written, {len(collector.rows)} rows.{lost}"
