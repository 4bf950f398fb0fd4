"""Inductor where the locale is not UTF-8."""

from __future__ import annotations

import locale
import os
import subprocess
import sys

import pytest

from quaff_fx import inductor
from quaff_fx.errors import ConfigError


def test_an_ascii_locale_imports_inductor_and_stays_as_it_was() -> None:
    code = "import locale; before = locale.setlocale(locale.LC_CTYPE); import quaff_fx.inductor; "
    code += "print(locale.getpreferredencoding(False), before == locale.setlocale(locale.LC_CTYPE))"
    ascii_ = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | ascii_, capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["ANSI_X3.4-1968", "True"], ran.stderr


def test_without_a_utf_8_locale_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def ascii_only(category: int, name: str | None = None) -> str:
        if name is not None and name != "C":
            raise locale.Error("unsupported locale setting")
        return "C"

    monkeypatch.setattr(locale, "getpreferredencoding", lambda _: "ascii")
    monkeypatch.setattr(locale, "setlocale", ascii_only)
    with pytest.raises(ConfigError, match="PYTHONUTF8=1"), inductor._utf_8():
        "…".encode().decode("ascii")
