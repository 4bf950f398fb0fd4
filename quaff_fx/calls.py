"""In-place compilation of a module: the one compiled function that all blocks share."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

RECOMPILE_LIMIT = 64
"""Graphs per stage before Dynamo gives up on a block; 8, the default, is used up by dynamic shapes and modes."""


_numbers = itertools.count()


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # `_call_impl` and not the module itself: calling it would come back here.
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def compiled_call(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function (module, args, kwargs) that runs a module's forward and hooks, compiled by `backend`.

    One such function serves every block of a model: blocks of one class share its compiled graphs, and its limit of
    recompilations is its own. So is its code object, by which Dynamo remembers the sizes that have varied: a model does
    not get dynamic shapes because another one had them.
    """
    name = f"{_call.__name__}_{next(_numbers)}"
    own_call = types.FunctionType(_call.__code__.replace(co_name=name), _call.__globals__, name)
    compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
        own_call, backend=backend, isolate_recompiles=True, recompile_limit=RECOMPILE_LIMIT
    )
    return compiled


def install(module: nn.Module, call: Callable[..., Any]) -> None:
    """Makes calls of `module` run ``call(module, args, kwargs)``, as `nn.Module.compile` does."""

    @functools.wraps(module.forward)
    def compiled_forward(*args: Any, **kwargs: Any) -> Any:
        return call(module, args, kwargs)

    # Not by attribute: a module that is being unpickled may have no `_parameters` yet.
    module.__dict__["_compiled_call_impl"] = compiled_forward


def call_eagerly(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a module's forward and hooks without compiling them."""
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def unless_generating(compiled: Callable[..., Any], is_observing: Callable[[], bool]) -> Callable[..., Any]:
    """Returns `compiled`, except that a forward with a KV cache and without gradients runs eagerly.

    A cache is indexed by the layer, so each layer would compile graphs of its own. Eager products are int8 as well
    (`state.Int8Weight`), and one token is bound by reading the weights.

    Args:
        is_observing: whether the forward calibrates. Then it has to be compiled, as nothing else observes: prefix
            tuning gives its prefix as a KV cache.
    """

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        generating = not (torch.is_grad_enabled() or is_observing()) and _has_kv_cache((*args, *kwargs.values()))
        return (call_eagerly if generating else compiled)(module, args, kwargs)

    return call


def _has_kv_cache(values: tuple[Any, ...]) -> bool:
    transformers_cache = sys.modules.get("transformers.cache_utils")
    return transformers_cache is not None and any(isinstance(value, transformers_cache.Cache) for value in values)


@contextlib.contextmanager
def without_kv_cache(model: nn.Module) -> Iterator[None]:
    """Turns the default of ``use_cache`` off in the configs of a transformers model.

    They ask for a KV cache in training too, which nobody reads, and which makes every layer a graph of its own. An
    argument ``use_cache=True`` or ``past_key_values`` of the call still wins.
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


_fastpath_lock = threading.Lock()
_fastpath_off = 0  # how many calls want it off
_fastpath_was_on = True


@contextlib.contextmanager
def without_mha_fastpath(model: nn.Module) -> Iterator[None]:
    """Turns off the fused kernels that `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` run in evaluation.

    They take the weights of a whole layer, so no linear is traced: an evaluation would mark these weights as read by
    something else, and they would stay in float. They also leave out an adapter of the layer's linears. The switch is
    torch's own and global: the last of several models that run at the same time turns it on again.
    """
    global _fastpath_off, _fastpath_was_on
    if not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        yield
        return
    with _fastpath_lock:
        if _fastpath_off == 0:
            _fastpath_was_on = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _fastpath_off += 1
    try:
        yield
    finally:
        with _fastpath_lock:
            _fastpath_off -= 1
            if _fastpath_off == 0:
                torch.backends.mha.set_fastpath_enabled(_fastpath_was_on)


def uninstall(module: nn.Module) -> None:
    """Makes calls of `module` run its own code again."""
    module.__dict__.pop("_compiled_call_impl", None)


def is_compiled(module: nn.Module) -> bool:
    """Tells whether `module` was compiled, by `torch.compile`, `nn.Module.compile` or this package."""
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
