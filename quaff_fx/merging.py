"""Merging adapters of PEFT: into the float weights of a checkpoint on disk; merging into int8 weights is refused.

All maths of adapters is PEFT's own: each adapter is merged by its own ``merge`` into a float layer that is built from
the stored weight.
"""

from __future__ import annotations

import contextlib
import copy
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from quaff_fx import checkpoint, distributed, state
from quaff_fx.checkpoint import PathLike
from quaff_fx.errors import CheckpointError, WeightError
from quaff_fx.stored_tensor import StoredTensor, stored_tensors

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".onnx")
_DEQUANTIZE = "Call quaff_fx.dequantize(model), merge_and_unload() and save_pretrained instead."


def merge_into_checkpoint(
    model: nn.Module,
    source: PathLike,
    output: PathLike,
    *,
    adapter_names: list[str] | None = None,
    progress: bool = True,
) -> Path:
    """Writes a copy of the checkpoint in folder `source`, adapters merged into its float weights; returns its folder.

    The int8 weights of `model` are not used: what is merged into is what was stored, so nothing of the quantization is
    left in the result. Each tensor keeps its name, shard and dtype, and is what PEFT's ``merge_and_unload`` gives on
    the model in that dtype. Embeddings, heads, biases and norms that were trained are written as the model holds them.
    The files beside the weights (config, tokenizer) are copied, also from folders without weights of their own. Never
    more than one shard is in memory. `output` appears when it is complete, which is read again, or not at all; `model`
    stays as it is.

    Args:
        model: with adapters of PEFT, quantized or not, made from the checkpoint in `source`.
        source: a folder with ``model.safetensors`` or ``model.safetensors.index.json``.
        output: a folder that does not exist yet, or is empty.
        adapter_names: which adapters to merge, in order; None: the active ones.
        progress: shows a progress bar.

    Raises:
        CheckpointError: `source` is not what the model was made from (names, shapes or values differ), cannot be read,
            or `output` cannot be written.
        WeightError: the model has nothing to merge, is merged already, or an adapter cannot be merged.
    """
    source, output = Path(source), Path(output)
    files = checkpoint._files(source)
    if not source.is_dir():
        raise CheckpointError(f"{source}: is a file, expected the folder of a checkpoint. Pass the folder it lies in.")
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"{output}: exists, expected a new or an empty folder. Choose another one.")
        stored = checkpoint._stored(files)
        base = _base_model(model)
        parts = _parts(base)
        _check_adapters(parts, adapter_names)
        owners = _owners(base, parts, stored, source)

        def write(folder: Path) -> None:
            _write_merged(files, source, folder, owners, adapter_names, progress)
            _copy_other_files(source, folder, files)
            _check_written(files, source, folder, stored)

        _make_folder(output, write)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{output}: cannot be written ({error}), expected room for a copy of {source}. Nothing was left there."
        ) from error
    return output


def _make_folder(output: Path, write: Callable[[Path], None]) -> None:
    """Makes a folder that holds what `write` puts into it; it appears at the end, or with any error not at all."""
    target = output.resolve()  # an empty folder may be there as a link
    missing_parents = [parent for parent in target.parents if not parent.exists()]
    # Beside the output, so that it becomes it at once, under a name that nobody else has.
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        folder.mkdir(parents=True)
        write(folder)
        folder.replace(target)
    except BaseException:  # an interrupt as well
        shutil.rmtree(folder, ignore_errors=True)
        for parent in missing_parents:
            with contextlib.suppress(OSError):  # someone has put something there
                parent.rmdir()
        raise


@dataclass
class _Part:
    """A module of the base model that owns weights, with the adapter around it.

    Attributes:
        name: of the module in the base model. base: the module. layer: the adapter layer around it, None if there is
            none. is_trained: its weights are an adapter's own copy (``modules_to_save``).
        stored: where its parameters are stored, by the name of the parameter.
    """

    name: str
    base: nn.Module
    layer: Any
    is_trained: bool
    stored: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """The names of its parameters, int8 ones included."""
        return list(state.weights_in(self.base))

    @property
    def is_adapted(self) -> bool:
        """Whether there is anything that training may have changed."""
        trained = any(p is not None and p.requires_grad for p in self.base._parameters.values())
        return self.layer is not None or self.is_trained or trained

    def name_of(self, parameter: str) -> str:
        """The dotted name of a parameter in the base model."""
        return f"{self.name}.{parameter}" if self.name else parameter


def _base_model(model: nn.Module) -> nn.Module:
    """The model that PEFT wraps, or the model itself."""
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


