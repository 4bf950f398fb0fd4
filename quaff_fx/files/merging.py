"""Merging adapters of PEFT into the float weights of a checkpoint on disk.

All maths of adapters is PEFT's own: each adapter is merged by its own ``merge`` into a float layer that is built from
the stored weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from quaff_fx import distributed
from quaff_fx.errors import CheckpointError, WeightError
from quaff_fx.files import checkpoint
from quaff_fx.files.checkpoint import PathLike
from quaff_fx.files.stored_tensor import StoredTensor, stored_tensors
from quaff_fx.hosts import peft
from quaff_fx.hosts.peft import DEQUANTIZE
from quaff_fx.weights import owners


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
    files = checkpoint.files_of(source)
    if not source.is_dir():
        raise CheckpointError(f"{source}: is a file, expected the folder of a checkpoint. Pass the folder it lies in.")
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"{output}: exists, expected a new or an empty folder. Choose another one.")
        stored = checkpoint.stored_in(files)
        base = peft.base_model(model)
        parts = [_Part(**vars(module)) for module in peft.adapted_modules(base)]
        _check_adapters(parts, adapter_names)
        part_of = _parts_by_tensor(base, parts, stored, source)

        def write(folder: Path) -> None:
            _write_merged(files, source, folder, part_of, adapter_names, progress)
            checkpoint.copy_other_files(source, folder, files)
            _check_written(files, source, folder, stored)

        checkpoint.make_folder(output, write)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{output}: cannot be written ({error}), expected room for a copy of {source}. Nothing was left there."
        ) from error
    return output


@dataclass
class _Part(peft.AdaptedModule):
    """A module that owns weights, with `stored`, where its parameters are stored, by the name of the parameter."""

    stored: dict[str, StoredTensor] = field(default_factory=dict)


def _check_adapters(parts: list[_Part], adapter_names: list[str] | None) -> None:
    for part in parts:
        if part.is_merged:
            raise WeightError(
                f"{part.name}: its adapter is merged already, expected a separate one. Call unmerge_adapter() first."
            )
    for part in parts:
        if any(distributed.is_sharded(tensor) for tensor in (part.layer or part.base).parameters()):
            raise WeightError(
                f"{part.name}: is sharded, expected whole weights. Save the adapter, load it on a model that is not "
                "sharded, and merge there."
            )
    known = {name for part in parts for name in part.adapter_names}
    for name in adapter_names or ():
        if name not in known:
            raise WeightError(
                f"adapter_names: has {name!r}, expected some of {sorted(known)}. Correct the name, or leave it out."
            )
    if not any(part.is_adapted for part in parts):
        raise WeightError(
            "model: has no adapter and no weight that was trained, expected some. Nothing is to be merged."
        )


def _parts_by_tensor(
    base: nn.Module, parts: list[_Part], stored: dict[str, StoredTensor], source: Path
) -> dict[str, _Part]:
    """Gives each part its stored tensors; returns the parts by the names in the files.

    Raises:
        CheckpointError: the names, shapes or dtypes do not fit.
    """
    known = {part.name_of(parameter) for part in parts for parameter in part.parameters}
    by_name = checkpoint.renamed(base, stored, known)
    tied = _tied(base)
    is_renamed = any(name not in known for name in by_name)  # as transformers does with some while it loads
    part_of = {}
    for part in parts:
        for parameter in part.parameters:
            name = part.name_of(parameter)
            if part.is_adapted and name in tied:
                raise CheckpointError(
                    f"{name}: is tied to {tied[name][0]}, expected an adapter on a weight of one place only: the files "
                    f"hold it once. {DEQUANTIZE}"
                )
            if name not in by_name and any(other in by_name for other in tied.get(name, ())):
                continue
            if name not in by_name:
                if part.is_adapted or owners.states_of(part.base):
                    raise CheckpointError(
                        f"{name}: is not in {source}{checkpoint.near(name, by_name)}, expected every weight that an "
                        "adapter changes. Pass the folder that the model was made from."
                    )
                if not is_renamed:
                    raise CheckpointError(
                        f"{name}: is not in {source}, expected every weight of the model: a copy would lack it too. "
                        "Fetch or save the checkpoint again."
                    )
                continue
            tensor = by_name[name]
            shape = owners.weight_of(part.base, parameter).shape
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
            part_of[tensor.name] = part
    return part_of


def _tied(base: nn.Module) -> dict[str, list[str]]:
    """The weights that have more than one name, as parameters or in int8, each with its other ones."""
    names: dict[int, list[str]] = {}
    for prefix, module in base.named_modules(remove_duplicate=False):
        for parameter, weight in owners.weights_in(module).items():
            names.setdefault(id(weight), []).append(peft.stored_name(f"{prefix}.{parameter}"))
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
        part.merge_into(base, adapter_names)
        values |= {parameter: base._parameters[parameter].data for parameter in values}  # type: ignore[union-attr]
    merged = {parameter: value.to("cpu", before[parameter].dtype) for parameter, value in values.items()}
    return {
        part.stored[parameter].name: value.contiguous()
        for parameter, value in merged.items()
        if not torch.equal(value, before[parameter])
    }


def _unmerged(part: _Part, parameter: str, stored: Tensor) -> Tensor:
    """Returns the float value that an adapter is merged into: the stored one, or the model's where that was trained."""
    if owners.weight_of(part.base, parameter).is_made_from(stored):
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
        f"LoftQ), merge in memory. {DEQUANTIZE}"
    )


def _float_module(base: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Returns a module like `base` with these values as parameters, where the adapter is."""
    device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))
    cls = owners.base_class(base)
    module: nn.Module = cls.__new__(cls)
    module.__dict__.update(base.__dict__)
    kept = {name: child for name, child in base._modules.items() if not name.startswith(owners.SLOT_PREFIX)}
    parameters = {
        name: nn.Parameter(value.to(device, copy=True), requires_grad=False) for name, value in values.items()
    }
    module.__dict__.update(_modules=kept, _parameters={**base._parameters, **parameters})
    return module


def _write_merged(
    files: list[Path],
    source: Path,
    folder: Path,
    part_of: dict[str, _Part],
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
                part = part_of.get(name)
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
