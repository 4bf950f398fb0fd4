"""A tensor in a safetensors file on disk, read part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quaff_fx.errors import CheckpointError
from quaff_fx.weights.layout import as_matrix, swapped_shape

CHUNK_BYTES = 2**24
"""A matrix is read in parts of about this size, so that no float copy of a whole one is ever needed."""

READING_ERRORS = (OSError, SafetensorError, TypeError, ValueError, RuntimeError, OverflowError)
"""What safetensors raises if it cannot read a file, and torch if a header has sizes that no tensor can have."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor can be read again, and how to tell that the file is still the same.

    Attributes:
        path: of the safetensors file. name: of the tensor in it. shape, dtype: as stored.
        size, modified: bytes and modification time in ns of the file when it was first opened.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int
    modified: int

    def check_unchanged(self) -> None:
        """Raises `CheckpointError` if the file vanished or has another size or time than when it was first opened."""
        try:
            found = Path(self.path).stat()
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read any more ({error.strerror}), expected the file that {self.name} was "
                "read from: it is read again. Put it back where it was."
            ) from error
        if (found.st_size, found.st_mtime_ns) != (self.size, self.modified):
            raise CheckpointError(
                f"{self.path}: has changed since {self.name} was read from it, expected the same file: it is read "
                "again. Put the old file back, or begin anew."
            )

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a copy of the whole tensor; a floating one in `dtype`, if given.

        What safetensors returns is the mapped file itself: it would change, or end the process, with the file.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            with torch.device("cpu"), safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self.name)
        except READING_ERRORS as error:
            raise unreadable(self.path, error) from error
        return tensor.to(dtype if tensor.is_floating_point() else None, copy=True)

    def rows(self, in_dim: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields the matrix (N, K) as parts (n, K) in order, n out-features each, in `dtype`.

        A part may be a view of the mapped file: use it before the next one is asked for.

        Args:
            in_dim: the layout in which it is stored.

        Raises:
            CheckpointError: the file cannot be read.
        """
        out_features, in_features = swapped_shape(self.shape, in_dim)
        count = max(1, CHUNK_BYTES // (4 * max(1, in_features)))
        try:
            with safe_open(self.path, framework="pt") as file:
                stored = file.get_slice(self.name)
                for start in range(0, out_features, count):
                    part = slice(start, min(start + count, out_features))
                    with torch.device("cpu"):  # safetensors gives a part on the default device
                        rows = stored[part] if in_dim == 1 else stored[:, part]
                    yield as_matrix(rows, in_dim).to(dtype)
        except READING_ERRORS as error:
            raise unreadable(self.path, error) from error

    def columns(self, channels: Tensor, in_dim: int, dtype: torch.dtype) -> Tensor:
        """Returns the columns `channels` of the matrix (N, K), (N, O) in `dtype` on the device of `channels`.

        Raises:
            CheckpointError: the file cannot be read or is not the one of before.
        """
        self.check_unchanged()
        here = channels.cpu()
        parts = [part.index_select(1, here) for part in self.rows(in_dim, dtype)]
        self.check_unchanged()
        return torch.cat(parts).to(channels.device)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns what a safetensors file holds, by name; reads its header only.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind.
    """
    try:
        found = path.stat()  # before it is opened: a change in between is then noticed
        with torch.device("cpu"), safe_open(str(path), framework="pt") as file:
            forms = {name: _form(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except READING_ERRORS as error:
        raise unreadable(str(path), error) from error
    return {
        name: StoredTensor(str(path.absolute()), name, *form, found.st_size, found.st_mtime_ns)
        for name, form in forms.items()
    }


def _form(stored: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of a tensor; the dtype from an empty part, since the file has other names than torch."""
    shape = tuple(stored.get_shape())
    part: Tensor = stored[:0] if shape else stored[...]
    return shape, part.dtype


def unreadable(path: str, error: Exception) -> CheckpointError:
    """Returns the error for a file that is no whole safetensors file."""
    return CheckpointError(
        f"{path}: cannot be read as safetensors ({error}), expected a whole file. Fetch or save the checkpoint again."
    )