def _parts(base: nn.Module) -> list[_Part]:
    """Every module of the base model that owns weights, without those that are adapters' own."""
    tuners, wrappers = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    parts: list[_Part] = []

    def visit(module: nn.Module, name: str, is_trained: bool) -> None:
        if wrappers is not None and isinstance(module, wrappers.ModulesToSaveWrapper):
            is_active = bool(module.active_adapters)
            inner = module.modules_to_save[module.active_adapter] if is_active else module.original_module
            visit(inner, name, is_active)
            return
        if wrappers is not None and isinstance(module, wrappers.AuxiliaryTrainingWrapper):
            raise WeightError(
                f"{name}: is wrapped in {type(module).__name__}, expected an adapter layer or a module to save. "
                f"{_DEQUANTIZE}"
            )
        layer = None
        if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
            layer, module = module, module.get_base_layer()
        part = _Part(name, module, layer, is_trained)
        if part.parameters:
            parts.append(part)
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name, is_trained)

    visit(base, "", False)
    return parts


def _check_adapters(parts: list[_Part], adapter_names: list[str] | None) -> None:
    layers = [part for part in parts if part.layer is not None]
    for part in layers:
        if part.layer.merged:
            raise WeightError(
                f"{part.name}: its adapter is merged already, expected a separate one. Call unmerge_adapter() first."
            )
    for part in parts:
        if any(distributed.is_sharded(tensor) for tensor in (part.layer or part.base).parameters()):
            raise WeightError(
                f"{part.name}: is sharded, expected whole weights. Save the adapter, load it on a model that is not "
                "sharded, and merge there."
            )
    known = {name for part in layers for name in part.layer._get_available_adapters()}
    for name in adapter_names or ():
        if name not in known:
            raise WeightError(
                f"adapter_names: has {name!r}, expected some of {sorted(known)}. Correct the name, or leave it out."
            )
    if not any(part.is_adapted for part in parts):
        raise WeightError(
            "model: has no adapter and no weight that was trained, expected some. Nothing is to be merged."
        )


def _owners(base: nn.Module, parts: list[_Part], stored: dict[str, StoredTensor], source: Path) -> dict[str, _Part]:
    """Gives each part its stored tensors; returns the parts by the names in the files.

    Raises:
        CheckpointError: the names, shapes or dtypes do not fit.
    """
    known = {part.name_of(parameter) for part in parts for parameter in part.parameters}
    by_name = checkpoint._renamed(base, stored, known)
    tied = _tied(base)
    is_renamed = any(name not in known for name in by_name)  # as transformers does with some while it loads
    owners = {}
    for part in parts:
        for parameter in part.parameters:
            name = part.name_of(parameter)
            if part.is_adapted and name in tied:
                raise CheckpointError(
                    f"{name}: is tied to {tied[name][0]}, expected an adapter on a weight of one place only: the files "
                    f"hold it once. {_DEQUANTIZE}"
                )
            if name not in by_name and any(other in by_name for other in tied.get(name, ())):
                continue
            if name not in by_name:
                if part.is_adapted or state.states_of(part.base):
                    raise CheckpointError(
                        f"{name}: is not in {source}{checkpoint._near(name, by_name)}, expected every weight that an "
                        "adapter changes. Pass the folder that the model was made from."
                    )
                if not is_renamed:
                    raise CheckpointError(
                        f"{name}: is not in {source}, expected every weight of the model: a copy would lack it too. "
                        "Fetch or save the checkpoint again."
                    )
                continue
            tensor = by_name[name]
            shape = state.weight_of(part.base, parameter).shape
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{name}: has shape {tensor.shape} in {source}, expected {shape}. Pass the folder that the model "
                    "was made from."
                )
            if not tensor.dtype.is_floating_point:
                raise CheckpointError(
                    f"{name}: is stored as {tensor.dtype}, expected a floating dtype. Pass a checkpoint that is not "
                    "quantized."
                )
            part.stored[parameter] = tensor
            owners[tensor.name] = part
    return owners


def _tied(base: nn.Module) -> dict[str, list[str]]:
    """The weights that have more than one name, as parameters or in int8, each with its other ones."""
    names: dict[int, list[str]] = {}
    for prefix, module in base.named_modules(remove_duplicate=False):
        parts = [part for part in prefix.split(".") if part not in ("", "base_layer", "original_module")]
        for parameter, weight in state.weights_in(module).items():
            names.setdefault(id(weight), []).append(".".join([*parts, parameter]))
    same = [sorted(set(names)) for names in names.values()]
    return {name: [n for n in names if n != name] for names in same if len(names) > 1 for name in names}


@torch.no_grad()
def _merged(part: _Part, adapter_names: list[str] | None) -> dict[str, Tensor]:
    """Returns the tensors of a part that differ from the stored ones, by their names in the files.

    Raises:
        CheckpointError: a frozen weight of the model is not what is stored. WeightError: PEFT cannot merge.
    """
    before = {parameter: stored.read() for parameter, stored in part.stored.items()}
    values = {parameter: _unmerged(part, parameter, value) for parameter, value in before.items()}
    if part.layer is not None:
        base = _float_module(part.base, values)
        layer = copy.deepcopy(part.layer, {id(part.base): base})
        try:
            layer.merge(safe_merge=True, adapter_names=adapter_names)
        except Exception as error:
            raise WeightError(
                f"{part.name}: PEFT cannot merge its adapter ({error}), expected one that merges. Nothing was written."
            ) from error
        values |= {parameter: base._parameters[parameter].data for parameter in values}  # type: ignore[union-attr]
    merged = {parameter: value.to("cpu", before[parameter].dtype) for parameter, value in values.items()}
    return {
        part.stored[parameter].name: value.contiguous()
        for parameter, value in merged.items()
        if not torch.equal(value, before[parameter])
    }


