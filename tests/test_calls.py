"""What a call of a block runs under: Dynamo's limit of recompilations where it has no option for it (torch 2.11)."""

from __future__ import annotations

import threading

import pytest
import torch

from quaff_fx import calls


def limit() -> int:
    return int(torch._dynamo.config.recompile_limit)


def test_the_limit_is_raised_for_a_call_and_put_back_after_an_error() -> None:
    before = limit()
    assert calls._with_recompile_limit(limit)() == calls.RECOMPILE_LIMIT > before
    assert limit() == before

    def broken() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        calls._with_recompile_limit(broken)()
    assert limit() == before


def test_a_call_that_ends_leaves_the_limit_to_one_in_another_thread() -> None:
    before, is_inside, may_end, seen = limit(), threading.Event(), threading.Event(), []

    def slow() -> None:
        is_inside.set()
        assert may_end.wait(60)
        seen.append(limit())

    thread = threading.Thread(target=calls._with_recompile_limit(slow))
    thread.start()
    assert is_inside.wait(60)
    calls._with_recompile_limit(limit)()
    may_end.set()
    thread.join()
    assert seen == [calls.RECOMPILE_LIMIT]
    assert limit() == before
