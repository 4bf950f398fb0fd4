"""A checkpoint on disk: its safetensors files, and what they hold by the names of a model."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath

from torch import nn

from quaff_fx.errors import CheckpointError
from quaff_fx.files.stored_tensor import StoredTensor, stored_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

PathLike = str | os.PathLike[str]

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".onnx")


def renamed(model: nn.Module, stored: dict[str, StoredTensor], known: set[str]) -> dict[str, StoredTensor]:
    """`stored` by the names of the model: a checkpoint of the bare decoder lacks a prefix, or has one too many."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix == "." or any(name in known for name in stored):
        return stored
    if any(prefix + name in known for name in stored):
        return {prefix + name: tensor for name, tensor in stored.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items()}


def stored_in(files: list[Path]) -> dict[str, StoredTensor]:
    """What all files hold, by name."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in stored_tensors(file).items():
            if name in found:
                raise CheckpointError(
                    f"{name}: is in {found[name].path} and in {file}, expected in one file. Pass one checkpoint only."
                )
            found[name] = tensor
    return found


def files_of(files: PathLike | Iterable[PathLike]) -> list[Path]:
    """The safetensors files of a folder, or those given."""
    if not isinstance(files, (str, os.PathLike)):
        paths = [Path(file) for file in files]
    elif Path(files).is_dir():
        return files_of_folder(Path(files))
    else:
        paths = [Path(files)]
    for path in paths:
        if not _is_file(path):
            raise CheckpointError(f"{path}: is no file, expected a safetensors file or a folder. Correct the path.")
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: is no safetensors file, expected one. {CONVERT}")
    if not paths:
        raise CheckpointError("files: are none, expected at least one safetensors file. Pass some.")
    return paths


CONVERT = "Load it with transformers and save it with save_pretrained, which writes safetensors."


def files_of_folder(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if _is_file(single) and _is_file(index):
        return [_checked_single(single, index)]
    if _is_file(single):
        return [single]
    if _is_file(index):
        return shards_of(index)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
    is_other = f"has {others[0]} but no safetensors file" if others else "has no safetensors file"
    raise CheckpointError(f"{folder}: {is_other}, expected {SINGLE} or {INDEX}. {CONVERT}")


def _checked_single(single: Path, index: Path) -> Path:
    """`single`, which is read where both are there, as transformers does; refused if the index knows of more."""
    stored = stored_tensors(single)
    lacking = [name for name in weight_map_of(index) if name not in stored]
    if lacking:
        raise CheckpointError(
            f"{single}: lacks {lacking[0]}{and_more(lacking)} of {index.name} beside it, expected one checkpoint in a "
            "folder. Remove the one that is not meant."
        )
    return single


def shards_of(index: Path) -> list[Path]:
    """The files of an index; raises `CheckpointError` unless each holds what the index says of it."""
    weight_map = weight_map_of(index)
    shards = sorted({index.parent / name for name in weight_map.values()})
    for shard in shards:
        if not _is_file(shard):
            raise CheckpointError(f"{shard}: is missing, expected every file of {index.name}. Fetch it.")
    stored = {shard: stored_tensors(shard) for shard in shards}
    for name, file in weight_map.items():
        if name not in stored[index.parent / file]:
            raise CheckpointError(
                f"{name}: is not in {index.parent / file}, expected it there: {index.name} says so. Fetch or save the "
                "checkpoint again."
            )
    return shards


def weight_map_of(index: Path) -> dict[str, str]:
    """Which file holds which tensor, by its path below the folder of the index."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        files = set(weight_map.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: cannot be read ({error}), expected JSON with a weight_map. Fetch or save the checkpoint again."
        ) from error
    if not files:
        raise CheckpointError(f"{index}: names no tensors, expected some. Fetch or save the checkpoint again.")
    for file in files:
        path = PurePath(file) if isinstance(file, str) else PurePath()
        if path.suffix != ".safetensors" or path.is_absolute() or path.drive or ".." in path.parts:
            raise CheckpointError(
                f"{index}: names {file!r:.200}, expected safetensors files below its folder. Correct the weight_map."
            )
    return dict(weight_map)


def _is_file(path: Path) -> bool:
    """As `Path.is_file`, False as well for what can be no name of a file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.6)
    return f" (near: {', '.join(near)})" if near else ""


def make_folder(output: Path, write: Callable[[Path], None]) -> None:
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


def copy_other_files(source: Path, folder: Path, files: list[Path]) -> None:
    """Copies config, tokenizer and the like, those in folders as well unless these hold weights of their own.

    No other weights, no index of others, and no config of an adapter, which would be loaded.
    """
    index = None if (source / SINGLE).is_file() else source / INDEX
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
