"""What a call of a module runs: the compiled or the eager code of a block, with all of its hooks."""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from quaff_fx import hosts

RECOMPILE_LIMIT = 64
"""Graphs per model before Dynamo gives up on a block; 8, the default, is used up by dynamic shapes and modes."""


_numbers = itertools.count()


def _forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Not a call of the module: its hooks run outside, where they may come and go (Dynamo guards none of them).
    return module.quaff_forward(*args, **kwargs)


def compiled_forward(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function (block, args, kwargs) that runs a block's forward, compiled by `backend`.

    One such function serves every block of a model: blocks of one class share its compiled graphs, and its limit of
    recompilations is its own. So is its code object, by which Dynamo remembers the sizes that have varied: a model does
    not get dynamic shapes because another one had them.
    """
    name = f"{_forward.__name__}_{next(_numbers)}"
    own_forward = types.FunctionType(_forward.__code__.replace(co_name=name), _forward.__globals__, name)
    options = {name: value for name, value in _OPTIONS.items() if name in inspect.signature(torch.compile).parameters}
    compiled: Callable[..., Any] = torch.compile(own_forward, backend=backend, **options)  # type: ignore[call-overload]
    return compiled if "recompile_limit" in options else _with_recompile_limit(compiled)


_OPTIONS = {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
"""torch 2.11 has neither, 2.12 only the second.

Without the first the graphs of a block are a model's own all the same, by the code object. What Dynamo compiles after a
graph break is not: that counts the graphs of all models that have such a block.
"""

_limit_lock = threading.Lock()
_limit_calls = 0  # how many calls want it
_limit_before = 0


def _with_recompile_limit(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """For torch 2.11, which has one limit for all threads; `config.patch` costs 90 µs, and keeps one value for each."""

    def limited(*args: Any) -> Any:
        global _limit_calls, _limit_before
        with _limit_lock:
            if _limit_calls == 0:
                _limit_before = torch._dynamo.config.recompile_limit
                torch._dynamo.config.recompile_limit = max(_limit_before, RECOMPILE_LIMIT)
            _limit_calls += 1
        try:
            return compiled(*args)
        finally:
            with _limit_lock:
                _limit_calls -= 1
                if _limit_calls == 0:
                    torch._dynamo.config.recompile_limit = _limit_before

    return limited


def install(module: nn.Module, call: Callable[..., Any]) -> None:
    """Makes calls of `module` run ``call(module, args, kwargs)``, as `nn.Module.compile` does."""

    @functools.wraps(module.forward)
    def through(*args: Any, **kwargs: Any) -> Any:
        return call(module, args, kwargs)

    # Not by attribute: a module that is being unpickled may have no `_parameters` yet.
    module.__dict__["_compiled_call_impl"] = through


def uninstall(module: nn.Module) -> None:
    """Makes calls of `module` run its own code again."""
    module.__dict__.pop("_compiled_call_impl", None)


def call_itself(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a module's own code: its forward and hooks."""
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def is_compiled(module: nn.Module) -> bool:
    """Tells whether `module` was compiled, by `torch.compile`, `nn.Module.compile` or this package."""
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple("_global" + name for name in _HOOKS)


def hooked_module(block: nn.Module) -> nn.Module | None:
    """Returns a module inside `block` that has a hook which a compiled graph would not run; None if there is none.

    Hooks of the block itself run outside its graph.
    """
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return block
    modules = list(block._modules.values())
    while modules:
        module = modules.pop()
        if module is None:
            continue
        own = module.__dict__
        # Written out, since every module of every block passes here in every call.
        if (
            own.get("_forward_hooks")
            or own.get("_forward_pre_hooks")
            or own.get("_backward_hooks")
            or own.get("_backward_pre_hooks")
        ):
            hooks = [hook for name in _HOOKS for hook in own.get(name, {}).values()]
            if not all(map(hosts.is_idle_hook, hooks)):
                return module
            hosts.hide_idle_hooks(module)
        modules.extend(module._modules.values())
    return None
