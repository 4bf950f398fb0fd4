"""The reliability benchmark: its rows add up, what is missing is said, and what is wrong is shown."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from benchmarks import reliability
from tests import kills, malformed


def test_malformed_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert reliability.main(["--only", "malformed", "--cases", "80"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "malformed files" in line)
    _, name, cases, wrong, how, _ = (cell.strip() for cell in line.split("|"))
    assert (name, cases, wrong) == ("malformed files", "80", "0")
    refused, equal = (int(word) for word in how.split() if word.isdigit())
    assert refused + equal == 80


@pytest.mark.compile
@pytest.mark.slow
def test_kills() -> None:
    counts = kills.run(3)
    assert counts.wrong == 0, counts.examples
    assert counts.cases == 3
    assert counts.runs >= 1


def test_what_is_wrong_is_shown_and_is_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = malformed.Counts(refused=5, foreign=1, examples={"KeyError: 'x'": "state file, seed 0, case 3"})
    monkeypatch.setattr(malformed, "run", lambda cases, seed: {"state file": counts})
    assert reliability.main(["--only", "malformed"]) == 1
    out = capsys.readouterr().out
    assert "wrong in malformed files: KeyError: 'x' (state file, seed 0, case 3)" in out
    assert reliability.row("malformed", 7, 0).wrong == 1


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tests.interrupts", None)
    assert reliability.main(["--only", "interrupts"]) == 1
    assert "tests.interrupts: cannot be imported" in capsys.readouterr().out


def test_kernels_and_interrupts_are_counted_by_their_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(run=lambda **options: SimpleNamespace(cases=options.get("cases", 9), wrong=0))
    monkeypatch.setitem(sys.modules, "tests.kernels.fuzz", made)
    monkeypatch.setitem(sys.modules, "tests.interrupts", made)
    rows = [reliability.row(name, 5, 0) for name in ("kernels", "interrupts")]
    assert [(each.cases, each.wrong) for each in rows] == [(5, 0), (9, 0)]


@pytest.mark.parametrize("words", [["--cases", "0"], ["--only", "everything"]])
def test_options_that_mean_nothing(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        reliability.parse_options(words)
