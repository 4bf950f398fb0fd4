"""Malformed states, checkpoints and indices are refused, or read as what they were; nothing else ever happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from quaff_fx.files.saved_state import SavedState
from tests import malformed

CASES = 400
"""Per subject. `benchmarks/reliability.py` takes as many as one likes."""


@pytest.mark.slow
@pytest.mark.parametrize("name", malformed.SUBJECTS)
def test_refused_or_read_as_before(name: str) -> None:
    counts = malformed.run_subject(name, CASES)
    assert counts.wrong == 0, counts.examples
    assert counts.cases == CASES
    assert counts.refused > CASES / 2


@pytest.mark.parametrize("name", malformed.SUBJECTS)
def test_cases_are_the_same_for_the_same_seed(name: str) -> None:
    first, again = (malformed.run_subject(name, 20, seed=3) for _ in range(2))
    assert (first.refused, first.equal, first.wrong) == (again.refused, again.equal, again.wrong)


@pytest.mark.parametrize("name", ["state file, converted", "state dict, observing"])
def test_what_is_misread_or_ends_in_another_error_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum of nothing lets through what has its kind, size and range."""
    with monkeypatch.context() as patch:
        patch.setattr(SavedState, "_checksum", lambda *_: "0" * 64)
        counts = malformed.run_subject(name, 200)
        assert counts.misread > 3
        assert counts.foreign == 0
        assert name in next(iter(counts.examples.values()))
    monkeypatch.setattr(SavedState, "_check_tensor_names", lambda _: None)
    counts = malformed.run_subject(name, 200)
    assert counts.foreign > 0
    assert any(example.startswith("KeyError") for example in counts.examples)


def test_the_samples_are_read_as_they_are(tmp_path: Path) -> None:
    for state in (malformed.observed_state(), malformed.converted_state()):
        state.write(tmp_path / "state.safetensors")
        assert malformed._of_state(SavedState.read(tmp_path / "state.safetensors")) == malformed._of_state(state)
