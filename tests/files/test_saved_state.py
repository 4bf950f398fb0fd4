"""The form of saved state alone: it comes back, what was changed is refused, a file is whole or not there."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quaff_fx.errors import CheckpointError
from quaff_fx.files.saved_state import METADATA, SavedState
from tests.malformed import converted_state, observed_state

STATES = {"observe": observed_state, "quantize": converted_state}


@pytest.fixture(params=STATES)
def saved(request: pytest.FixtureRequest) -> SavedState:
    return STATES[request.param]()


def assert_equal(left: SavedState, right: SavedState) -> None:
    for field in dataclasses.fields(SavedState):
        if field.name != "tensors":
            assert getattr(left, field.name) == getattr(right, field.name), field.name
    assert left.tensors.keys() == right.tensors.keys()
    assert all(torch.equal(tensor, right.tensors[name]) for name, tensor in left.tensors.items())


def metadata_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return json.loads(bytes(tensors[METADATA].tolist()))


def with_metadata(tensors: dict[str, Tensor], metadata: str | bytes) -> dict[str, Tensor]:
    content = metadata.encode() if isinstance(metadata, str) else metadata
    return tensors | {METADATA: torch.tensor(list(content), dtype=torch.uint8)}


def assert_refused(tensors: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        SavedState.from_tensors(tensors)
    assert ", expected " in str(caught.value)


# --- comes back ----------------------------------------------------------------------------------------------------


def test_comes_back_through_tensors_and_through_a_file(saved: SavedState, tmp_path: Path) -> None:
    assert_equal(SavedState.from_tensors(saved.to_tensors()), saved)
    saved.write(tmp_path / "new" / "state.safetensors")
    assert_equal(SavedState.read(tmp_path / "new" / "state.safetensors"), saved)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["state.safetensors"]


def test_multiply_adds_are_optional() -> None:
    saved = dataclasses.replace(observed_state(), multiply_adds={})
    assert SavedState.from_tensors(saved.to_tensors()).multiply_adds == {}


@pytest.mark.parametrize("default", [{"dtype": torch.bfloat16}, {"device": "meta"}, {"is_inference": True}], ids=str)
def test_whatever_the_defaults_are(saved: SavedState, tmp_path: Path, default: dict[str, Any]) -> None:
    torch.set_default_dtype(default.get("dtype", torch.float32))
    torch.set_default_device(default.get("device"))
    try:
        with torch.inference_mode("is_inference" in default):
            saved.write(tmp_path / "state.safetensors")
            read = SavedState.read(tmp_path / "state.safetensors")
            again = SavedState.from_tensors(saved.to_tensors())
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for each in (read, again):
        assert_equal(each, saved)
        assert not any(tensor.is_inference() for tensor in each.tensors.values())


# --- refused -------------------------------------------------------------------------------------------------------


def test_any_flipped_bit_of_the_tensors_is_refused(saved: SavedState) -> None:
    """Of each byte one bit, drawn at random, of the metadata as well."""
    draw, tensors = random.Random(0), saved.to_tensors()
    for name, tensor in tensors.items():
        for byte in range(tensor.nbytes):
            changed = tensor.clone()
            changed.view(torch.uint8)[byte] ^= 1 << draw.randrange(8)
            with pytest.raises(CheckpointError):
                SavedState.from_tensors(tensors | {name: changed})


@pytest.mark.slow
def test_any_flipped_bit_of_the_file_is_refused(saved: SavedState, tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "state.safetensors"
    saved.write(path)
    content = path.read_bytes()
    for byte in range(len(content)):
        changed = bytearray(content)
        changed[byte] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            SavedState.read(path)


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "other steps": lambda m: m.update(steps=m["steps"] + 1),
    "other checksum": lambda m: m.update(checksum="0" * 64),
    "other crc32 of a weight": lambda m: next(iter(m["sites"].values())).update(crc32=1),
    "other dtype": lambda m: next(iter(m["sites"].values())).update(dtype="float16"),
    "other config": lambda m: m["config"].update(momentum=0.25),
    "other type of a number": lambda m: m["config"].update(momentum=1, outlier_budget=1),
    "other reason": lambda m: m["left_alone"].update({"embed.weight": "excluded by the config"}),
    "other multiply-adds": lambda m: m["multiply_adds"].update({"embed.weight": 7}),
    "one multiply-adds less": lambda m: m["multiply_adds"].popitem(),
    "one reason less": lambda m: (m["left_alone"].clear(), m["multiply_adds"].pop("embed.weight")),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_changed_metadata_are_refused(saved: SavedState, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = saved.to_tensors()
    metadata = metadata_of(tensors)
    edit(metadata)
    assert_refused(with_metadata(tensors, json.dumps(metadata)), "state: differs from what was saved, expected content")


def test_swapped_renamed_added_and_removed_tensors_are_refused(saved: SavedState) -> None:
    tensors = saved.to_tensors()
    first, second = [name for name in tensors if "absmax" in name][:2]
    different = {first: tensors[second], second: tensors[first]}
    match = "differs from what was saved|is torch.float32 of shape|values out of range"
    assert_refused(tensors | different, match)
    assert_refused({name: tensor for name, tensor in tensors.items() if name != first}, "is missing in the state")
    assert_refused(tensors | {"more": torch.zeros(1)}, "more: is in the state but belongs to no site")
    renamed = {name.replace(first, "renamed"): tensor for name, tensor in tensors.items()}
    assert_refused(renamed, "is missing in the state|belongs to no site")
    assert_refused(tensors | {first: tensors[first].double()}, "is torch.float64 of shape")


MALFORMED: dict[str, tuple[str | bytes, str]] = {
    "no UTF-8": (b"\xff\xfe{}", "metadata is no JSON"),
    "no JSON": ("{", "metadata is no JSON"),
    "a number": ("3", "state: is 3 in the state"),
    "deeply nested": ("[" * 100_000, "metadata is nested too deeply"),
    "deeply nested config": ('{"config": ' + '{"a": ' * 900 + "1" + "}" * 901, "state: is |nested too deeply"),
    "a number of 5000 digits": ('{"format": ' + "9" * 5000 + "}", "metadata is no JSON"),
}


@pytest.mark.parametrize(("metadata", "match"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_metadata(metadata: str | bytes, match: str) -> None:
    assert_refused(with_metadata(observed_state().to_tensors(), metadata), match)


def test_the_first_format_has_no_checksum_and_is_refused(saved: SavedState) -> None:
    metadata = metadata_of(saved.to_tensors())
    del metadata["checksum"], metadata["multiply_adds"]
    metadata["format"] = 1
    match = "state: has format 1, expected 3. Resume with the version of quaff_fx that saved it"
    assert_refused(with_metadata(saved.to_tensors(), json.dumps(metadata)), match)


def test_the_format_with_features_rotated_far_apart_is_refused(saved: SavedState, tmp_path: Path) -> None:
    metadata = json.dumps(metadata_of(saved.to_tensors()) | {"format": 2})
    match = "state: has format 2, expected 3. Resume with the version of quaff_fx that saved it"
    assert_refused(with_metadata(saved.to_tensors(), metadata), match)
    save_file(saved.tensors, path := tmp_path / "state.safetensors", {METADATA: metadata})
    with pytest.raises(CheckpointError, match=match):
        SavedState.read(path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": -1}, "state: has steps -1, expected at least 0"),
        ({"multiply_adds": {"embed.weight": -1}}, "embed.weight: has multiply_adds -1 in the state"),
        ({"multiply_adds": {"embed.weight": True}}, "embed.weight: has multiply_adds True in the state"),
        ({"multiply_adds": {"embed.weight": 1.5}}, "embed.weight: has multiply_adds 1.5 in the state"),
        ({"multiply_adds": {"unknown.weight": 1}}, "unknown.weight: has multiply_adds 1 in the state"),
        ({"multiply_adds": []}, "state: is .* in the state, expected format, checksum, stage, steps"),
        ({"left_alone": {"embed.weight": 3}, "multiply_adds": {}}, "embed.weight: is left alone for 3 in the state"),
        ({"left_alone": {"0.weight": "no"}, "multiply_adds": {}}, "0.weight: is left alone for 'no' in the state"),
    ],
    ids=str,
)
def test_what_is_out_of_its_range_is_named_whatever_the_checksum(changes: dict[str, Any], match: str) -> None:
    """`to_tensors` seals what it is given."""
    assert_refused(dataclasses.replace(observed_state(), **changes).to_tensors(), match)


@pytest.mark.parametrize("size", [2**63, 2**70, 0, -1, True, 1.0])
def test_a_size_that_no_weight_can_have(saved: SavedState, size: Any) -> None:
    saved.sites["0.weight"]["shape"] = [size, size]
    assert_refused(saved.to_tensors(), "0.weight: has shape .* in the state, expected two sizes")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, device="meta"), torch.zeros(3).to_sparse(), torch.zeros(2, 3, dtype=torch.uint8)],
    ids=["meta", "sparse", "matrix"],
)
@pytest.mark.parametrize("name", [METADATA, "0.weight.hits", 3], ids=str)
def test_tensors_of_other_kinds(name: Any, tensor: Tensor) -> None:
    with pytest.raises(CheckpointError):
        SavedState.from_tensors(observed_state().to_tensors() | {name: tensor})


# --- written whole or not at all -----------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "folder" / "state.safetensors"
    observed_state().write(path)
    return path, path.read_bytes()


def assert_unchanged(written: tuple[Path, bytes]) -> None:
    path, content = written
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk(written: tuple[Path, bytes]) -> None:
    """A limit on the size of files fails as a full disk does: in the middle of the file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"state\.safetensors: cannot be written \(.*, expected a folder"):
            converted_state().write(written[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_unchanged(written)


def test_a_folder_that_is_a_file_and_a_file_that_is_a_folder(written: tuple[Path, bytes]) -> None:
    path, _ = written
    with pytest.raises(CheckpointError, match=r"state\.safetensors/state\.safetensors: cannot be written"):
        converted_state().write(path / "state.safetensors")
    with pytest.raises(CheckpointError, match="folder: cannot be written"):
        converted_state().write(path.parent)
    assert_unchanged(written)
    assert list(path.parent.parent.iterdir()) == [path.parent]


def test_no_permission(written: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)  # the superuser may write everywhere
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*Permission denied"):
            converted_state().write(written[0])
    assert_unchanged(written)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_interrupt_leaves_the_file_of_before(
    written: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "fsync") if name == "fsync" else (Path, "replace")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        converted_state().write(written[0])
    assert_unchanged(written)


def test_a_file_of_another_kind_is_told_before_its_tensors_are_read(tmp_path: Path) -> None:
    """However large they are: this one has a hole of 4 GiB."""
    path = tmp_path / "large.safetensors"
    header = json.dumps({"a": {"dtype": "U8", "shape": [2**32], "data_offsets": [0, 2**32]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**32)
    with pytest.raises(CheckpointError, match="has no metadata of quaff_fx"):
        SavedState.read(path)
