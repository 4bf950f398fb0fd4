"""What a person calls: `compile`, `calibrate`, `dequantize`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quaff_fx import calls, hosts
from quaff_fx.config import QuaffConfig
from quaff_fx.errors import CalibrationError, ConfigError
from quaff_fx.sites import check_loaded, choose_blocks, config_of, find_sites
from quaff_fx.stages import ATTRIBUTE, Stages
from quaff_fx.weights import owners

Model = TypeVar("Model", bound=nn.Module)


def compile(model: Model, config: QuaffConfig | Mapping[str, Any] | None = None) -> Model:
    """Prepares `model`, in place, for fine-tuning with int8 weights and activations; returns the same object.

    The first ``config.calibration_steps`` training steps run in float, as they would without this, and are observed;
    the next forward converts the frozen weights to int8, frees the float ones and compiles. A step is a forward with
    gradients whose backward runs, of the model or of a part of it that holds its blocks. Class, `forward` signature,
    hooks and everything that is trainable stay as they are; the training loop does not change.

    Args:
        model: with some frozen weight matrices, usually a base model with a PEFT adapter.
        config: a `QuaffConfig`, a mapping of its fields, or None for the one it was loaded with, else the defaults.

    Raises:
        ConfigError: the config is wrong, the model has nothing to quantize, or is compiled already. The model is left
            as it was.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: is a {type(model).__name__}, expected a torch.nn.Module. Pass the model itself.")
    if config is None:
        config = config_of(model) or QuaffConfig()
    if isinstance(config, Mapping):
        config = QuaffConfig(**config)
    if not isinstance(config, QuaffConfig):
        raise ConfigError(f"config: is a {type(config).__name__}, expected a QuaffConfig, a mapping or None. Pass one.")
    for name, module in model.named_modules():
        if ATTRIBUTE in module.__dict__ or owners.quantized_in(module):
            raise ConfigError(
                f"{name or 'model'}: was already compiled by quaff_fx, expected a plain model. Use it as it is (an "
                "adapter can be added to it), or call quaff_fx.dequantize(model) first."
            )
        if calls.is_compiled(module):
            raise ConfigError(
                f"{name or 'model'}: was already compiled by torch.compile, expected an uncompiled model. "
                "quaff_fx.compile compiles it; leave torch.compile out."
            )
    sites = find_sites(model, config)
    blocks = choose_blocks(model, sites, config)
    check_loaded(sites)
    stages = Stages(model, config, sites, blocks or [model])
    try:
        stages.install()
    except BaseException:
        stages.uninstall()
        raise
    return model


def calibrate(model: Model, batches: Iterable[Any], *, forward: Callable[[Model, Any], Any] | None = None) -> Model:
    """Observes `batches` without training, then converts at once: for those who calibrate before, as the paper does.

    Args:
        model: compiled by `compile` and not yet converted.
        batches: at least one; a mapping is passed as keywords, a tuple or list as arguments, a tensor as it is.
        forward: how to run the model on a batch, if differently.

    Raises:
        CalibrationError: there was no batch, the model was converted before, or an activation was not finite.
    """
    stages = stages_of(model)
    is_again = stages.mode_before_calibrate is not None  # an earlier call was interrupted: this one goes on
    if stages.stage != "observe" and not is_again:
        raise CalibrationError(
            "model: was calibrated before: its weights are int8 already, expected a model that is still observed. "
            "Calibrate before training."
        )
    before = stages.calibration
    if not is_again:
        stages.mode_before_calibrate = model.training
    try:
        if stages.stage == "observe" and not stages.is_converting:
            model.eval()
            _observe(stages, model, batches, forward or _forward)
        stages.convert()
    except BaseException:
        if stages.stage == "observe" and not stages.is_converting:  # another call begins anew
            stages.calibration = before
        raise
    finally:
        model.train(bool(stages.mode_before_calibrate))
    stages.mode_before_calibrate = None
    return model


def _observe(stages: Stages, model: Model, batches: Iterable[Any], forward: Callable[[Model, Any], Any]) -> None:
    with torch.no_grad(), hosts.without_kv_cache(model):
        for batch in tqdm(batches, desc="quaff_fx: calibrating", disable=not stages.config.progress, leave=False):
            stages.observe_now(lambda batch=batch: forward(model, batch))  # type: ignore[misc]
    if stages.steps == 0:
        raise CalibrationError("batches: are empty, expected at least one. Pass some batches of the training data.")


def dequantize(model: Model) -> Model:
    """Gives `model` plain float weights again, in place, and takes the compiled calls away; returns the same object.

    Before conversion the weights are the original ones (the int8 values times their scales if they were loaded as
    int8); afterwards the int8 values times their scales, with the outlier columns exact. Merge adapters or call
    `save_pretrained` after this.

    Args:
        model: what `compile` returned, a model that holds it or that it holds, or a copy of a part of one.

    Raises:
        ConfigError: the model was not compiled by quaff_fx and holds no int8 weight.
    """
    every = _all_stages(model)
    int8 = owners.int8_places(model)
    if not every and not int8:
        raise _not_compiled()
    for stages in every:
        stages.uninstall()
    for places in owners.int8_places(model):
        owners.restore(places)
    return model


def stages_of(model: nn.Module) -> Stages:
    """Returns the `Stages` of a compiled model, also when it is wrapped (by DDP, say), or without its adapter.

    Raises:
        ConfigError: there is none.
    """
    for stages in _all_stages(model):
        return stages
    raise _not_compiled()


def _all_stages(model: nn.Module) -> list[Stages]:
    found = (module.__dict__.get(ATTRIBUTE) for module in model.modules())
    return list(dict.fromkeys(stages for stages in found if isinstance(stages, Stages)))


def _not_compiled() -> ConfigError:
    return ConfigError("model: was not compiled by quaff_fx, expected a compiled one. Call quaff_fx.compile(model).")


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Tensor):
        return model(batch)
    return model(*batch)
