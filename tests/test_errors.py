"""The family of errors, and the form of their texts wherever the product raises one."""

from __future__ import annotations

import ast
import re

import pytest

from quaff_fx import errors
from quaff_fx.errors import CalibrationError, CheckpointError, ConfigError, QuaffError, QuaffWarning, ShapeError
from tests.test_architecture import SOURCES

KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"QuaffWarning"}))
def test_every_error_is_a_quaff_error(name: str) -> None:
    assert issubclass(KINDS[name], QuaffError)


def test_what_other_code_may_catch_them_as() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ShapeError, ValueError)
    assert issubclass(QuaffWarning, UserWarning)
    assert not issubclass(CalibrationError, ValueError)
    assert not issubclass(CheckpointError, (ValueError, OSError))


def texts() -> list[tuple[str, str]]:
    """Every text that an error or a warning is made with, with its place; X stands for what is filled in."""
    found = []
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in KINDS and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
                parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
                found.append((f"{name}:{node.lineno}", text))
    return found


def test_every_text_says_what_is_what_should_be_and_what_to_do() -> None:
    """But those of the passes: a graph that breaks their rules is our fault, and nothing is to be done about it."""
    form = re.compile(r"^\S.*: .+, expected .+\. (X|\S.*[.X])$", re.DOTALL)
    found = [(place, text) for place, text in texts() if not place.startswith("passes.")]
    assert len(found) > 50
    assert [place for place, text in found if not form.match(text)] == []
