"""Ctrl-C before any line of some files of the product."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any


def interrupted_at(call: Callable[[], object], number: int | None, modules: tuple[ModuleType, ...]) -> int:
    """Calls with a KeyboardInterrupt before the line of this number in `modules`; returns how many lines ran.

    Where Python ignores an exception, in a generator that is let go, it ignores this one too: the call then returns.
    """
    files = {module.__file__ for module in modules}
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        if event in ("call", "line"):
            count += 1
            if count - 1 == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
