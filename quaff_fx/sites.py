"""Which frozen weights of a model are to become int8, which are left alone and why, and which modules are blocks."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn

from quaff_fx.config import QuaffConfig, matches
from quaff_fx.errors import ConfigError
from quaff_fx.hosts import adapters_own_parameters, is_conv1d, model_name
from quaff_fx.kernels.dispatch import reason_unsupported
from quaff_fx.numerics import INT32_MAX_REDUCTION
from quaff_fx.weights import FloatWeight, LoadedWeight, QuantizedWeight, Weight
from quaff_fx.weights.owners import quantized_in, weight_of, weights_in

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Site:
    """A frozen weight that a linear may read.

    Attributes:
        name: the module's dotted name in the model, without the wrappers of PEFT: ``layers.0.mlp.down_proj``.
        parameter: the weight's name in the module.
        module: its owner. shape: of the parameter as the model has it. dtype: of the parameter.
        reason: why it is left alone; empty while it is observed or quantized.
        table: the parameter of an embedding that is the same one, by its dotted name; empty if there is none.
        is_head: whether its products are logits, of a large vocabulary, and outside the repeated blocks.
        places: every module that owns the weight, with its name there; the first is `module` with `parameter`.
    """

    name: str
    parameter: str
    module: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    reason: str = ""
    table: str = ""
    is_head: bool = False
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = self.places or [(self.module, self.parameter)]

    @property
    def weight_name(self) -> str:
        """The dotted name of the parameter."""
        return f"{self.name}.{self.parameter}" if self.name else self.parameter

    @property
    def weight(self) -> Weight:
        """What the weight is now."""
        return weight_of(self.module, self.parameter)

    @property
    def observed(self) -> FloatWeight | LoadedWeight:
        """The weight of a site that is not quantized."""
        weight = self.weight
        assert not isinstance(weight, QuantizedWeight)
        return weight

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight of a site that is quantized."""
        return quantized_in(self.module)[self.parameter]


def find_sites(model: nn.Module, config: QuaffConfig, *, is_loading: bool = False) -> list[Site]:
    """Returns every matrix of the model that a linear could read, those to be left alone with their reason.

    A weight is one site, however many names lead to its module and however many modules share it.

    Args:
        is_loading: the weights are still on the meta device: nothing is frozen, or lies where it will, yet.

    Raises:
        ConfigError: no frozen matrix is left to quantize, a pattern matches nothing, or the device is not supported.
    """
    of_adapters = adapters_own_parameters(model)
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter, weight in weights_in(module).items():
            places[id(weight)].append((module, parameter))
            names[id(weight)].append(model_name(name))

    sites, site_names = [], []
    for key, owners in places.items():
        # What is said of a tied weight is said of the linear, not of the table.
        first = next((index for index, (owner, _) in enumerate(owners) if not isinstance(owner, _TABLES)), None)
        if first is None:
            continue
        module, parameter = owners[first]
        found = weight_of(module, parameter)
        if len(found.shape) < 2:
            continue
        tables = [f"{n}.{p}" for n, (owner, p) in zip(names[key], owners, strict=True) if isinstance(owner, _TABLES)]
        table = next(iter(tables), "")
        site = Site(names[key][first], parameter, module, found.shape, found.dtype, table=table, places=owners)
        site.reason = _reason_left_alone(site, names[key], config, key in of_adapters, is_loading)
        sites.append(site)
        site_names += names[key]
    config.check_patterns(site_names)
    _check_something_is_left(sites)
    return sites


_TABLES = (nn.Embedding, nn.EmbeddingBag)


CONFIG_ATTRIBUTE = "_quaff_config"
"""A model that was loaded as int8 carries the config of its loading under this name."""


def config_of(model: nn.Module) -> QuaffConfig | None:
    """Returns the config that a model (or the one it wraps) was loaded as int8 with, None if it was not."""
    found = (getattr(module, CONFIG_ATTRIBUTE, None) for module in model.modules())
    return next((config for config in found if isinstance(config, QuaffConfig)), None)


def check_loaded(sites: list[Site]) -> None:
    """Raises `ConfigError` if a weight that is int8 already is to be left alone: its float form is gone."""
    for site in sites:
        if site.reason and site.weight.is_int8:
            raise ConfigError(
                f"{site.name}: was loaded as int8 but is {site.reason}, expected the same choice for loading and for "
                "compile. Give both the same config."
            )


