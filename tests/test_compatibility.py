"""The page docs/compatibility.md and the tests that it comes from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests import compatibility
from tests.compatibility import WORKS, Collector, Row


def test_every_row_of_the_page_is_a_marked_test_and_the_other_way_round():
    """Whoever adds, renames or removes a marked test has to write the page anew."""
    collector = Collector()
    files = [
        path for path in (compatibility.ROOT / "tests").rglob("test_*.py") if "mark.compatibility(" in path.read_text()
    ]
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", *map(str, files)]
    assert pytest.main(options, plugins=[collector]) == pytest.ExitCode.OK
    documented = compatibility.documented_rows(compatibility.PAGE.read_text(encoding="utf-8"))
    assert documented == set(collector.rows), f"write the page anew: {compatibility.COMMAND}"


def test_a_page_says_what_its_rows_are():
    rows = {
        ("Models", "Llama"): Row({WORKS}, {"int8 share": "81%"}),
        ("Models", "BERT"): Row({WORKS, "does not work: its pooler"}),
        ("Adapters", "LoRA"): Row({"not tried: no network"}),
    }
    text = compatibility.page(rows)
    assert compatibility.documented_rows(text) == set(rows)
    models, adapters = text.split("## Adapters")
    assert [cell.strip() for cell in models.splitlines()[-3].split("|")[1:-1]] == ["Llama", "works", "81%"]
    assert "| does not work: its pooler |" in models
    assert "not tried: no network" in adapters


def collected(nodeid: str = "tests/test_x.py::test_y[Llama]", **more: object) -> SimpleNamespace:
    marker = pytest.mark.compatibility(*more.pop("arguments", ("Models",))).mark
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda _: marker, **more)


def report(when: str, outcome: str, **more: object) -> SimpleNamespace:
    states = {"failed": outcome == "failed", "skipped": outcome == "skipped"}
    return SimpleNamespace(nodeid=collected().nodeid, when=when, user_properties=[], **states, **more)


@pytest.mark.parametrize(
    ("reports", "result"),
    [
        ([report("call", "passed")], WORKS),
        ([report("call", "skipped", wasxfail="reason: reads it twice")], "does not work: reads it twice"),
        ([report("setup", "skipped", longrepr=("file", 1, "Skipped: no network"))], "not tried: no network"),
    ],
)
def test_outcomes(reports, result):
    collector = Collector()
    collector.pytest_collection_modifyitems([collected(callspec=SimpleNamespace(id="Llama"))])
    for each in reports:
        collector.pytest_runtest_logreport(each)
    assert collector.rows["Models", "Llama"].result() == result
    assert not collector.has_failed


def test_a_run_with_a_failure_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "page.md")
    collector = Collector()
    collector.pytest_collection_modifyitems([collected(callspec=SimpleNamespace(id="Llama"))])
    collector.pytest_runtest_logreport(report("call", "failed"))
    assert "was not written" in compatibility.write(collector, pytest.ExitCode.TESTS_FAILED)
    assert not compatibility.PAGE.exists()
    collector.has_failed = False
    assert "written, 1 rows" in compatibility.write(collector, pytest.ExitCode.OK)
    compatibility.write(Collector(), pytest.ExitCode.OK)
    assert compatibility.documented_rows(compatibility.PAGE.read_text()) == set()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("Modells", "Llama"), "section is 'Modells', expected one of Models, Adapters"),
        (("Models",), r"has no parameter, expected a row\. Write compatibility\(section, row\)\."),
    ],
)
def test_a_marker_that_names_no_row_is_an_error(arguments, text):
    with pytest.raises(pytest.UsageError, match=text):
        compatibility.row_of(collected(arguments=arguments))
