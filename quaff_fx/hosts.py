"""What quaff_fx knows of PEFT, transformers and torch's fused encoder: the habits of its hosts, in one room.

PEFT and transformers are optional: nothing here imports them, and nothing is done unless they were imported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from quaff_fx import state
from quaff_fx.errors import WeightError

# --- PEFT (read in peft 0.21) ---------------------------------------------------------------------------------------


def adapters_own_parameters(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters that belong to adapters of PEFT, whether they train or not.

    PEFT's wrappers say where the base model is: ``base_layer`` of a tuner layer, ``original_module`` of a module to
    save, ``model`` of a tuner, ``base_model`` of a `PeftModel`. All else inside a wrapper is the adapter's own, and so
    is what bears the prefix by which PEFT itself finds the parameters of its method.
    """
    tuners, wrappers = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or wrappers is None:
        return set()
    peft = sys.modules["peft"]
    base_of = {
        tuners.BaseTunerLayer: "base_layer",
        wrappers.AuxiliaryTrainingWrapper: "original_module",
        tuners.BaseTuner: "model",
        peft.PeftModel: "base_model",
        peft.PeftMixedModel: "base_model",
    }
    of_base: set[int] = set()
    of_adapters: set[int] = set()

    def visit(module: nn.Module, is_own: bool) -> None:
        base = next((name for kind, name in base_of.items() if isinstance(module, kind)), None)
        has_base = base is not None and isinstance(module._modules.get(base), nn.Module)
        target = of_adapters if is_own or has_base else of_base
        target.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
        for name, child in module._modules.items():
            if child is not None:
                visit(child, is_own or (has_base and name != base))

    visit(model, False)
    of_adapters -= of_base  # a prompt encoder also holds the embeddings of the base model
    for tuner in model.modules():
        if isinstance(tuner, tuners.BaseTuner) and (prefix := getattr(tuner, "prefix", "")):
            for module in tuner.modules():
                of_adapters.update(id(p) for name, p in module._parameters.items() if p is not None and prefix in name)
                for name, child in module._modules.items():
                    # X-LoRA holds its base model under such a name too.
                    if child is not None and prefix in name and not _holds(child, tuners.BaseTunerLayer):
                        of_adapters.update(map(id, child.parameters()))
    return of_adapters


def _holds(module: nn.Module, kind: type) -> bool:
    return any(isinstance(child, kind) for child in module.modules())


def model_name(name: str) -> str:
    """Returns the name that a module had before PEFT wrapped it: what people write in a pattern."""
    parts = [part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"]
    return ".".join(parts)


def guard_peft() -> None:
    """Makes PEFT refuse to merge adapters into int8 weights, and copy int8 modules to be saved in float. Idempotent.

    PEFT unloads a model module by module: without a check beforehand, what stands before the first int8 weight is
    unloaded when that one refuses. And it trains a copy of each module that is to be saved, which has to be float.
    """
    tuners, wrappers = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is not None:
        _replace_method(tuners.BaseTuner, "_check_merge_allowed", _checking_for_int8)
    if wrappers is not None:
        _replace_method(wrappers.ModulesToSaveWrapper, "update", _copying_in_float)


def _replace_method(owner: type, name: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        raise WeightError(
            f"peft: {owner.__name__} has no method {name}, expected the one of peft 0.21. Install a version that this "
            "version of quaff_fx was made for."
        )
    if not hasattr(original, "_quaff_guard"):
        guarded: Any = functools.wraps(original)(wrap(original))
        guarded._quaff_guard = True
        setattr(owner, name, guarded)


def _checking_for_int8(original: Any) -> Any:
    def check_merge_allowed(tuner: Any) -> Any:
        tuners = sys.modules["peft.tuners.tuners_utils"]
        for name, module in tuner.model.named_modules():
            if isinstance(module, tuners.BaseTunerLayer) and state.states_of(module.get_base_layer()):
                raise WeightError(
                    f"{name}: its weight is int8 and rebuilt at each read, expected a float one to merge "
                    "an adapter into. Nothing was merged. Call quaff_fx.merge_into_checkpoint(model, source, "
                    "output), which merges into the stored weights, or quaff_fx.dequantize(model) first."
                )
        return original(tuner)

    return check_merge_allowed


def _copying_in_float(original: Any) -> Any:
    def update(wrapper: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        holds_int8 = any(state.states_of(module) for module in wrapper.original_module.modules())
        if holds_int8 and adapter_name not in wrapper.modules_to_save:
            # PEFT copies the module only if there is no copy yet.
            wrapper.modules_to_save[adapter_name] = state.float_copy(wrapper.original_module)
        return original(wrapper, adapter_name, *args, **kwargs)

    return update


# --- transformers (read in transformers 5.24) -----------------------------------------------------------------------


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


# --- torch ----------------------------------------------------------------------------------------------------------

_fastpath_lock = threading.Lock()
_fastpath_off = 0  # how many calls want it off
_fastpath_was_on = True


@contextlib.contextmanager
def without_mha_fastpath(model: nn.Module) -> Iterator[None]:
    """Turns off the fused kernels that `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` run in evaluation.

    They take the weights of a whole layer, past its linears, and so leave out an adapter of these. The switch is
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


def untraced_modules(model: nn.Module) -> list[str]:
    """Returns the names of recurrent modules of torch: Dynamo skips every function that calls one.

    Empty where ``torch._dynamo.config.allow_rnn`` is on.
    """
    if torch._dynamo.config.allow_rnn:
        return []
    return [name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)]
