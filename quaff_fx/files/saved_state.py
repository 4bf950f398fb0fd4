"""The form in which calibration and smoothing state is saved: what it holds, its checks, its file. Knows no model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from quaff_fx.errors import CheckpointError
from quaff_fx.files.stored_tensor import READING_ERRORS, unreadable
from quaff_fx.ops import IN_DIM_CONFLICT, IN_DIM_UNSEEN

FORMAT = 3
"""Of what is saved; any other is refused. 1 had no checksum. 2 had those of int8 weights whose features were mixed
far apart: a run would go on with other integers than those it was saved with.
"""

METADATA = "metadata"
"""The entry of a state dict that says what the others are: JSON, as bytes; a file has it as text in its header."""

STATISTICS = ("hits", "absmax_sum")
OUTLIERS = ("outlier_channels", "outlier_w_absmax", "smoothing_scale", "next_smoothing_scale")
NUMBERS = ("in_dim", "activation_max", "rotation")

_WEIGHT = {"shape": list, "dtype": str, "crc32": int}
_ENTRIES = {
    "observe": _WEIGHT | {"in_dim_seen": int, "steps": int},
    "quantize": _WEIGHT | {"in_dim": int, "activation_max": int, "rotation": int, "outliers": int},
}
_FIELDS = {
    "format": int,
    "checksum": str,
    "stage": str,
    "steps": int,
    "config": dict,
    "sites": dict,
    "left_alone": dict,
    "multiply_adds": dict,
}
_ATTRIBUTES = [name for name in _FIELDS if name not in ("format", "checksum")]
_DO = "Pass what quaff_fx.state_dict, save_state or QuaffCallback gave, unchanged."


@dataclass(frozen=True)
class SavedState:
    """Calibration statistics (stage ``"observe"``), or outlier channels and smoothing scales (``"quantize"``).

    Attributes:
        steps: calibration steps done. config: that of `compile`, as JSON has it.
        sites: by weight name: shape, dtype and checksum of the weight, and ``in_dim_seen`` and ``steps`` of its
            statistics, or `NUMBERS` of the int8 weight and the number of its group in ``outliers``. Sites of a group
            share one outlier state.
        left_alone: the reason, by weight name, of every other matrix.
        multiply_adds: of one training step, by weight name, of any of these; empty if they were not counted.
        tensors: ``<weight name>.<one of STATISTICS>``, or ``outliers.<group>.<one of OUTLIERS>``; on the CPU.
    """

    stage: str
    steps: int
    config: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    left_alone: dict[str, str]
    tensors: dict[str, Tensor]
    multiply_adds: dict[str, int] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns everything as tensors; `from_tensors` takes it back."""
        return self.tensors | {METADATA: torch.frombuffer(bytearray(self._metadata().encode()), dtype=torch.uint8)}

    @classmethod
    @torch.inference_mode(False)
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SavedState:
        """Raises `CheckpointError` unless `tensors` are what `to_tensors` gave.

        Kinds, sizes and ranges are checked, then the checksum of everything.
        """
        if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise CheckpointError(f"state: is a {type(tensors).__name__}, expected a mapping of tensors. {_DO}")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_meta:
                raise CheckpointError(
                    f"{name}: is a {tensor.layout} tensor on {tensor.device} in the state, expected a name and a dense "
                    f"tensor that has values. {_DO}"
                )
        metadata = tensors.get(METADATA)
        if metadata is None or metadata.dtype != torch.uint8 or metadata.ndim != 1:
            raise CheckpointError(f"state: has no {METADATA} of quaff_fx, expected some. {_DO}")
        found = {name: tensor.detach().cpu() for name, tensor in tensors.items() if name != METADATA}
        return cls._checked(metadata.detach().cpu().numpy().tobytes(), found)

    def write(self, path: Path) -> None:
        """Writes a safetensors file that appears whole or not at all; a file of before stays until then.

        Raises:
            CheckpointError: it cannot be written: no space, no permission, no such folder. Nothing is left of it.
        """
        # A name of its own, so that what an interrupt leaves to be removed is never the file of another writer.
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(save(self.tensors, {METADATA: self._metadata()}))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot be written ({error}), expected a folder with room for it. What was there before is "
                "unchanged. Make room, or choose another folder."
            ) from error
        with contextlib.suppress(OSError):  # a system that opens no folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @classmethod
    @torch.inference_mode(False)
    def read(cls, path: Path) -> SavedState:
        """Returns what `write` wrote; runs no code from the file. Raises `CheckpointError` as `from_tensors`."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = (file.metadata() or {}).get(METADATA)
                # Copies: what safetensors returns is the mapped file itself. None of a file of another kind, however
                # large.
                names = () if metadata is None else file.keys()
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except READING_ERRORS as error:
            raise unreadable(str(path), error) from error
        if metadata is None:
            raise CheckpointError(f"{path}: has no {METADATA} of quaff_fx, expected a state file. {_DO}")
        return cls._checked(metadata.encode(), tensors)

    def in_features(self, name: str) -> int:
        """K of a site that is quantized."""
        entry = self.sites[name]
        size: int = entry["shape"][entry["in_dim"]]
        return size

    def _metadata(self) -> str:
        values = {name: getattr(self, name) for name in _ATTRIBUTES}
        return json.dumps({"format": FORMAT, "checksum": self._checksum(values)} | values)

    def _checksum(self, values: Mapping[str, Any]) -> str:
        """SHA-256 of all there is: the other metadata, and names, dtypes, shapes and bytes of the tensors."""
        forms = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(self.tensors.items())}
        checksum = hashlib.sha256(json.dumps([FORMAT, values, forms], sort_keys=True).encode())
        for name in forms:
            checksum.update(self.tensors[name].detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        return checksum.hexdigest()

    @classmethod
    def _checked(cls, metadata: bytes, tensors: dict[str, Tensor]) -> SavedState:
        try:
            text = metadata.decode()
            return cls._of_fields(json.loads(text), text, tensors)
        except RecursionError as error:
            raise CheckpointError(f"state: its {METADATA} is nested too deeply, expected flat JSON. {_DO}") from error
        except ValueError as error:
            raise CheckpointError(f"state: its {METADATA} is no JSON ({error}), expected some. {_DO}") from error

    @classmethod
    def _of_fields(cls, fields: Any, text: str, tensors: dict[str, Tensor]) -> SavedState:
        if isinstance(fields, dict) and isinstance(fields.get("format"), int) and fields["format"] != FORMAT:
            raise CheckpointError(
                f"state: has format {fields['format']}, expected {FORMAT}. Resume with the version of quaff_fx that "
                "saved it."
            )
        _check_fields("state", fields, _FIELDS)
        if fields["stage"] not in _ENTRIES:
            raise CheckpointError(f"state: has stage {fields['stage']!r}, expected observe or quantize. {_DO}")
        for name, entry in fields["sites"].items():
            _check_fields(name, entry, _ENTRIES[fields["stage"]])
            if len(entry["shape"]) != 2 or not all(type(size) is int and 0 < size < 2**63 for size in entry["shape"]):
                raise CheckpointError(f"{name}: has shape {entry['shape']} in the state, expected two sizes. {_DO}")
        saved = cls(**{name: fields[name] for name in _ATTRIBUTES}, tensors=tensors)
        saved._check_numbers()
        saved._check_tensor_names()
        for name in saved.sites:
            (saved._check_statistics if saved.stage == "observe" else saved._check_choice)(name)
        # Last, so that what is out of its range is named. The whole text: one content has one form.
        if saved._metadata() != text:
            raise CheckpointError(
                f"state: differs from what was saved, expected content of checksum {fields['checksum']:.16}. It was "
                f"damaged or edited. {_DO}"
            )
        return saved

    def _check_numbers(self) -> None:
        if self.steps < 0:
            raise CheckpointError(f"state: has steps {self.steps}, expected at least 0. {_DO}")
        for name, reason in self.left_alone.items():
            if type(reason) is not str or not reason or name in self.sites:
                raise CheckpointError(
                    f"{name}: is left alone for {reason!r:.200} in the state, expected a reason, of a weight that is "
                    f"no site. {_DO}"
                )
        for name, count in self.multiply_adds.items():
            if type(count) is not int or count < 0 or (name not in self.sites and name not in self.left_alone):
                raise CheckpointError(
                    f"{name}: has multiply_adds {count!r:.200} in the state, expected a number of at least 0, of a "
                    f"weight in it. {_DO}"
                )

    def _check_tensor_names(self) -> None:
        if self.stage == "observe":
            expected = {f"{name}.{statistic}" for name in self.sites for statistic in STATISTICS}
        else:
            groups = {entry["outliers"] for entry in self.sites.values()}
            expected = {f"outliers.{group}.{name}" for group in groups for name in OUTLIERS}
        for name in sorted(expected ^ set(self.tensors)):
            problem = "is missing in the state" if name in expected else "is in the state but belongs to no site"
            raise CheckpointError(f"{name}: {problem}, expected exactly the tensors of its sites. {_DO}")

    def _check_statistics(self, name: str) -> None:
        entry = self.sites[name]
        if not (IN_DIM_UNSEEN <= entry["in_dim_seen"] <= IN_DIM_CONFLICT and entry["steps"] >= 0):
            raise CheckpointError(
                f"{name}: has in_dim_seen {entry['in_dim_seen']} and steps {entry['steps']} in the state, expected "
                f"{IN_DIM_UNSEEN} to {IN_DIM_CONFLICT} and at least 0. {_DO}"
            )
        for statistic in STATISTICS:
            values = self._tensor(f"{name}.{statistic}", torch.float32, max(entry["shape"]))
            _check_values(f"{name}.{statistic}", values, bool((torch.isfinite(values) & (values >= 0)).all()))

    def _check_choice(self, name: str) -> None:
        entry = self.sites[name]
        if entry["in_dim"] not in (0, 1) or entry["activation_max"] not in (63, 127):
            raise CheckpointError(
                f"{name}: has in_dim {entry['in_dim']} and activation_max {entry['activation_max']} in the state, "
                f"expected 0 or 1 and 63 or 127. {_DO}"
            )
        if entry["rotation"] < 1 or self.in_features(name) % entry["rotation"] or entry["rotation"].bit_count() != 1:
            raise CheckpointError(
                f"{name}: has rotation {entry['rotation']} in the state, expected a power of two that divides its "
                f"{self.in_features(name)} in_features. {_DO}"
            )
        group = f"outliers.{entry['outliers']}"
        size = self.tensors[f"{group}.outlier_channels"].numel()
        channels = self._tensor(f"{group}.outlier_channels", torch.int64, size)
        is_inside = bool(((channels >= 0) & (channels < self.in_features(name))).all())
        _check_values(f"{group}.outlier_channels", channels, is_inside and len(set(channels.tolist())) == size)
        w_absmax = self._tensor(f"{group}.outlier_w_absmax", torch.float32, size)
        _check_values(f"{group}.outlier_w_absmax", w_absmax, bool((torch.isfinite(w_absmax) & (w_absmax >= 0)).all()))
        is_split = self.config.get("smoothing") == "split"
        for scale in OUTLIERS[2:]:
            s = self._tensor(f"{group}.{scale}", torch.float32, size)
            _check_values(f"{group}.{scale}", s, bool(((s >= 1) & (torch.isinf(s) == is_split)).all()))

    def _tensor(self, name: str, dtype: torch.dtype, size: int) -> Tensor:
        tensor = self.tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != (size,):
            raise CheckpointError(
                f"{name}: is {tensor.dtype} of shape {tuple(tensor.shape)} in the state, expected {dtype} of shape "
                f"{(size,)}. {_DO}"
            )
        return tensor


def _check_fields(name: str, fields: object, kinds: Mapping[str, type]) -> None:
    is_right = isinstance(fields, dict) and fields.keys() == kinds.keys()
    if not is_right or not all(type(fields[key]) is kind for key, kind in kinds.items()):  # type: ignore[index]
        raise CheckpointError(f"{name}: is {fields!r:.200} in the state, expected {', '.join(kinds)}. {_DO}")


def _check_values(name: str, values: Tensor, is_right: bool) -> None:
    if not is_right:
        raise CheckpointError(
            f"{name}: has values out of range in the state (from {values.min()} to {values.max()}), expected finite "
            f"statistics, distinct channels and scales of at least 1. {_DO}"
        )
