"""What quaff_fx knows of transformers (read in transformers 5.24): Conv1D, KV caches, hooks that capture outputs."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Tells whether a module is GPT-2's Conv1D, a linear whose weight is (K, N)."""
    return isinstance(module, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ()))


def has_kv_cache(values: tuple[Any, ...]) -> bool:
    """Tells whether a KV cache of transformers is among the arguments of a call."""
    cache_utils = sys.modules.get("transformers.cache_utils")
    return cache_utils is not None and any(isinstance(value, cache_utils.Cache) for value in values)


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


def is_idle_hook(hook: Any) -> bool:
    """Tells whether a forward hook is one of transformers' for capturing outputs, of a kind that nobody asks for now.

    The first call with ``output_attentions=True`` or the like leaves them on every layer for good; they do nothing
    outside such calls.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    hook = getattr(hook, "_quaff_hidden", hook)
    if capturing is None or getattr(hook, "__module__", None) != capturing.__name__:
        return False
    collected = capturing._active_collector.get()
    return not collected or inspect.getclosurevars(hook).nonlocals.get("key") not in (None, *collected)


def hide_idle_hooks(module: nn.Module) -> None:
    """Makes the hooks that `is_idle_hook` tells of do nothing while they are traced; what is compiled runs only then.

    Dynamo would break the graph at each of them.
    """
    for key, hook in module._forward_hooks.items():
        if not hasattr(hook, "_quaff_hidden") and is_idle_hook(hook):
            module._forward_hooks[key] = _hidden(hook)


def show_hooks(model: nn.Module) -> None:
    """Takes back what `hide_idle_hooks` did, in all of `model`."""
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            module._forward_hooks[key] = getattr(hook, "_quaff_hidden", hook)


def _hidden(hook: Any) -> Any:
    def hidden(*args: Any) -> Any:
        return None if torch.compiler.is_dynamo_compiling() else hook(*args)

    hidden._quaff_hidden = hook  # type: ignore[attr-defined]
    return hidden
