"""A checkpoint on disk: which files it is made of, what they hold, and folders that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import quaff_fx
from quaff_fx.errors import CheckpointError
from quaff_fx.files import checkpoint
from tests.files.test_loading import loaded_llama, meta_llama, saved
from tests.models import float_llama


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_other_formats_are_refused(tmp_path, name):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"has {name} but no safetensors file"):
        loaded_llama(tmp_path)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        quaff_fx.load_checkpoint(meta_llama(), tmp_path / name)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no safetensors file, expected model\.safetensors or"):
        quaff_fx.load_checkpoint(meta_llama(), tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: is no file"):
        quaff_fx.load_checkpoint(meta_llama(), tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="files: are none"):
        quaff_fx.load_checkpoint(meta_llama(), [])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="expected JSON with a weight_map"):
        quaff_fx.load_checkpoint(meta_llama(), tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "first.safetensors"}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"first\.safetensors: is missing"):
        quaff_fx.load_checkpoint(meta_llama(), tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    files = [folder / "model.safetensors" for folder in (first, second)]
    with pytest.raises(CheckpointError, match="expected in one file"):
        quaff_fx.load_checkpoint(meta_llama(), files)


def index_of(folder: Path, weight_map: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/a.safetensors", "b/../../a.safetensors", "a.bin", "", 3, None], ids=str
)
def test_an_index_names_safetensors_files_below_its_folder_alone(tmp_path: Path, file: object) -> None:
    with pytest.raises(CheckpointError, match="expected safetensors files below its folder"):
        checkpoint.weight_map_of(index_of(tmp_path, {"a": file}))


def test_an_index_that_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names no tensors, expected some"):
        checkpoint.weight_map_of(index_of(tmp_path, {}))


def test_a_shard_that_lacks_what_the_index_says_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    assert checkpoint.shards_of(index_of(tmp_path, {"a": "1.safetensors"})) == [tmp_path / "1.safetensors"]
    with pytest.raises(CheckpointError, match=r"^b: is not in .*1\.safetensors, expected it there"):
        checkpoint.shards_of(index_of(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"}))


def test_one_file_beside_an_index_that_knows_of_more_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / checkpoint.SINGLE)
    index_of(tmp_path, {"a": "1.safetensors"})
    assert checkpoint.files_of(tmp_path) == [tmp_path / checkpoint.SINGLE]
    index_of(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks b \(and 1 more\) of model\.safetensors\.index\.json beside it"):
        checkpoint.files_of(tmp_path)


def test_names_get_or_lose_the_prefix_of_the_model() -> None:
    model = float_llama(blocks=1)
    known = {name for name, _ in model.named_parameters()}
    found = dict.fromkeys(known)
    bare = {name.removeprefix("model."): None for name in known if name.startswith("model.")}
    assert checkpoint.renamed(model, found, known) == found
    assert checkpoint.renamed(model, bare, known).keys() == known - {"lm_head.weight"}
    assert checkpoint.renamed(model.model, found, {name for name, _ in model.model.named_parameters()}).keys() == {
        *bare,
        "lm_head.weight",
    }


def test_near_names_and_how_many_more() -> None:
    assert checkpoint.near("up_prj", ["up_proj", "embed"]) == " (near: up_proj)"
    assert checkpoint.near("up_proj", ["embed"]) == ""
    assert checkpoint.and_more(["a", "b", "c"]) == " (and 2 more)"
    assert checkpoint.and_more(["a"]) == ""


def write_one(folder: Path) -> None:
    (folder / "one").write_text("1", encoding="utf-8")


def test_a_folder_appears_whole_with_the_folders_above_it(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    checkpoint.make_folder(output, write_one)
    assert [path.name for path in output.iterdir()] == ["one"]
    assert [path.name for path in output.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_that_cannot_be_written_is_not_there_at_all(tmp_path: Path, error: type[BaseException]) -> None:
    def write(folder: Path) -> None:
        write_one(folder)
        raise error

    with pytest.raises(error):
        checkpoint.make_folder(tmp_path / "a" / "b", write)
    assert list(tmp_path.iterdir()) == []


def test_what_is_copied_beside_the_weights(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    kept = {"config.json", "tokenizer/vocab.txt", "code/own.py"}
    others = {
        *("1.safetensors", "pytorch_model.bin", "other.index.json", "adapter_config.json", ".hidden"),
        *("checkpoint-1/model.safetensors", "checkpoint-1/config.json"),
    }
    for name in kept | others:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name, encoding="utf-8")
    folder.mkdir()
    checkpoint.copy_other_files(source, folder, [source / "1.safetensors"])
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == kept
