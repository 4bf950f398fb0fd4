"""Which frozen weights of a model are to become int8, which are left alone and why, and which modules are blocks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from quaff_fx.config import QuaffConfig, matches
from quaff_fx.errors import ConfigError
from quaff_fx.numerics import INT32_MAX_REDUCTION
from quaff_fx.state import LoadedWeight, states_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")


@dataclass
class Site:
    """A frozen weight that a linear may read.

    Attributes:
        name: the module's dotted name in the model, without the wrappers of PEFT: ``layers.0.mlp.down_proj``.
        parameter: the weight's name in the module.
        module: its owner. shape: of the parameter as the model has it. dtype: of the parameter.
        reason: why it is left alone; empty while it is observed or quantized.
    """

    name: str
    parameter: str
    module: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    reason: str = ""

    @property
    def weight_name(self) -> str:
        """The dotted name of the parameter."""
        return f"{self.name}.{self.parameter}" if self.name else self.parameter


def find_sites(model: nn.Module, config: QuaffConfig, *, is_loading: bool = False) -> list[Site]:
    """Returns every matrix of the model that a linear could read, those to be left alone with their reason.

    Args:
        is_loading: the weights are still on the meta device: nothing is frozen, or lies where it will, yet.

    Raises:
        ConfigError: no frozen matrix is left to quantize, a pattern matches nothing, or the device is not supported.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter, weight in module._parameters.items():
            if weight is not None:
                owners[id(weight)].append(f"{_model_name(name)}.{parameter}" if name else parameter)

    sites = []
    for name, module in model.named_modules():
        if isinstance(module, LoadedWeight):
            continue
        for parameter, weight in module._parameters.items():
            if weight is None or weight.ndim < 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue
            site = Site(_model_name(name), parameter, module, tuple(weight.shape), weight.dtype)
            site.reason = _reason_left_alone(site, weight, owners[id(weight)], config, is_loading)
            sites.append(site)
        for parameter, weight_state in states_of(module).items():
            if isinstance(weight_state, LoadedWeight):
                n, k = weight_state.w_int8.shape
                shape = (n, k) if weight_state.in_dim == 1 else (k, n)
                site = Site(_model_name(name), parameter, module, shape, weight_state.dtype)
                site.reason = _reason_by_config(site, config)
                sites.append(site)
    config.check_patterns([site.name for site in sites])
    _check_something_is_left(sites)
    return sites


def _model_name(name: str) -> str:
    """The name that a module had before PEFT wrapped it: what people write in a pattern."""
    parts = [part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"]
    return ".".join(parts)


def check_loaded(sites: list[Site]) -> None:
    """Raises `ConfigError` if a weight that is int8 already is to be left alone: its float form is gone."""
    for site in sites:
        if site.reason and isinstance(states_of(site.module).get(site.parameter), LoadedWeight):
            raise ConfigError(
                f"{site.name}: was loaded as int8 but is {site.reason}, expected the same choice for loading and for "
                "compile. Give both the same config."
            )


def _reason_by_config(site: Site, config: QuaffConfig) -> str:
    if not any(matches(site.name, pattern) for pattern in config.include):
        return "not included by the config"
    if any(matches(site.name, pattern) for pattern in config.exclude):
        return "excluded by the config"
    return ""


def _reason_left_alone(
    site: Site, weight: nn.Parameter, names: list[str], config: QuaffConfig, is_loading: bool
) -> str:
    if weight.requires_grad and not is_loading:
        return "weight is trainable"
    if weight.ndim != 2:
        return f"weight has {weight.ndim} dimensions, a linear's has 2"
    if reason := _reason_by_config(site, config):
        return reason
    if isinstance(site.module, (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)):
        return "inside nn.MultiheadAttention, which is traced as one operation"
    if len(names) > 1:
        return f"tied to {next(name for name in names if name != site.weight_name)}"
    if weight.dtype not in DTYPES:
        return f"weight is {weight.dtype}, quantized are float32, bfloat16 and float16"
    if weight.device.type not in DEVICES and not is_loading:
        return f"weight is on device {weight.device.type}, quantized are weights on {' and '.join(DEVICES)}"
    if 0 in weight.shape or max(weight.shape) > INT32_MAX_REDUCTION:
        return f"weight has shape {site.shape}, a side is empty or too long for int32 sums"
    return ""


def _check_something_is_left(sites: list[Site]) -> None:
    if any(not site.reason for site in sites):
        return
    if not sites:
        raise ConfigError("model: has no matrix that a linear could read, expected some. There is nothing to quantize.")
    if all(site.reason == "weight is trainable" for site in sites):
        raise ConfigError(
            f"model: all {len(sites)} weight matrices are trainable, expected frozen ones. There is nothing to gain: "
            "a weight that is trained must stay in float. Freeze the base model (requires_grad_(False)) or add an "
            "adapter with PEFT before compile."
        )
    counts: dict[str, int] = defaultdict(int)
    for site in sites:
        counts[site.reason] += 1
    reasons = "; ".join(f"{count} × {reason}" for reason, count in counts.items())
    raise ConfigError(
        f"model: has no frozen weight to quantize ({reasons}), expected at least one. Freeze some, or include them."
    )


def choose_blocks(model: nn.Module, sites: list[Site], config: QuaffConfig) -> list[nn.Module]:
    """Returns the blocks to compile in place, none with ``scope="model"``; gives sites outside them their reason."""
    blocks = find_blocks(model, sites) if config.scope == "blocks" else []
    if blocks:
        mark_outside(sites, blocks)
    return blocks


def find_blocks(model: nn.Module, sites: list[Site]) -> list[nn.Module]:
    """Returns the repeated blocks: the outermost children of one class, two or more in a list, that contain sites.

    A decoder's layers, say. A block owns its sites through submodules, so a list of bare linears is none.
    """
    owners = {id(site.module) for site in sites if not site.reason}

    def contains_sites(module: nn.Module) -> bool:
        return any(id(child) in owners for child in module.modules() if child is not module)

    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        children = list(module.children())
        found: list[nn.Module] = []
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            by_class: dict[type, list[nn.Module]] = defaultdict(list)
            for child in children:
                if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and contains_sites(child):
                    by_class[type(child)].append(child)
            found = [child for same in by_class.values() if len(same) > 1 for child in same]
            blocks.extend(found)
        for child in children:
            if not any(child is block for block in found):
                visit(child)

    visit(model)
    return blocks


def mark_outside(sites: list[Site], blocks: list[nn.Module]) -> None:
    """Gives every site outside `blocks` its reason."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for site in sites:
        if not site.reason and id(site.module) not in inside:
            site.reason = "outside the repeated blocks (scope='blocks')"
