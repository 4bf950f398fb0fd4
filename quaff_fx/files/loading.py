"""Loading a model from safetensors files with its frozen linears int8 from the start."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quaff_fx import numerics
from quaff_fx.config import QuaffConfig
from quaff_fx.errors import CheckpointError, ConfigError
from quaff_fx.files.checkpoint import (
    CONVERT,
    INDEX,
    SINGLE,
    PathLike,
    and_more,
    files_of,
    files_of_folder,
    near,
    renamed,
    shards_of,
    stored_in,
    weight_map_of,
)
from quaff_fx.files.stored_tensor import StoredTensor
from quaff_fx.hosts import is_conv1d
from quaff_fx.sites import CONFIG_ATTRIBUTE, Site, choose_blocks, find_sites
from quaff_fx.weights import LoadedWeight, owners
from quaff_fx.weights.layout import swapped_shape


def from_pretrained(
    model_class: Any, folder_or_id: PathLike, *, config: QuaffConfig | Mapping[str, Any] | None = None, **kwargs: Any
) -> Any:
    """Returns a transformers model, in evaluation mode, whose frozen linears were int8 before they were in memory.

    At its peak it takes the int8 model, the weights that stay in float (embeddings, norms, the head), and some tens of
    megabytes: a matrix is read and quantized part by part. Add an adapter, then call `quaff_fx.compile`. The files
    must stay where they are until the calibration is done: the outlier columns are read from them then.

    Args:
        model_class: ``AutoModelForCausalLM``, ``LlamaForCausalLM`` or the like.
        folder_or_id: a folder with safetensors files and a ``config.json``, or an id on the hub.
        config: which weights become int8; `compile` uses it as well if it gets none.
        **kwargs: ``dtype`` of the float weights, and what `AutoConfig.from_pretrained` and the model's constructor
            take: ``revision``, ``cache_dir``, ``token``, ``subfolder``, ``local_files_only``, ``trust_remote_code``,
            ``attn_implementation``, and fields of the model's config.

    Raises:
        ConfigError: the config is wrong, or an argument that loads in another way was given.
        CheckpointError: there are no safetensors files, or they do not fit the model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    for name in ("device_map", "quantization_config", "gguf_file", "state_dict", "variant", "use_safetensors"):
        if kwargs.pop(name, None) not in (None, True):
            raise ConfigError(
                f"{name}: is given, expected none: from_pretrained reads plain safetensors files onto the CPU. "
                "Leave it out; move the model with .to(device) afterwards."
            )
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    remote = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    model_config, unused = AutoConfig.from_pretrained(folder_or_id, return_unused_kwargs=True, **kwargs)
    unused = {name: value for name, value in unused.items() if name not in (*_HUB_ARGUMENTS, *remote)}
    files = _resolved_files(folder_or_id, hub)
    if dtype in ("auto", None):
        dtype = model_config.dtype or _first_floating_dtype(files)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype: is {dtype!r}, expected a floating torch.dtype or 'auto'. Choose one.")

    make = getattr(model_class, "from_config", None) or model_class._from_config
    # Buffers are made here: real ones, that may take part in training, whatever this is called under.
    with torch.inference_mode(False), torch.device("cpu"), init_empty_weights(include_buffers=False):
        is_auto = make is not getattr(model_class, "_from_config", None)
        model = make(model_config, dtype=dtype, **(remote if is_auto else {}), **unused)
    model.tie_weights()  # accelerate's parameters are new ones
    _load(model, files, _checked(config), dtype)
    model.name_or_path = model.config._name_or_path = str(folder_or_id)
    _load_generation_config(model, folder_or_id, hub)
    return model.eval()


