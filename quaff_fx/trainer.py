"""Calibration and smoothing state in the checkpoints of a `transformers.Trainer`.

It cannot be imported without transformers, so `quaff_fx.QuaffCallback` imports it when it is first used.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from quaff_fx.api import stages_of
from quaff_fx.errors import CheckpointError, ConfigError, QuaffWarning
from quaff_fx.files import snapshot
from quaff_fx.files.checkpoint import PathLike

TRAINER_STATE = "trainer_state.json"
"""The last file of a checkpoint that Trainer writes, and before it deletes an older one (read in transformers 5.24)."""

_CHECKED_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_CANNOT_WORK = {
    "torch_compile": "quaff_fx.compile compiles the model",
    "fsdp": "it shards weights that are observed; call quaff_fx.calibrate and fully_shard in a loop of your own",
    "deepspeed": "it partitions weights on its own",
    "enable_jit_checkpoint": "it saves in the middle of a step, where calibration is ahead of the optimizer",
}


class QuaffCallback(TrainerCallback, ExportableState):
    """Writes calibration and smoothing state into every checkpoint, and brings them back when training is resumed.

    ``Trainer(..., callbacks=[quaff_fx.QuaffCallback()])``. A resumed run is bit for bit the one that was not
    interrupted, as far as the Trainer's own is. ``quaff_state.safetensors`` is written right before
    ``trainer_state.json``, which gets the checksums of all files of the checkpoint: whenever the process is killed,
    `last_checkpoint` finds one that is whole, since the Trainer deletes older ones only after that. It also gets a
    checksum of itself, but for the entries of callbacks, which are asked for one after the other.

    Args:
        resume_from: the checkpoint to be resumed from, if it does not lie in the output folder.

    Raises (when training begins):
        ConfigError: an option of the Trainer cannot work with quaff_fx, or the model was not compiled by it.
        CheckpointError: the checkpoint has no state, is damaged, or does not fit the model, which is left as it was.
    """

    def __init__(self, resume_from: PathLike | None = None) -> None:
        self.resume_from = resume_from
        self.files: dict[str, int] | None = None
        self.checksum: int | None = None
        self._model: nn.Module | None = None
        self._folder = Path()
        self._trainer_state: TrainerState | None = None
        # `state` is asked for as well where nothing is saved, and where a failed step has moved the statistics on.
        self._is_between_steps = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuses options that cannot work."""
        _check_options(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Brings the state back if training is resumed; raises as the class says."""
        _check_options(args)
        if state.is_hyper_param_search:
            raise ConfigError(
                "Trainer: is searching hyperparameters, expected training: a callback is not told where its "
                "checkpoints lie. Leave QuaffCallback out; trials cannot be resumed then."
            )
        self._model = kwargs["model"]
        self._folder, self._trainer_state, self._is_between_steps = Path(str(args.output_dir)), state, False
        stages_of(self._model)
        if state.global_step > 0:
            self._resume(args, state)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Nothing may be saved from now on."""
        self._is_between_steps = False

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The step is whole: it may be saved."""
        self._is_between_steps = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Brings back the smoothing scales of the best checkpoint if its adapter was loaded; lets go of the model."""
        if args.load_best_model_at_end and state.best_model_checkpoint and self._model is not None:
            try:
                snapshot.load_state(self._model, state.best_model_checkpoint)
            except CheckpointError as error:
                text = f"{state.best_model_checkpoint}: only its adapter was loaded. {error}"
                warnings.warn(text, QuaffWarning, stacklevel=2)
        self._model, self._trainer_state, self._is_between_steps = None, None, False

    def state(self) -> dict[str, Any]:
        """Saves the state, if the Trainer is saving; returns the checksums of the checkpoint's files."""
        if self._model is not None and self._trainer_state is not None and self._is_between_steps:
            folder = self._folder / f"checkpoint-{self._trainer_state.global_step}"
            if folder.is_dir():
                files = _save(self._model, folder)
                self.files, self.checksum = files, _checksum_of_state(dataclasses.asdict(self._trainer_state), files)
        return {"args": {}, "attributes": {"files": self.files, "checksum": self.checksum}}

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self._model is not None
        own = f"checkpoint-{state.global_step}"
        folders = (self.resume_from, args.resume_from_checkpoint, self._folder / own)
        found = [Path(folder) for folder in folders if folder is not None and Path(folder).is_dir()]
        saved = _saved_by(state.stateful_callbacks)
        if saved is None:
            raise CheckpointError(
                f"{own}: was saved without QuaffCallback or while several processes calibrated, expected calibration "
                "and smoothing state in it. Start anew, or from its adapter without resume_from_checkpoint."
            )
        for folder in found:
            if _checksum(folder / snapshot.FILE) == saved.files[snapshot.FILE]:
                break
        else:
            raise CheckpointError(
                f"{', '.join(map(str, found)) or own}: has no {snapshot.FILE} of this checkpoint, expected it beside "
                "the adapter. Put it back, or tell where the checkpoint lies: QuaffCallback(resume_from=folder)."
            )
        if damaged := _damaged(folder, saved):
            raise CheckpointError(
                f"{folder / damaged}: is not the file that was saved, expected an unchanged checkpoint. Resume from "
                "quaff_fx.last_checkpoint(output_dir), the last one that is whole."
            )
        snapshot.load_state(self._model, folder)


def last_checkpoint(output_dir: PathLike) -> str | None:
    """Returns the last ``checkpoint-<step>`` in a Trainer's output folder that is whole; None if there is none.

    For ``trainer.train(resume_from_checkpoint=...)``, whose True takes the last one even if the process was killed
    while it was saved. Every file is compared with its checksum.
    """
    found = (
        (re.fullmatch(r"checkpoint-(\d{1,18})", path.name), path) for path in Path(output_dir).glob("checkpoint-*")
    )
    folders = [(int(match[1]), path) for match, path in found if match]
    for step, folder in sorted(folders, reverse=True):
        trainer_state = _read_state(folder)
        saved = _saved_by(trainer_state.get("stateful_callbacks"))
        if saved is not None and trainer_state.get("global_step") == step and not _damaged(folder, saved):
            return str(folder)
    return None


def _check_options(args: TrainingArguments) -> None:
    for option, reason in _CANNOT_WORK.items():
        if getattr(args, option, None):
            raise ConfigError(
                f"TrainingArguments: {option} is {getattr(args, option)!r}, expected none with quaff_fx: {reason}. "
                "Leave it out."
            )
    if args.n_gpu > 1:
        raise ConfigError(
            f"TrainingArguments: use {args.n_gpu} GPUs in one process (nn.DataParallel, which copies the model at "
            "each step), expected one per process. Start with torchrun, or show one GPU (CUDA_VISIBLE_DEVICES)."
        )


def _save(model: nn.Module, folder: Path) -> dict[str, int] | None:
    """Saves the state into a checkpoint; returns the checksums of its files, None if it cannot be resumed from."""
    try:
        snapshot.save_state(model, folder)
    except CheckpointError as error:
        if error.__cause__ is not None:
            raise  # it cannot be written: the Trainer must not go on, and delete an older checkpoint that is whole
        warnings.warn(f"{folder}: cannot be resumed from. {error}", QuaffWarning, stacklevel=2)
        return None
    # Random states are left out: other processes may be writing theirs.
    paths = [p for p in folder.rglob("*") if p.suffix in _CHECKED_SUFFIXES and not p.name.startswith("rng_state")]
    checksums = {path.relative_to(folder).as_posix(): _checksum(path) for path in sorted(paths)}
    return {name: crc for name, crc in checksums.items() if crc is not None}


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a checkpoint says of itself: checksums of its files, by name, and of its `TRAINER_STATE` and these."""

    files: dict[str, int]
    checksum: int


def _saved_by(callbacks: Any) -> _Saved | None:
    """What `QuaffCallback` has put into the callbacks' part of a `TrainerState`, None if there is nothing usable."""
    for entry in callbacks.values() if isinstance(callbacks, dict) else ():
        attributes = entry.get("attributes") if isinstance(entry, dict) else None
        files = attributes.get("files") if isinstance(attributes, dict) else None
        if not isinstance(attributes, dict) or not isinstance(files, dict) or snapshot.FILE not in files:
            continue
        numbers = (*files.values(), attributes.get("checksum"))
        is_inside = not any(PurePath(name).is_absolute() or ".." in PurePath(name).parts for name in files)
        # A checksum of another type would be that of a file that cannot be read.
        return _Saved(files, numbers[-1]) if is_inside and all(type(number) is int for number in numbers) else None
    return None


def _damaged(folder: Path, saved: _Saved) -> str | None:
    """The name of a file that is missing or has another checksum, None if there is none."""
    try:
        is_whole = _checksum_of_state(_read_state(folder), saved.files) == saved.checksum
    except RecursionError:  # read, but nested too deeply to be written
        is_whole = False
    if not is_whole:
        return TRAINER_STATE
    return next((name for name, crc in saved.files.items() if _checksum(folder / name) != crc), None)


def _read_state(folder: Path) -> dict[str, Any]:
    """The `TrainerState` of a checkpoint as JSON; nothing if it cannot be read."""
    try:
        values = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _checksum_of_state(values: Mapping[str, Any], files: dict[str, int] | None) -> int:
    """CRC-32 of a `TrainerState` as JSON, without what callbacks have put into it, and of the checksums of files."""
    own = {name: value for name, value in values.items() if name != "stateful_callbacks"}
    # To JSON twice: what is no JSON before (tuples, numbers as keys) then has the form that it is read back in.
    return zlib.crc32(json.dumps(json.loads(json.dumps([own, files])), sort_keys=True).encode())


def _checksum(path: Path) -> int | None:
    """CRC-32 of a file, None if it cannot be read."""
    crc = 0
    try:
        with path.open("rb") as file:
            while part := file.read(2**20):
                crc = zlib.crc32(part, crc)
    except (OSError, ValueError):  # ValueError: no name of a file
        return None
    return crc