def _unmerged(part: _Part, parameter: str, stored: Tensor) -> Tensor:
    """Returns the float value that an adapter is merged into: the stored one, or the model's where that was trained."""
    if state.weight_of(part.base, parameter).is_made_from(stored):
        return stored
    plain = part.base._parameters.get(parameter)
    # A bias that was trained comes frozen out of a saved adapter (bias="all").
    if plain is None or not (plain.requires_grad or part.is_trained or parameter == "bias"):
        raise _differs(part.name_of(parameter), part.stored[parameter])
    return plain.detach().to("cpu", stored.dtype)


def _differs(name: str, stored: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"{name}: differs from {stored.name} in {stored.path} though it is frozen, expected the weight that the model "
        "was made from. Pass its folder; or if an adapter has changed the weight when it was added (PiSSA, OLoRA, "
        f"LoftQ), merge in memory. {_DEQUANTIZE}"
    )


def _float_module(base: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Returns a module like `base` with these values as parameters, where the adapter is."""
    device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))
    cls = state.base_class(base)
    module: nn.Module = cls.__new__(cls)
    module.__dict__.update(base.__dict__)
    kept = {name: child for name, child in base._modules.items() if not name.startswith(state.SLOT_PREFIX)}
    parameters = {
        name: nn.Parameter(value.to(device, copy=True), requires_grad=False) for name, value in values.items()
    }
    module.__dict__.update(_modules=kept, _parameters={**base._parameters, **parameters})
    return module


def _write_merged(
    files: list[Path],
    source: Path,
    folder: Path,
    owners: dict[str, _Part],
    adapter_names: list[str] | None,
    progress: bool,
) -> None:
    """Writes every shard to where it lies below `source`; raises `WeightError` if none differs from the stored one."""
    is_changed = False
    merged: dict[str, Tensor] = {}  # also what belongs to a module of an earlier shard
    done: set[int] = set()
    with tqdm(files, desc="quaff_fx: merging", disable=not progress, leave=False) as bar:
        for file in bar:
            tensors = {}
            for name, tensor in stored_tensors(file).items():
                part = owners.get(name)
                if part is not None and id(part) not in done:
                    merged |= _merged(part, adapter_names)
                    done.add(id(part))
                is_changed |= name in merged
                tensors[name] = merged.pop(name) if name in merged else tensor.read()
            with safe_open(str(file), framework="pt") as opened:
                metadata = {"format": "pt"} | (opened.metadata() or {})
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, target, metadata=metadata)
            del tensors
    assert not merged
    if not is_changed:
        raise WeightError(
            "model: holds nothing that the checkpoint does not, expected adapters or weights that were trained. There "
            "is nothing to merge."
        )


def _check_written(files: list[Path], source: Path, folder: Path, stored: dict[str, StoredTensor]) -> None:
    """Raises `CheckpointError` unless the files in `folder` hold each tensor where, and in the form that, it had.

    Two shards may have become one, in a file system that does not tell upper from lower case, say.
    """
    for file in files:
        there = stored_tensors(folder / file.relative_to(source))
        for name, tensor in stored.items():
            if tensor.path != str(file.absolute()):
                continue
            tensor.check_unchanged()
            found = there.get(name)
            if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"{name}: {'is missing' if found is None else f'is {found.dtype} of shape {found.shape}'} in the "
                    f"copy of {file}, expected {tensor.dtype} of shape {tensor.shape}. Nothing was left of the copy; "
                    "write it to another file system."
                )


def _copy_other_files(source: Path, folder: Path, files: list[Path]) -> None:
    """Copies config, tokenizer and the like, those in folders as well unless these hold weights of their own.

    No other weights, no index of others, and no config of an adapter, which would be loaded.
    """
    index = None if (source / checkpoint.SINGLE).is_file() else source / checkpoint.INDEX
    shards = set(files)

    def is_weight(path: Path) -> bool:
        return path.suffix in _WEIGHT_FILES and path.is_file()

    def copy_folder(here: Path) -> None:
        for path in sorted(here.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir() and not path.is_symlink():
                # Else it is another model: a checkpoint of the training, what was merged before.
                if all(below in shards for below in path.rglob("*") if is_weight(below)):
                    copy_folder(path)
                continue
            is_index = path.name.endswith(".index.json") and path != index
            if path.is_file() and not is_weight(path) and not is_index and path.name != "adapter_config.json":
                target = folder / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)

    copy_folder(source)