def _reason_by_config(site: Site, names: list[str], config: QuaffConfig) -> str:
    if not any(matches(name, pattern) for name in names for pattern in config.include):
        return "not included by the config"
    if any(matches(name, pattern) for name in names for pattern in config.exclude):
        return "excluded by the config"
    return ""


def _reason_left_alone(site: Site, names: list[str], config: QuaffConfig, is_own: bool, is_loading: bool) -> str:
    if not isinstance(site.weight, FloatWeight):  # chosen when it was loaded
        return _reason_by_config(site, names, config)
    weight = site.weight.tensor
    if weight.requires_grad and not is_loading:
        return "weight is trainable"
    if is_own:
        return "belongs to an adapter"
    if weight.ndim != 2:
        return f"weight has {weight.ndim} dimensions, a linear's has 2"
    if reason := _reason_by_config(site, names, config):
        return reason
    owners = [module for module, _ in site.places]
    if any(isinstance(m, (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)) for m in owners):
        return "inside nn.MultiheadAttention, which is traced as one operation"
    if not all(_is_plain_lookup(owner) for owner in owners if isinstance(owner, _TABLES)):
        return f"tied to {site.table}"
    if weight.dtype not in DTYPES:
        return f"weight is {weight.dtype}, quantized are float32, bfloat16 and float16"
    if not is_loading and (reason := reason_unsupported(weight.device)):
        return f"weight is on {reason}"
    if 0 in weight.shape or _in_features(site) > INT32_MAX_REDUCTION:
        return f"weight has shape {site.shape}, a side is empty or too long for int32 sums"
    return ""


def _is_plain_lookup(table: nn.Module) -> bool:
    """Whether all that a module does with its table is to take rows of it."""
    return isinstance(table, nn.Embedding) and table.max_norm is None


def _in_features(site: Site) -> int:
    """K, as the class of the module says."""
    return site.shape[0 if is_conv1d(site.module) else 1]


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


HEAD_FEATURES = 8192
"""A matrix outside the repeated blocks with so many out-features gives logits. Smaller ones are not worth a graph."""


def choose_blocks(model: nn.Module, sites: list[Site], config: QuaffConfig) -> list[nn.Module]:
    """Returns the blocks to compile in place, none with ``scope="model"``; tells which sites outside them are heads.

    A head is a site like those in blocks, and may be tied to an embedding. Other sites outside get their reason.
    """
    repeated = find_blocks(model, sites)
    inside = {id(module) for block in repeated for module in block.modules()}
    blocks = repeated if config.scope == "blocks" else []
    for site in sites:
        if site.reason:
            continue
        is_outside = not any(id(module) in inside for module, _ in site.places)
        site.is_head = is_outside and math.prod(site.shape) // _in_features(site) >= HEAD_FEATURES
        if site.table and not (blocks and site.is_head):  # compiled code would dequantize all of it for a few rows
            site.reason = f"tied to {site.table}"
        elif blocks and not site.is_head and not all(id(module) in inside for module, _ in site.places):
            site.reason = "outside the repeated blocks (scope='blocks')"
    _check_something_is_left(sites)
    return blocks


def find_blocks(model: nn.Module, sites: list[Site]) -> list[nn.Module]:
    """Returns the repeated blocks: the outermost children of one class, two or more in a list, that contain sites.

    A decoder's layers, say. A block owns its sites through submodules, so a list of bare linears is none.
    """
    owners = {id(module) for site in sites if not site.reason for module, _ in site.places}

    def contains_sites(module: nn.Module) -> bool:
        return any(id(child) in owners for child in module.modules() if child is not module)

    blocks: list[nn.Module] = []
    visited: set[int] = set()

    def visit(module: nn.Module) -> None:
        if id(module) in visited:  # under another name
            return
        visited.add(id(module))
        children = list(module.children())
        found: list[nn.Module] = []
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            by_class: dict[type, list[nn.Module]] = defaultdict(list)
            for child in children:
                if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and contains_sites(child):
                    by_class[type(child)].append(child)
            found = [child for same in by_class.values() if len(same) > 1 for child in same]
            blocks.extend(child for child in found if id(child) not in visited)
            visited.update(map(id, found))
        for child in children:
            visit(child)

    visit(model)
    return blocks


def callers_of(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Returns the modules through which a forward reaches the blocks, the model first: all that hold a block."""
    ids = {id(block) for block in blocks}

    def holds_block(module: nn.Module) -> bool:
        return any(id(child) in ids for child in module.modules() if child is not module)

    inside = {id(module) for block in blocks for module in block.modules()}
    others = [m for m in model.modules() if m is not model and id(m) not in inside and holds_block(m)]
    return [model, *others]