def load_checkpoint(
    model: nn.Module,
    files: PathLike | Iterable[PathLike],
    config: QuaffConfig | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Fills `model`, built on the meta device, from safetensors files, in place; returns the same object.

    Matrices of `nn.Linear` and Conv1D in the repeated blocks, and a head, become int8, part by part; all else is float.
    Parameters that are one object stay one. Names and shapes in all files are checked before any tensor is loaded.

    Args:
        model: its parameters on the meta device, its buffers real.
        files: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, one file, or several.
        config: which weights become int8; `compile` uses it as well if it gets none.
        dtype: of the float weights; None: as they are stored.

    Whatever ends the loading in the middle (an interrupt, no memory), the model is as it was, and can be filled again.

    Raises:
        ConfigError: the config is wrong, or no weight could be int8.
        CheckpointError: a file is missing, truncated or of another kind, or names or shapes do not fit the model.
    """
    _load(model, files_of(files), _checked(config), dtype)
    return model


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class _Target:
    """One parameter or buffer of the model, every place that owns it, and where it is stored.

    Attributes:
        places: owner and name there. names: the dotted ones. tensor: what is there now. stored: the first that exists.
    """

    places: list[tuple[nn.Module, str]]
    names: list[str]
    tensor: Tensor
    stored: StoredTensor


def _checked(config: QuaffConfig | Mapping[str, Any] | None) -> QuaffConfig:
    config = QuaffConfig(**(config or {})) if config is None or isinstance(config, Mapping) else config
    if not isinstance(config, QuaffConfig):
        raise ConfigError(f"config: is a {type(config).__name__}, expected a QuaffConfig, a mapping or None. Pass one.")
    return config


@torch.inference_mode(False)  # what is loaded may take part in training
def _load(model: nn.Module, files: list[Path], config: QuaffConfig, dtype: torch.dtype | None) -> None:
    for name, module in model.named_modules():
        if owners.states_of(module):
            raise ConfigError(f"{name}: holds int8 weights already, expected a model with plain ones. Build a new one.")
    targets = _plan(model, stored_in(files))
    sites = find_sites(model, config, is_loading=True)
    for site in sites:
        if not site.reason and _in_dim(site) is None:
            site.reason = "its module is no linear"
    choose_blocks(model, sites, config)
    chosen = {(id(module), name): site for site in sites if not site.reason for module, name in site.places}
    with _given_back(model), tqdm(targets, desc="quaff_fx: loading", disable=not config.progress, leave=False) as bar:
        for target in bar:
            module, name = target.places[0]
            chosen_site = chosen.get((id(module), name))
            if chosen_site is None or not _load_int8(chosen_site, target.stored, dtype, config):
                _load_float(target, dtype)
        setattr(model, CONFIG_ATTRIBUTE, config)


@contextmanager
def _given_back(model: nn.Module) -> Iterator[None]:
    """Makes a model what it was before if anything ends its loading: classes, parameters, buffers, submodules."""
    before: list[tuple[nn.Module, type[nn.Module], list[tuple[dict[str, Any], dict[str, Any]]]]] = [
        (module, type(module), [(d, dict(d)) for d in (module._parameters, module._buffers, module._modules)])
        for module in model.modules()
    ]
    own = dict(vars(model))
    try:
        yield
    except BaseException:
        for module, kind, contents in before:
            module.__class__ = kind
            for owned, content in contents:
                owned.clear()
                owned.update(content)
        vars(model).pop(CONFIG_ATTRIBUTE, None)
        vars(model).update(own)
        raise


def _load_float(target: _Target, dtype: torch.dtype | None) -> None:
    value = target.stored.read(dtype)
    if isinstance(target.tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=target.tensor.requires_grad and value.is_floating_point())
    for module, name in target.places:
        if isinstance(value, nn.Parameter):
            module._parameters[name] = value
        else:
            module._buffers[name] = value


def _load_int8(site: Site, stored: StoredTensor, dtype: torch.dtype | None, config: QuaffConfig) -> bool:
    """Gives the site its weight in int8, read in parts; False if it must stay in float: not finite or not floating."""
    in_dim = _in_dim(site)
    assert in_dim is not None
    dtype = dtype or stored.dtype
    if not dtype.is_floating_point:
        return False
    shape = swapped_shape(stored.shape, in_dim)
    rotation = numerics.rotation_block(shape[1], config.largest_rotation)
    w_int8 = torch.empty(shape, dtype=torch.int8, device="cpu")
    w_scale = torch.empty(shape[0], dtype=torch.float32, device="cpu")
    start = 0
    for rows in stored.rows(in_dim, dtype):
        part = slice(start, start + rows.shape[0])
        w_int8[part], w_scale[part] = numerics.quantize_weight(rows, rotation)
        start += rows.shape[0]
    if not bool(torch.isfinite(w_scale).all()):
        return False
    loaded = LoadedWeight(w_int8, w_scale, in_dim, rotation, dtype, stored)
    for module, name in site.places:
        owners.attach(module, owners.states_of(module) | {name: loaded})
    return True


def _in_dim(site: Site) -> int | None:
    """The dimension that products with a weight reduce over; None unless linears of one layout are all that owns it."""
    layouts = {
        None if name != "weight" else 1 if isinstance(module, nn.Linear) else 0 if is_conv1d(module) else None
        for module, name in site.places
        if not isinstance(module, nn.Embedding)  # which takes rows of whatever its linear reads
    }
    return layouts.pop() if len(layouts) == 1 else None


def _plan(model: nn.Module, stored: dict[str, StoredTensor]) -> list[_Target]:
    """Returns what is to be loaded from where; raises `CheckpointError` if names, shapes or tied values do not fit."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    names: dict[int, list[str]] = defaultdict(list)
    tensors: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):  # files may have any name of a module
        owned = [*module._parameters.items()]
        owned += [(n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
        for name, tensor in owned:
            if tensor is not None:
                places[id(tensor)].append((module, name))
                names[id(tensor)].append(f"{prefix}.{name}" if prefix else name)
                tensors[id(tensor)] = tensor
    known = {name for same in names.values() for name in same}
    stored = renamed(model, stored, known)

    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    unexpected = [n for n in stored if n not in known and not any(re.search(pattern, n) for pattern in ignored)]
    missing = [same[0] for same in names.values() if not any(name in stored for name in same)]
    if missing:
        raise CheckpointError(
            f"{missing[0]}: is missing in the files{and_more(missing)}{near(missing[0], unexpected or stored)}, "
            "expected every parameter of the model. Use the class that the checkpoint was saved from."
        )
    if unexpected:
        raise CheckpointError(
            f"{unexpected[0]}: is in the files but not in the model{and_more(unexpected)}"
            f"{near(unexpected[0], known)}, expected only its parameters. Use the class that the checkpoint was saved "
            "from."
        )
    targets = []
    for key, tensor in tensors.items():
        found = [name for name in names[key] if name in stored]
        for name in found:
            if stored[name].shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{name}: has shape {stored[name].shape} in the files, expected {tuple(tensor.shape)}. "
                    "Use the config that the checkpoint was saved with."
                )
            if stored[name].dtype.is_floating_point != tensor.is_floating_point():
                raise CheckpointError(
                    f"{name}: is stored as {stored[name].dtype}, expected {tensor.dtype} or alike. Use a checkpoint "
                    "that is not quantized, and is of this model."
                )
        for name in found[1:]:
            if not torch.equal(stored[found[0]].read(), stored[name].read()):
                raise CheckpointError(
                    f"{name}: differs from {found[0]} in the files, expected equal values since the model ties them. "
                    "Build the model without tying (tie_word_embeddings=False)."
                )
        targets.append(_Target(places[key], names[key], tensor, stored[found[0]]))
    return targets


def _resolved_files(folder_or_id: PathLike, hub: dict[str, Any]) -> list[Path]:
    """The safetensors files of a folder or of an id on the hub, fetched by transformers if they are not here."""
    if Path(folder_or_id).is_dir():
        return files_of_folder(Path(folder_or_id) / (hub.get("subfolder") or ""))
    from transformers.utils import hub as transformers_hub

    optional = {"_raise_exceptions_for_missing_entries": False}
    if (single := transformers_hub.cached_file(folder_or_id, SINGLE, **optional, **hub)) is not None:
        return [Path(single)]
    if (index := transformers_hub.cached_file(folder_or_id, INDEX, **optional, **hub)) is not None:
        transformers_hub.cached_files(folder_or_id, sorted(set(weight_map_of(Path(index)).values())), **hub)
        return shards_of(Path(index))  # fetched, and in one folder with it
    raise CheckpointError(f"{folder_or_id}: has no safetensors file, expected {SINGLE} or {INDEX}. {CONVERT}")


def _first_floating_dtype(files: list[Path]) -> torch.dtype:
    dtypes = (tensor.dtype for tensor in stored_in(files).values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _load_generation_config(model: Any, folder_or_id: PathLike, hub: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder_or_id, **hub)
    except OSError:  # there is none: the one made from the model's config stays
        return
