"""A tensor on disk: read whole and in parts, the same bits in each; a file that is another one is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quaff_fx.errors import CheckpointError
from quaff_fx.files import stored_tensor
from quaff_fx.files.stored_tensor import StoredTensor, stored_tensors
from tests.data import normal

MATRIX = normal(8, 12, seed=0)


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, StoredTensor]:
    tensors = {"linear": MATRIX, "conv1d": MATRIX.t().contiguous(), "half": MATRIX.half(), "ids": torch.arange(3)}
    save_file(tensors | {"one": torch.tensor(1.0), "none": torch.empty(0, 12)}, tmp_path / "a.safetensors")
    return stored_tensors(tmp_path / "a.safetensors")


def test_the_header_tells_names_shapes_and_dtypes(stored: dict[str, StoredTensor]) -> None:
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == {
        "linear": ((8, 12), torch.float32),
        "conv1d": ((12, 8), torch.float32),
        "half": ((8, 12), torch.float16),
        "ids": ((3,), torch.int64),
        "one": ((), torch.float32),
        "none": ((0, 12), torch.float32),
    }


def test_a_whole_tensor_is_a_copy_in_the_dtype_asked_for(stored: dict[str, StoredTensor]) -> None:
    assert torch.equal(stored["linear"].read(), MATRIX)
    assert torch.equal(stored["half"].read(torch.float32), MATRIX.half().float())
    assert stored["ids"].read(torch.float32).dtype == torch.int64
    stored["linear"].read().zero_()
    assert torch.equal(stored["linear"].read(), MATRIX)


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@pytest.mark.parametrize(("name", "in_dim"), [("linear", 1), ("conv1d", 0)])
def test_parts_are_the_rows_of_the_matrix_in_order(
    stored: dict[str, StoredTensor], name: str, in_dim: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tensor, "CHUNK_BYTES", 4 * 12 * rows)
    parts = [part.clone() for part in stored[name].rows(in_dim, torch.float32)]
    assert [len(part) for part in parts] == [min(rows, 8 - start) for start in range(0, 8, rows)]
    assert torch.equal(torch.cat(parts), MATRIX)


def test_a_matrix_without_rows_has_no_parts(stored: dict[str, StoredTensor]) -> None:
    assert list(stored["none"].rows(1, torch.float32)) == []


@pytest.mark.parametrize(("name", "in_dim"), [("linear", 1), ("conv1d", 0)])
def test_columns_in_the_order_they_are_asked_for(stored: dict[str, StoredTensor], name: str, in_dim: int) -> None:
    columns = stored[name].columns(torch.tensor([7, 2]), in_dim, torch.bfloat16)
    assert torch.equal(columns, MATRIX[:, [7, 2]].bfloat16())


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    ("change", "says"), [(grow, "has changed since"), (touch, "has changed since"), (Path.unlink, "any more")]
)
def test_a_file_that_is_another_one_is_told(stored: dict[str, StoredTensor], change, says: str) -> None:
    stored["linear"].check_unchanged()
    change(Path(stored["linear"].path))
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: .*{says}"):
        stored["linear"].check_unchanged()
    with pytest.raises(CheckpointError, match=says):
        stored["linear"].columns(torch.tensor([1]), 1, torch.float32)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64])
def test_what_is_no_whole_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: cannot be read as safetensors"):
        stored_tensors(path)


def read(tensor: StoredTensor) -> Tensor:
    return tensor.read()


def read_rows(tensor: StoredTensor) -> Tensor:
    return next(tensor.rows(1, torch.float32))


@pytest.mark.parametrize("reading", [read, read_rows])
def test_a_file_that_is_cut_off_after_it_was_opened_is_told(stored: dict[str, StoredTensor], reading) -> None:
    os.truncate(stored["linear"].path, 40)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        reading(stored["linear"])
