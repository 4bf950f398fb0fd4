"""What quaff_fx knows of PEFT (read in peft 0.21): its wrappers, the names it gives, how it merges."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from quaff_fx.errors import ConfigError, WeightError
from quaff_fx.weights import owners

DEQUANTIZE = "Call quaff_fx.dequantize(model), merge_and_unload() and save_pretrained instead."
"""The way to merge in memory, for error texts."""

BASE_LAYER, ORIGINAL_MODULE = "base_layer", "original_module"
"""Where PEFT's wrappers keep what they wrap: a tuner layer, and a module to save."""

DEFAULT_ADAPTER = "default"
"""The name of an adapter that was given none."""


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
        tuners.BaseTunerLayer: BASE_LAYER,
        wrappers.AuxiliaryTrainingWrapper: ORIGINAL_MODULE,
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
    parts = [part for part in name.removeprefix("base_model.model.").split(".") if part != BASE_LAYER]
    return ".".join(parts)


def guard_peft() -> None:
    """Makes PEFT refuse to merge adapters into int8 weights, and copy int8 modules to be saved in float. Idempotent.

    PEFT unloads a model module by module: without a check beforehand, what stands before the first int8 weight is
    unloaded when that one refuses. And it trains a copy of each module that is to be saved, which has to be float.
    """
    tuners, wrappers = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is not None:
        _replace_method(tuners.BaseTuner, "_check_merge_allowed", ("self",), _checking_for_int8)
    if wrappers is not None:
        _replace_method(wrappers.ModulesToSaveWrapper, "update", ("self", "adapter_name"), _copying_in_float)


def _replace_method(owner: type, name: str, parameters: tuple[str, ...], wrap: Callable[[Any], Any]) -> None:
    """Replaces a method of PEFT, which must begin with these parameters: others would mean another thing."""
    original: Any = getattr(owner, name, None)
    if hasattr(original, "_quaff_guard"):
        return
    found = tuple(inspect.signature(original).parameters) if callable(original) else None
    if found is None or found[: len(parameters)] != parameters:
        version = getattr(sys.modules["peft"], "__version__", "of unknown version")
        what = "no such method" if found is None else f"parameters ({', '.join(found)})"
        raise ConfigError(
            f"peft {version}: {owner.__name__}.{name} has {what}, expected parameters ({', '.join(parameters)}, ...) "
            "as in peft 0.21: without it an adapter would be merged into int8 weights. Install peft>=0.21,<0.22."
        )
    guarded: Any = functools.wraps(original)(wrap(original))
    guarded._quaff_guard = True
    setattr(owner, name, guarded)


def _checking_for_int8(original: Any) -> Any:
    def check_merge_allowed(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        tuners = sys.modules["peft.tuners.tuners_utils"]
        for name, module in tuner.model.named_modules():
            if isinstance(module, tuners.BaseTunerLayer) and owners.states_of(module.get_base_layer()):
                raise WeightError(
                    f"{name}: its weight is int8 and rebuilt at each read, expected a float one to merge "
                    "an adapter into. Nothing was merged. Call quaff_fx.merge_into_checkpoint(model, source, "
                    "output), which merges into the stored weights, or quaff_fx.dequantize(model) first."
                )
        return original(tuner, *args, **kwargs)

    return check_merge_allowed


def _copying_in_float(original: Any) -> Any:
    def update(wrapper: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        holds_int8 = any(owners.states_of(module) for module in wrapper.original_module.modules())
        if holds_int8 and adapter_name not in wrapper.modules_to_save:
            # PEFT copies the module only if there is no copy yet.
            wrapper.modules_to_save[adapter_name] = owners.float_copy(wrapper.original_module)
        return original(wrapper, adapter_name, *args, **kwargs)

    return update


def base_model(model: nn.Module) -> nn.Module:
    """Returns the model that PEFT wraps, or the model itself.

    Raises:
        WeightError: its adapter is a learned prompt, which no weight can hold.
    """
    peft = sys.modules.get("peft")
    found = [] if peft is None else [module for module in model.modules() if isinstance(module, peft.PeftModel)]
    if not found:
        return model
    if found[0].active_peft_config.is_prompt_learning:
        raise WeightError(
            "model: its adapter is a learned prompt, expected one that changes weights. There is nothing to merge; "
            "save the adapter with save_pretrained."
        )
    base: nn.Module = found[0].get_base_model()
    return base


@dataclass
class AdaptedModule:
    """A module of a base model that owns weights, with the adapter around it.

    Attributes:
        name: of the module in the base model. base: the module. layer: the adapter layer around it, None if there is
            none. is_trained: its weights are an adapter's own copy (``modules_to_save``).
    """

    name: str
    base: nn.Module
    layer: Any
    is_trained: bool

    @property
    def parameters(self) -> list[str]:
        """The names of its parameters, int8 ones included."""
        return list(owners.weights_in(self.base))

    @property
    def is_adapted(self) -> bool:
        """Whether there is anything that training may have changed."""
        trained = any(p is not None and p.requires_grad for p in self.base._parameters.values())
        return self.layer is not None or self.is_trained or trained

    @property
    def adapter_names(self) -> set[str]:
        """The adapters of the layer."""
        return set() if self.layer is None else set(self.layer._get_available_adapters())

    @property
    def is_merged(self) -> bool:
        """Whether an adapter is in the base weight already."""
        return self.layer is not None and bool(self.layer.merged)

    def name_of(self, parameter: str) -> str:
        """The dotted name of a parameter in the base model."""
        return f"{self.name}.{parameter}" if self.name else parameter

    def merge_into(self, base: nn.Module, adapter_names: list[str] | None) -> None:
        """Merges the adapter into `base`, a float module like its own, in place, by PEFT's ``merge``.

        Raises:
            WeightError: PEFT cannot merge it.
        """
        if self.layer is None:
            return
        layer = copy.deepcopy(self.layer, {id(self.base): base})
        try:
            layer.merge(safe_merge=True, adapter_names=adapter_names)
        except Exception as error:
            raise WeightError(
                f"{self.name}: PEFT cannot merge its adapter ({error}), expected one that merges. Nothing was written."
            ) from error


def adapted_modules(base: nn.Module) -> list[AdaptedModule]:
    """Returns every module of a base model that owns weights, without those that are adapters' own.

    Raises:
        WeightError: one is wrapped in what is neither an adapter layer nor a module to save.
    """
    tuners, wrappers = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    found: list[AdaptedModule] = []

    def visit(module: nn.Module, name: str, is_trained: bool) -> None:
        if wrappers is not None and isinstance(module, wrappers.ModulesToSaveWrapper):
            is_active = bool(module.active_adapters)
            inner = module.modules_to_save[module.active_adapter] if is_active else module.original_module
            visit(inner, name, is_active)
            return
        if wrappers is not None and isinstance(module, wrappers.AuxiliaryTrainingWrapper):
            raise WeightError(
                f"{name}: is wrapped in {type(module).__name__}, expected an adapter layer or a module to save. "
                f"{DEQUANTIZE}"
            )
        layer = None
        if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
            layer, module = module, module.get_base_layer()
        part = AdaptedModule(name, module, layer, is_trained)
        if part.parameters:
            found.append(part)
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name, is_trained)

    visit(base, "", False)
    return found


def stored_name(name: str) -> str:
    """Returns the name under which a checkpoint has what bears `name` in a base model with adapters."""
    return ".".join(part for part in name.split(".") if part not in ("", BASE_LAYER, ORIGINAL_MODULE))
