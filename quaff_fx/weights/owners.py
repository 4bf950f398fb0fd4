"""The modules that own int8 weights, and the classes they get.

A module whose weight is int8 keeps its place in the model, its name and its class as a base class; reading the weight
calls the `read` of its state. One class per kind of base module is shared by all instances, so that layers share
compiled graphs.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from quaff_fx.errors import WeightError
from quaff_fx.weights.float import FloatWeight
from quaff_fx.weights.int8_weight import Int8Weight
from quaff_fx.weights.loaded import LoadedWeight
from quaff_fx.weights.quantized import QuantizedWeight
from quaff_fx.weights.state import Int8State

SLOT_PREFIX = "quaff_"
"""The state of parameter `weight` is the submodule `quaff_weight`."""

WeightState = LoadedWeight | QuantizedWeight
Weight = FloatWeight | WeightState

_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]] = {}

RUN = "_quaff_run"
"""A block runs its forward through the function that it has under this name, ``(block, args, kwargs)``."""


def _class_of(base: type[nn.Module], names: tuple[str, ...], is_block: bool) -> type[nn.Module]:
    """Returns the class of modules like `base` whose parameters `names` are int8, or that are compiled blocks."""
    if (base, names, is_block) in _CLASSES:
        return _CLASSES[base, names, is_block]

    def reader(name: str) -> property:
        def read(module: nn.Module) -> Tensor:
            return module._modules[SLOT_PREFIX + name].read()  # type: ignore[union-attr,operator,no-any-return]

        return property(read)

    def reduce(module: nn.Module, protocol: object) -> tuple[Any, ...]:
        kept = {name: value for name, value in module.__getstate__().items() if name != RUN}  # type: ignore[no-untyped-call]
        return _rebuild, (base, names, is_block), kept

    body: dict[str, Any] = {
        **{name: reader(name) for name in names},
        "quaff_base": base,
        "quaff_names": names,
        "quaff_is_block": is_block,
        "__reduce_ex__": reduce,
        "__module__": __name__,
        "__doc__": base.__doc__,
    }
    if names:

        def assign(module: nn.Module, name: str, value: Any) -> None:
            if name in names and not _is_own_weight(module, name, value):
                raise WeightError(
                    f"{name} of {base.__name__}: is int8, expected no other tensor in its place. Call "
                    "quaff_fx.dequantize(model) first."
                )
            if name not in names:
                base.__setattr__(module, name, value)

        def load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            base._load_from_state_dict(module, state_dict, prefix, *rest)
            for name in names:
                if prefix + name in state_dict:
                    rest[-1].append(  # the errors, which `load_state_dict` raises whatever ``strict`` says
                        f"{prefix}{name}: is a float weight for one that is int8, expected the int8 one. Call "
                        "quaff_fx.dequantize(model) before loading, or load before quaff_fx.compile."
                    )

        body |= {"__setattr__": assign, "_load_from_state_dict": load}
    if is_block:
        forward = base.forward

        @functools.wraps(forward)
        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            through = module.__dict__.get(RUN)
            return forward(module, *args, **kwargs) if through is None else through(module, args, kwargs)

        # Looked at by name: accelerate's and FSDP's policies, the list of classes in a saved config.
        body |= {
            "forward": run,
            "quaff_forward": forward,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
        }
    made = type(base.__name__ if is_block else f"Quaff{base.__name__}", (base,), body)
    _CLASSES[base, names, is_block] = made
    return made


def _rebuild(base: type[nn.Module], names: tuple[str, ...], is_block: bool) -> nn.Module:
    cls = _class_of(base, names, is_block)
    return cls.__new__(cls)


def base_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module had before this package gave it one."""
    return getattr(type(module), "quaff_base", type(module))


def _is_own_weight(module: nn.Module, name: str, value: object) -> bool:
    """Tells whether `value` is what reading the weight gave: PEFT assigns it back when it unloads an adapter."""
    state: object = module._modules[SLOT_PREFIX + name]
    return isinstance(value, Int8Weight) and value._state is state


def states_of(module: nn.Module) -> dict[str, WeightState]:
    """Returns the state of each int8 weight that `module` owns, by parameter name."""
    names = getattr(type(module), "quaff_names", ())
    return {name: module._modules[SLOT_PREFIX + name] for name in names}  # type: ignore[misc]


def quantized_in(module: nn.Module) -> dict[str, QuantizedWeight]:
    """Returns those of `states_of` that are quantized."""
    return {name: weight for name, weight in states_of(module).items() if isinstance(weight, QuantizedWeight)}


def weights_in(module: nn.Module) -> dict[str, nn.Parameter | WeightState]:
    """Returns what holds each weight that `module` owns, by parameter name; one object where modules share a weight."""
    if isinstance(module, Int8State):
        return {}
    plain = {name: weight for name, weight in module._parameters.items() if weight is not None}
    return plain | states_of(module)


def weight_of(module: nn.Module, name: str) -> Weight:
    """Returns the weight that `module` has under the name of a parameter."""
    return states_of(module).get(name) or FloatWeight(module._parameters.get(name))


def _set_class(module: nn.Module, names: tuple[str, ...], is_block: bool) -> None:
    base = base_class(module)
    # Past `__setattr__` of the module's class, which may be anyone's.
    object.__setattr__(module, "__class__", _class_of(base, names, is_block) if names or is_block else base)


def set_block(module: nn.Module, is_block: bool) -> None:
    """Makes `module` a block, whose forward runs through its `RUN`, or none any more."""
    _set_class(module, getattr(type(module), "quaff_names", ()), is_block)


def attach(module: nn.Module, states: dict[str, WeightState], **weights: nn.Parameter) -> None:
    """Gives `module` exactly these states, by parameter name, and these float weights in the place of former ones.

    Without a state it gets its own class back. Whatever interrupts it, the module is as it was or as it is to be.
    """
    cls, modules, parameters = type(module), dict(module._modules), dict(module._parameters)
    try:
        for name in states_of(module):
            if name not in states:
                del module._modules[SLOT_PREFIX + name]
        _set_class(module, tuple(sorted(states)), getattr(cls, "quaff_is_block", False))
        for name, state in states.items():
            module._modules[SLOT_PREFIX + name] = state.train(module.training)
            module._parameters.pop(name, None)
        module._parameters.update(weights)
    except BaseException:
        object.__setattr__(module, "__class__", cls)
        for here, before in ((module._modules, modules), (module._parameters, parameters)):
            here.clear()
            here.update(before)  # type: ignore[arg-type]
        raise


def restore(places: list[tuple[nn.Module, str]]) -> None:
    """Makes the int8 weight that these modules share one plain float parameter of all of them again, dequantized."""
    int8 = [(module, name) for module, name in places if name in states_of(module)]
    if not int8:
        return
    # An interrupted call has left a part of them in float.
    plain = [weight for module, name in places if (weight := module._parameters.get(name)) is not None]
    weight = plain[0] if plain else _float_parameter(states_of(int8[0][0])[int8[0][1]])
    for module, name in int8:
        states = states_of(module)
        del states[name]
        attach(module, states, **{name: weight})


@torch.inference_mode(False)
@torch.no_grad()
def _float_parameter(state: WeightState) -> nn.Parameter:
    return nn.Parameter(state.float_values().contiguous(), requires_grad=False)


def int8_places(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Returns where the int8 weights of a model are: for each weight the modules that own it, with its name there."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, state in states_of(module).items():
            places.setdefault(id(state), []).append((module, name))
    return list(places.values())


def float_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of `module` in which no weight is int8."""
    copied = copy.deepcopy(module)
    for places in int8_places(copied):
        restore(places)
    return copied
