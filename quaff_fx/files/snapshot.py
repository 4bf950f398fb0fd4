"""Calibration and smoothing state, all that training leaves beside the adapter: taken from a model and brought back.

The int8 weights are not in it: they follow from the base model, and only their checksums are.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quaff_fx import convert, distributed
from quaff_fx.api import stages_of
from quaff_fx.config import QuaffConfig
from quaff_fx.convert import Choice, Plan
from quaff_fx.errors import CheckpointError
from quaff_fx.files.checkpoint import PathLike
from quaff_fx.files.saved_state import NUMBERS, OUTLIERS, STATISTICS, SavedState
from quaff_fx.observe import Statistics
from quaff_fx.ops import STATIC_MOMENTUM
from quaff_fx.sites import Site
from quaff_fx.stages import Calibration, Stages
from quaff_fx.weights import OutlierState, Weight

FILE = "quaff_state.safetensors"


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the calibration statistics of a compiled model, or its outlier channels and smoothing scales, as copies.

    With the adapter, the optimizer and the random generators it is all that a run needs to go on bit for bit. Tensors
    only, on the CPU; `load_state_dict` takes it back.

    Raises:
        ConfigError: the model was not compiled by quaff_fx.
        CheckpointError: several processes are calibrating, each with statistics of its own.
    """
    return _taken_from(model).to_tensors()


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Brings back what `state_dict` returned; everything is checked before anything is changed.

    A model that was just compiled goes on where the saved one was: it keeps observing, or becomes int8 at once with the
    saved outlier channels. A converted model takes its smoothing scales back if its outlier channels are the saved
    ones. Base weights, layers and config must be those of the saved model; only ``progress``, and ``calibration_steps``
    once it is converted, may differ.

    Raises:
        ConfigError: the model was not compiled by quaff_fx.
        CheckpointError: the state is damaged or does not fit the model. The model is left as it was.
    """
    _bring_back(model, SavedState.from_tensors(state))


def save_state(model: nn.Module, folder_or_file: PathLike) -> Path:
    """Writes `state_dict` as a safetensors file, ``quaff_state.safetensors`` in a folder; returns its path.

    The file appears whole or not at all, whenever the process is killed; a file of before stays until then.

    Raises:
        ConfigError, CheckpointError: as `state_dict`.
    """
    path, saved = _path(folder_or_file), _taken_from(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    saved.write(path)
    return path


def load_state(model: nn.Module, folder_or_file: PathLike) -> None:
    """Brings back what `save_state` wrote, as `load_state_dict` does. Runs no code from the file.

    Raises:
        ConfigError: the model was not compiled by quaff_fx.
        CheckpointError: there is no such file, it is damaged, or does not fit the model. The model is left as it was.
    """
    path = _path(folder_or_file)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: does not exist, expected the state of the run that is to be resumed, as quaff_fx.save_state or "
            "quaff_fx.QuaffCallback writes it. Choose a checkpoint that has one, or start anew."
        )
    _bring_back(model, SavedState.read(path))


def _path(folder_or_file: PathLike) -> Path:
    path = Path(folder_or_file)
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / FILE


# --- taken from a model --------------------------------------------------------------------------------------------


def _taken_from(model: nn.Module) -> SavedState:
    stages = stages_of(model)
    with torch.no_grad():  # a conversion may be due; smoothing scales are committed by the next training forward alone
        stages.settle()
    tensors: dict[str, Tensor] = {}
    if stages.stage == "observe":
        _check_one_process()
        sites = {site.weight_name: _statistics(site, stages, tensors) for site in stages.active_sites()}
    else:
        groups: dict[int, int] = {}
        sites = {site.weight_name: _choice(site, groups, tensors) for site in stages.active_sites()}
    return SavedState(
        stage=stages.stage,
        steps=stages.steps,
        config=_plain(stages.config),
        sites=sites,
        left_alone={site.weight_name: site.reason for site in stages.sites if site.reason},
        tensors={name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()},
        multiply_adds=dict(stages.calibration.multiply_adds),
    )


def _check_one_process() -> None:
    if (processes := distributed.processes()) > 1:
        raise CheckpointError(
            f"model: is still observed, by {processes} processes of which each has statistics of its own, expected a "
            "converted model. Save after the calibration, or call quaff_fx.calibrate before training."
        )


def _statistics(site: Site, stages: Stages, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What is saved of an observed site; puts its tensors into `tensors`."""
    seen = stages.calibration.statistics.get(site.weight_name) or Statistics.none(site)
    tensors |= {f"{site.weight_name}.{name}": getattr(seen, name) for name in STATISTICS}
    numbers = {"in_dim_seen": seen.in_dim, "steps": seen.steps}
    return _form(site) | {"crc32": _checksum(site.weight)} | numbers


def _choice(site: Site, groups: dict[int, int], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What is saved of a quantized site; `groups` numbers the outlier states: sites that share one share a number."""
    quantized = site.quantized
    group = groups.setdefault(id(quantized.outliers), len(groups))
    tensors |= {f"outliers.{group}.{name}": getattr(quantized.outliers, name) for name in OUTLIERS}
    numbers = {name: getattr(quantized, name) for name in NUMBERS} | {"outliers": group}
    return _form(site) | {"crc32": _checksum(quantized)} | numbers


def _form(site: Site) -> dict[str, Any]:
    """Shape and dtype of a site's weight, as far as it is a float parameter or stands for one."""
    return {"shape": list(site.shape), "dtype": str(site.weight.dtype).removeprefix("torch.")}


def _checksum(weight: Weight) -> int:
    """CRC-32 of a float weight, or of an int8 weight and its scales."""
    crc = 0
    for tensor in weight.tensors:
        crc = zlib.crc32(distributed.whole(tensor).detach().cpu().contiguous().view(torch.uint8).numpy().data, crc)
    return crc


def _plain(config: QuaffConfig) -> dict[str, Any]:
    """The config as JSON gives it back."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


# --- brought back --------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # what is brought back takes part in training
def _bring_back(model: nn.Module, saved: SavedState) -> None:
    stages = stages_of(model)
    stages.settle()
    _check_config(stages.config, saved)
    if saved.stage == "observe":
        stages.calibration = _calibration(stages, saved)
        return
    calibration = Calibration(saved.steps, multiply_adds=saved.multiply_adds)
    if stages.stage == "observe":
        stages.convert(_plan(stages, saved), calibration)
    else:
        _bring_back_smoothing_scales(stages, saved)
        stages.calibration = calibration


def _calibration(stages: Stages, saved: SavedState) -> Calibration:
    """Returns what the saved steps had seen."""
    if stages.stage != "observe":
        raise CheckpointError(
            "model: is int8 already, but the state was saved while it was observed in float, expected a model that is "
            "observed. Load the base model anew and compile it."
        )
    statistics = {}
    for site in _matching_sites(stages, saved):
        name, device = site.weight_name, site.weight.device
        _check_checksum(site, site.weight, saved)
        tensors = {key: saved.tensors[f"{name}.{key}"].to(device, copy=True) for key in STATISTICS}
        entry = saved.sites[name]
        statistics[name] = Statistics(**tensors, in_dim=entry["in_dim_seen"], steps=entry["steps"])
    return Calibration(saved.steps, statistics, saved.multiply_adds)


def _plan(stages: Stages, saved: SavedState) -> Plan:
    """Returns what makes the observed weights what they were in the saved model."""
    convert.check_whole(stages.active_sites())
    plan, groups = Plan(), dict[int, OutlierState]()
    for site in _matching_sites(stages, saved):
        entry = saved.sites.get(site.weight_name)
        if entry is None:
            plan.left_alone.append((site, saved.left_alone[site.weight_name]))
            continue
        group = entry["outliers"]
        if group not in groups:
            groups[group] = _outlier_state(saved, group, site.weight.device, stages.config)
        choice = Choice(site, outliers=groups[group], **{name: entry[name] for name in NUMBERS})
        if site.weight.is_int8:
            _check_checksum(site, site.weight, saved)
            plan.columns[site.weight_name] = site.observed.columns(choice.outliers.outlier_channels, choice.in_dim)
        else:
            # Made twice, here and when the plan is carried out: both forms of all weights at once may not fit.
            _check_checksum(site, convert.converted(choice), saved)
        plan.choices.append(choice)
    return plan


def _outlier_state(saved: SavedState, group: int, device: torch.device, config: QuaffConfig) -> OutlierState:
    tensors = {name: saved.tensors[f"outliers.{group}.{name}"].to(device, copy=True) for name in OUTLIERS}
    next_smoothing_scale = tensors.pop("next_smoothing_scale")
    momentum = STATIC_MOMENTUM if config.smoothing == "split" else float(config.momentum)
    outliers = OutlierState(**tensors, momentum=momentum)
    outliers.next_smoothing_scale.copy_(next_smoothing_scale)
    return outliers


def _bring_back_smoothing_scales(stages: Stages, saved: SavedState) -> None:
    sites = _matching_sites(stages, saved)
    groups: dict[int, OutlierState] = {}
    numbers: dict[int, int] = {}
    for site in sites:
        entry, quantized = saved.sites[site.weight_name], site.quantized
        outliers, group = quantized.outliers, entry["outliers"]
        channels = saved.tensors[f"outliers.{group}.outlier_channels"]
        is_same = (
            groups.setdefault(group, outliers) is outliers
            and numbers.setdefault(id(outliers), group) == group
            and torch.equal(outliers.outlier_channels.cpu(), channels)
            and all(getattr(quantized, name) == entry[name] for name in NUMBERS)
        )
        if not is_same:
            raise CheckpointError(
                f"{site.weight_name}: was converted with other outlier channels than the state has, expected the same: "
                "the float weights that others would be taken from are gone. Load the base model anew and compile it."
            )
        _check_checksum(site, quantized, saved)
    for group, outliers in groups.items():
        for name in OUTLIERS:
            getattr(outliers, name).copy_(saved.tensors[f"outliers.{group}.{name}"])


def _check_config(config: QuaffConfig, saved: SavedState) -> None:
    is_free = {"progress"} | ({"calibration_steps"} if saved.stage == "quantize" else set())
    here = _plain(config)
    for name in sorted((here.keys() | saved.config.keys()) - is_free):
        if here.get(name) != saved.config.get(name):
            raise CheckpointError(
                f"config: {name} is {here.get(name)!r}, expected {saved.config.get(name)!r}, as the saved run had it. "
                "Give quaff_fx.compile the config of that run, or start anew."
            )


def _matching_sites(stages: Stages, saved: SavedState) -> list[Site]:
    """Returns the active sites; raises `CheckpointError` unless they are those of the saved state, in form as well."""
    sites = {site.weight_name: site for site in stages.active_sites()}
    reasons = {site.weight_name: site.reason for site in stages.sites if site.reason}
    for name in saved.sites:
        if name not in sites:
            near = difflib.get_close_matches(name, sites, n=3, cutoff=0.6)
            there = f"is left alone here ({reasons[name]})" if name in reasons else "is no frozen weight of the model"
            there += f" (near: {', '.join(near)})" if near and name not in reasons else ""
            raise CheckpointError(
                f"{name}: is in the state but {there}, expected the layers of the saved model. Compile the model that "
                "the state was saved from."
            )
    for name, site in sites.items():
        entry = saved.sites.get(name)
        if entry is None:
            was_left_alone_at_conversion = saved.stage == "quantize" and stages.stage == "observe"
            if was_left_alone_at_conversion and name in saved.left_alone:
                continue
            raise CheckpointError(
                f"{name}: is not in the state, expected the layers of the saved model. Compile the model that the "
                "state was saved from."
            )
        for key, value in _form(site).items():
            if value != entry[key]:
                raise CheckpointError(
                    f"{name}: has {key} {value}, expected {entry[key]} as in the state. Load the base model that the "
                    "state was saved with, in the same dtype."
                )
    return list(sites.values())


def _check_checksum(site: Site, weight: Weight, saved: SavedState) -> None:
    if _checksum(weight) != saved.sites[site.weight_name]["crc32"]:
        raise CheckpointError(
            f"{site.weight_name}: has other values than in the saved run (their checksums differ), expected the same "
            "base weights, loaded in the same way. Load the base model that the state was saved with."
        )
