"""Merging adapters: into the float weights of a checkpoint, after dequantizing; into int8 weights it is refused."""

from __future__ import annotations

import copy
import itertools
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import quaff_fx
from quaff_fx.errors import CheckpointError, WeightError
from quaff_fx.files import checkpoint, merging, stored_tensor
from tests.interrupted_lines import interrupted_at
from tests.models import VOCABULARY, float_llama, token_ids

pytestmark = pytest.mark.compile

QUIET = {"progress": False, "calibration_steps": 1, "activation_bits": 8, "outlier_budget": 0.04}
FILES = (merging, checkpoint, stored_tensor)
PROJECTIONS = ["q_proj", "down_proj"]
FEEDFORWARD = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}

ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "rsLoRA": lambda: LoraConfig(r=4, target_modules=PROJECTIONS, use_rslora=True),
    "DoRA": lambda: LoraConfig(r=4, target_modules=PROJECTIONS, use_dora=True),
    "IA3": lambda: IA3Config(**FEEDFORWARD),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=PROJECTIONS),
    "LoRA and biases": lambda: LoraConfig(r=4, target_modules=PROJECTIONS, bias="all"),
    "LoRA and modules_to_save": lambda: LoraConfig(
        r=4, target_modules=PROJECTIONS, modules_to_save=["embed_tokens", "lm_head", "norm"]
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards."""
    folder = tmp_path_factory.mktemp("source")
    float_llama(attention_bias=True, mlp_bias=True).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def adapted(folder: Path, config: peft.PeftConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in `folder` with an adapter as if it had been trained."""
    return as_if_trained(with_adapter(LlamaForCausalLM.from_pretrained(folder, dtype=dtype), config))


def with_adapter(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, config)


def as_if_trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.train()


def quantized(model: nn.Module) -> nn.Module:
    return quaff_fx.calibrate(quaff_fx.compile(model, QUIET), [token_ids()])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def is_left_nothing_beside(folder: Path) -> bool:
    return not folder.exists() and not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


class TestIntoTheCheckpoint:
    @pytest.mark.parametrize("name", ADAPTERS)
    @pytest.mark.compatibility("Merging", "merge_into_checkpoint")
    def test_equals_what_peft_merges_into_the_float_model(self, source, tmp_path, name):
        reference = adapted(source, ADAPTERS[name]()).merge_and_unload()
        model = quantized(adapted(source, ADAPTERS[name]()))
        before = copy.deepcopy(model.state_dict())
        modules = [name for name, _ in model.named_modules()]
        output = tmp_path / "output"
        assert quaff_fx.merge_into_checkpoint(model, source, output, progress=False) == output

        merged = LlamaForCausalLM.from_pretrained(output)
        expected = reference.state_dict()
        changed = 0
        for weight_name, value in merged.state_dict().items():
            torch.testing.assert_close(value, expected[weight_name], rtol=0, atol=1e-6)
            changed += not torch.equal(value, weights_of(source)[weight_name])
        assert changed >= 4
        ids = token_ids()
        with torch.no_grad():
            torch.testing.assert_close(merged.eval()(ids).logits, reference.eval()(ids).logits, rtol=1e-5, atol=1e-6)
        # The model is as it was.
        assert [name for name, _ in model.named_modules()] == modules
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_folder_has_the_same_shards_and_files(self, source, tmp_path):
        """But no other weights, and no config of an adapter: `from_pretrained` would load that adapter on top."""
        model = quantized(adapted(source, ADAPTERS["IA3"]()))
        source = Path(shutil.copytree(source, tmp_path / "source"))
        for name in ("tokenizer.json", "adapter_config.json", "pytorch_model.bin"):
            (source / name).write_text("{}")
        output = tmp_path / "new" / "output"
        output.mkdir(parents=True)  # an empty folder is taken
        quaff_fx.merge_into_checkpoint(model, source, output, progress=False)
        names = {path.name for path in source.iterdir()} - {"pytorch_model.bin", "adapter_config.json"}
        assert {path.name for path in output.iterdir()} == names
        assert "tokenizer.json" in names
        for name in names:
            if not name.endswith(".safetensors"):
                assert (output / name).read_bytes() == (source / name).read_bytes()
            else:
                assert load_file(output / name).keys() == load_file(source / name).keys()
        assert [path.name for path in output.parent.iterdir()] == ["output"]

    @pytest.mark.parametrize("is_int8", [False, True])
    def test_a_frozen_weight_that_two_modules_share_is_stored_once(self, tmp_path, is_int8):
        def shared() -> nn.Module:
            torch.manual_seed(0)
            net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)))
            net[1][0].weight = net[0][0].weight
            return net.requires_grad_(False)

        source, tensors = tmp_path / "source", {n: t.clone() for n, t in shared().state_dict().items()}
        source.mkdir()
        del tensors["1.0.weight"]
        save_file(tensors, source / "model.safetensors")
        model = shared()
        if is_int8:
            with torch.device("meta"):
                model = shared()
            quaff_fx.load_checkpoint(model, source, QUIET)
        model = as_if_trained(get_peft_model(model, LoraConfig(r=2, target_modules=["0.1", "1.1"])))
        quaff_fx.merge_into_checkpoint(model, source, tmp_path / "output", progress=False)
        merged = weights_of(tmp_path / "output")
        assert merged.keys() == tensors.keys()
        changed = {name for name in merged if not torch.equal(merged[name], tensors[name])}
        assert changed == {"0.1.weight", "1.1.weight"}

    @pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3"])
    def test_in_bfloat16_it_is_pefts_result_bit_for_bit(self, tmp_path, name):
        source = tmp_path / "source"
        float_llama().to(torch.bfloat16).save_pretrained(source)
        reference = adapted(source, ADAPTERS[name](), torch.bfloat16).merge_and_unload(safe_merge=True)
        quaff_fx.merge_into_checkpoint(
            quantized(adapted(source, ADAPTERS[name](), torch.bfloat16)), source, tmp_path / "output", progress=False
        )
        merged = weights_of(tmp_path / "output")
        assert all(torch.equal(value, reference.state_dict()[name]) for name, value in merged.items())
        assert {value.dtype for value in merged.values()} == {torch.bfloat16}

    def test_conv1d_and_a_checkpoint_of_the_bare_decoder(self, tmp_path):
        """GPT-2 stores its weights transposed, and its checkpoint has names without the prefix `transformer.`."""
        torch.manual_seed(0)
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
        base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
        source = tmp_path / "source"
        base.transformer.save_pretrained(source)
        config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        model = as_if_trained(get_peft_model(base, config))
        reference = copy.deepcopy(model).merge_and_unload()
        quaff_fx.merge_into_checkpoint(quantized(model), source, tmp_path / "output", progress=False)
        for name, value in weights_of(tmp_path / "output").items():
            torch.testing.assert_close(value, reference.state_dict()[f"transformer.{name}"], rtol=0, atol=1e-6)

    def test_of_a_model_that_was_loaded_as_int8(self, source, tmp_path):
        """Whose float weights were never in memory."""
        base = quaff_fx.from_pretrained(LlamaForCausalLM, source, config=QUIET)
        model = as_if_trained(with_adapter(base, ADAPTERS["LoRA"]()))
        reference = adapted(source, ADAPTERS["LoRA"]()).merge_and_unload()
        quaff_fx.merge_into_checkpoint(model, source, tmp_path / "output", progress=False)
        for name, value in weights_of(tmp_path / "output").items():
            torch.testing.assert_close(value, reference.state_dict()[name], rtol=0, atol=1e-6)

    def test_one_adapter_of_two_and_one_added_after_compile(self, source, tmp_path):
        model = quantized(LlamaForCausalLM.from_pretrained(source).requires_grad_(False))
        model = get_peft_model(model, ADAPTERS["IA3"](), adapter_name="scaling")
        model.add_adapter("other", ADAPTERS["IA3"]())
        as_if_trained(model)
        quaff_fx.merge_into_checkpoint(model, source, tmp_path / "output", adapter_names=["scaling"], progress=False)
        old, new = weights_of(source), weights_of(tmp_path / "output")
        layer = model.base_model.model.model.layers[0].self_attn.k_proj
        expected = old["model.layers.0.self_attn.k_proj.weight"] * layer.ia3_l["scaling"]
        assert torch.equal(new["model.layers.0.self_attn.k_proj.weight"], expected)

    def test_only_one_shard_is_in_memory(self, source, tmp_path, monkeypatch):
        """What is written at once is one shard; at most one module more is being merged."""
        written = []

        def save(tensors, path, metadata):
            written.append(sum(tensor.nbytes for tensor in tensors.values()))
            save_file(tensors, path, metadata)

        monkeypatch.setattr(merging, "save_file", save)
        model = quantized(adapted(source, ADAPTERS["LoRA"]()))
        quaff_fx.merge_into_checkpoint(model, source, tmp_path / "output", progress=False)
        assert len(written) == len(list(source.glob("*.safetensors")))
        assert max(written) <= 60_000
        total = json.loads((source / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        assert sum(written) == total


def two_layers(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net.requires_grad_(False)
    for parameter in net.parameters():
        parameter.mul_(scale)
    return net


def with_two_adapters() -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(two_layers(), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))


def sharded(folder: Path, files: dict[str, str], index: dict[str, str] | None = None) -> Path:
    """A checkpoint of `two_layers`, its first and second layer in the files of these names; `index`: what it says."""
    tensors = two_layers().state_dict()
    for layer, file in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        old = load_file(path) if path.exists() else {}
        save_file(old | {name: value for name, value in tensors.items() if name[0] == layer}, path)
    weight_map = {name: (index or files)[name[0]] for name in tensors}
    content = {"metadata": {"total_size": 576}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def merged_weights() -> dict[str, torch.Tensor]:
    return with_two_adapters().merge_and_unload().state_dict()


class TestShards:
    """Every tensor is written, where it was, whatever the shards are called."""

    def assert_merged(self, source: Path, output: Path) -> None:
        assert quaff_fx.merge_into_checkpoint(with_two_adapters(), source, output, progress=False) == output
        expected = merged_weights()
        written = {path.relative_to(output): load_file(path) for path in output.rglob("*.safetensors")}
        found = [name for tensors in written.values() for name in tensors]
        assert sorted(found) == sorted(expected)
        for path, tensors in written.items():
            assert tensors.keys() == load_file(source / path).keys()
            for name, value in tensors.items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "files",
        [
            {"0": "a/w.safetensors", "1": "b/w.safetensors"},
            {"0": "w.safetensors", "1": "a/w.safetensors"},
            {"0": "W.safetensors", "1": "w.safetensors"},
            {"0": "./w.safetensors", "1": "a//b/w.safetensors"},
            {"0": "one.safetensors", "1": "./one.safetensors"},
            {"0": "a b/ü.safetensors", "1": ".hidden.safetensors"},
        ],
        ids=str,
    )
    def test_of_any_names(self, tmp_path, files):
        source = sharded(tmp_path / "source", files)
        self.assert_merged(source, tmp_path / "output")
        index = "model.safetensors.index.json"
        assert (tmp_path / "output" / index).read_bytes() == (source / index).read_bytes()

    def test_of_a_hub_cache_whose_files_are_links(self, tmp_path):
        blobs = sharded(tmp_path / "blobs", {"0": "a/w.safetensors", "1": "b/w.safetensors"})
        snapshot = tmp_path / "snapshots" / "main"
        for path in [path for path in blobs.rglob("*") if path.is_file()]:
            link = snapshot / path.relative_to(blobs)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        self.assert_merged(snapshot, tmp_path / "output")
        assert not any(path.is_symlink() for path in (tmp_path / "output").rglob("*"))

    def test_of_a_source_that_is_a_link_with_a_relative_path(self, tmp_path, monkeypatch):
        sharded(tmp_path / "real", {"0": "a/w.safetensors", "1": "b/w.safetensors"})
        (tmp_path / "source").symlink_to("real")
        (tmp_path / "there").mkdir()
        (tmp_path / "output").symlink_to("there")  # an empty folder is taken
        monkeypatch.chdir(tmp_path)
        self.assert_merged(Path("source"), Path("output"))
        assert (tmp_path / "output").is_symlink()

    def test_below_its_source(self, tmp_path):
        source = sharded(tmp_path / "source", {"0": "a/w.safetensors", "1": "b/w.safetensors"})
        (source / "config.json").write_text("{}")
        before = {path for path in source.rglob("*") if path.is_file()}
        for output in (source / "merged", source / "new" / "merged", source / "merged again"):
            quaff_fx.merge_into_checkpoint(with_two_adapters(), source, output, progress=False)
            names = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
            assert names == {path.relative_to(source) for path in before}
        with pytest.raises(CheckpointError, match="exists, expected a new or an empty folder"):
            quaff_fx.merge_into_checkpoint(with_two_adapters(), source, source / "merged" / ".." / ".." / "source")

    def test_files_in_folders_are_copied_but_no_other_model(self, tmp_path):
        source = sharded(tmp_path / "source", {"0": "a/w.safetensors", "1": "b/w.safetensors"})
        kept = ("config.json", "additional_chat_templates/tool.jinja", "a/notes.txt")
        left = ("checkpoint-5/optimizer.pt", "checkpoint-5/config.json", ".git/config", "old/pytorch_model.bin")
        for name in (*kept, *left):
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_text(name)
        self.assert_merged(source, tmp_path / "output")
        assert [(tmp_path / "output" / name).read_text() for name in kept] == list(kept)
        assert not any((tmp_path / "output" / name).exists() for name in left)

    @pytest.mark.parametrize("file", ["../other/w.safetensors", "a/../../w.safetensors", "/w.safetensors", "..", "", 3])
    def test_that_leave_the_folder_are_refused(self, tmp_path, file):
        source = sharded(tmp_path / "source", {"0": "w.safetensors", "1": "v.safetensors"})
        (tmp_path / "other").mkdir()
        shutil.copy(source / "w.safetensors", tmp_path / "other")
        edit_index(source, lambda index: index["weight_map"].update({"0.weight": file}))
        match = "names .*, expected safetensors files below its folder"
        self.assert_refused(source, tmp_path / "output", match)
        with pytest.raises(CheckpointError, match=match):
            quaff_fx.load_checkpoint(two_layers().to("meta"), source)

    @pytest.mark.parametrize(
        ("edit", "match"),
        [
            (lambda i: i["weight_map"].update({"1.weight": "w.safetensors"}), "1.weight: is not in .*w.safetensors"),
            (lambda i: i["weight_map"].update({"2.weight": "v.safetensors"}), "2.weight: is not in .*v.safetensors"),
            (lambda i: i["weight_map"].update({"1.bias": "u.safetensors"}), "u.safetensors: is missing"),
            (lambda i: i["weight_map"].update({"1.bias": "\0.safetensors"}), "safetensors: is missing"),
            (lambda i: i["weight_map"].update({"1.bias": "x" * 999 + ".safetensors"}), "safetensors: is missing"),
            (lambda i: i["weight_map"].clear(), "names no tensors, expected some"),
            (lambda i: i.update(weight_map=[]), "expected JSON with a weight_map"),
            (lambda i: i["weight_map"].update({"1.bias": ["w.safetensors"]}), "expected JSON with a weight_map"),
        ],
    )
    def test_that_are_not_what_the_index_says_are_refused(self, tmp_path, edit, match):
        source = sharded(tmp_path / "source", {"0": "w.safetensors", "1": "v.safetensors"})
        edit_index(source, edit)
        self.assert_refused(source, tmp_path / "output", match)

    @pytest.mark.parametrize("layer", ["0", "1"])
    def test_of_which_the_index_knows_none_of_a_layer(self, tmp_path, layer):
        """An adapter on the first layer; the second is frozen and in float."""
        source = sharded(tmp_path / "source", {"0": "w.safetensors", "1": "v.safetensors"})
        edit_index(source, lambda index: [index["weight_map"].pop(f"{layer}.{name}") for name in ("weight", "bias")])
        model = get_peft_model(two_layers(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        with pytest.raises(CheckpointError, match=rf"{layer}\.weight: is not in .*, expected every weight"):
            quaff_fx.merge_into_checkpoint(model, source, tmp_path / "output", progress=False)
        assert is_left_nothing_beside(tmp_path / "output")

    def test_a_tensor_in_two_shards_is_refused(self, tmp_path):
        source = sharded(tmp_path / "source", {"0": "w.safetensors", "1": "v.safetensors"})
        save_file(two_layers().state_dict(), source / "w.safetensors")
        self.assert_refused(source, tmp_path / "output", "1.bias: is in .*, expected in one file")

    def test_beside_one_file_that_lacks_some(self, tmp_path):
        """transformers reads the one file and says nothing of the others."""
        source = sharded(tmp_path / "source", {"0": "model.safetensors", "1": "v.safetensors"})
        self.assert_refused(source, tmp_path / "output", r"model\.safetensors: lacks 1\.\w+ \(and 1 more\) of model")
        save_file(two_layers().state_dict(), source / "model.safetensors")
        quaff_fx.merge_into_checkpoint(with_two_adapters(), source, tmp_path / "output", progress=False)
        assert {path.name for path in (tmp_path / "output").iterdir()} == {"model.safetensors"}

    def test_that_become_one_file_are_told_and_nothing_is_written(self, tmp_path, monkeypatch):
        """As in a file system that does not tell upper from lower case."""
        source = sharded(tmp_path / "source", {"0": "W.safetensors", "1": "w.safetensors"})
        monkeypatch.setattr(merging, "save_file", lambda t, path, metadata: save_file(t, str(path).lower(), metadata))
        monkeypatch.setattr(merging, "_check_written", of_lower_case(merging._check_written))
        self.assert_refused(
            source, tmp_path / "output", r"0\.\w+: is missing in the copy of .*W\.safetensors, expected"
        )

    def test_that_change_while_they_are_merged(self, tmp_path, monkeypatch):
        source = sharded(tmp_path / "source", {"0": "w.safetensors", "1": "v.safetensors"})
        copy_files = checkpoint.copy_other_files

        def copy_and_change(*args):
            copy_files(*args)
            save_file(two_layers().state_dict() | {"2.weight": torch.zeros(1)}, source / "w.safetensors")

        monkeypatch.setattr(checkpoint, "copy_other_files", copy_and_change)
        self.assert_refused(source, tmp_path / "output", r"w\.safetensors: has changed since 0\.\w+ was read from it")

    def assert_refused(self, source, output, match):
        with pytest.raises(CheckpointError, match=match) as caught:
            quaff_fx.merge_into_checkpoint(with_two_adapters(), source, output, progress=False)
        assert ", expected " in str(caught.value)
        assert is_left_nothing_beside(output)


def of_lower_case(check):
    """`_check_written` in a folder whose file system has lower case only."""

    class Lower(type(Path())):
        def __truediv__(self, name):
            return Path(str(self), str(name).lower())

    return lambda files, source, folder, stored: check(files, source, Lower(folder), stored)


def edit_index(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


class TestEnded:
    """By whatever it is: no folder is left, none that is half of it, none that was made on the way."""

    pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

    @pytest.fixture
    def folders(self, tmp_path) -> tuple[Path, Path]:
        return sharded(
            tmp_path / "source", {"0": "a/w.safetensors", "1": "b/w.safetensors"}
        ), tmp_path / "new" / "output"

    def assert_nothing_is_left(self, tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_by_a_full_disk(self, folders, tmp_path):
        """A limit on the size of files fails as a full disk does; safetensors has an error of its own for it."""
        source, output = folders
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r"output: cannot be written \(.*, expected room for a copy of"):
                quaff_fx.merge_into_checkpoint(with_two_adapters(), source, output, progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assert_nothing_is_left(tmp_path)

    def test_by_a_parent_that_is_a_file(self, folders, tmp_path):
        source, _ = folders
        output = source / "a" / "w.safetensors" / "output"
        with pytest.raises(CheckpointError, match="output: cannot be written"):
            quaff_fx.merge_into_checkpoint(with_two_adapters(), source, output, progress=False)
        with pytest.raises(CheckpointError, match=r"w\.safetensors: is a file, expected the folder of a checkpoint"):
            quaff_fx.merge_into_checkpoint(with_two_adapters(), source / "a" / "w.safetensors", output)
        self.assert_nothing_is_left(tmp_path)

    @pytest.mark.slow
    def test_by_an_interrupt_at_any_line(self, folders, tmp_path):
        source, output = folders
        model = with_two_adapters()
        before = copy.deepcopy(model.state_dict())

        def merge():
            quaff_fx.merge_into_checkpoint(model, source, output, progress=False)

        lines = interrupted_at(merge, None, FILES)
        whole = weights_below(output)
        shutil.rmtree(output.parent)
        assert lines > 200
        interrupted = 0
        for number in range(0, lines, 2):
            try:
                interrupted_at(merge, number, FILES)
            except KeyboardInterrupt:
                interrupted += 1
            if output.exists():  # it came when all was done, or where Python ignores it: a generator is let go
                assert weights_below(output) == whole
                shutil.rmtree(output.parent)
            self.assert_nothing_is_left(tmp_path)
        assert interrupted > 100
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def weights_below(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestBadInput:
    def refused(self, model, source, output, error, match, **options):
        with pytest.raises(error, match=match):
            quaff_fx.merge_into_checkpoint(model, source, output, progress=False, **options)
        assert is_left_nothing_beside(output)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, source) -> nn.Module:
        return quantized(adapted(source, ADAPTERS["LoRA"]()))

    def edited(self, source: Path, folder: Path, edit) -> Path:
        tensors = weights_of(source)
        edit(tensors)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        return folder

    def test_weights_of_another_checkpoint(self, model, source, tmp_path):
        def other(tensors):
            name = "model.layers.1.mlp.up_proj.weight"
            tensors[name] = tensors[name] + 0.05 * torch.randn_like(tensors[name])

        match = r"model.layers.1.mlp.up_proj.weight: differs from .* though it is frozen, expected the weight that the"
        self.refused(model, self.edited(source, tmp_path / "s", other), tmp_path / "o", CheckpointError, match)

    def test_a_frozen_float_weight_of_another_checkpoint(self, model, source, tmp_path):
        def other(tensors):
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5

        match = "model.norm.weight: differs from model.norm.weight in"
        self.refused(model, self.edited(source, tmp_path / "s", other), tmp_path / "o", CheckpointError, match)

    def test_names_that_do_not_match(self, model, source, tmp_path):
        def renamed(tensors):
            tensors["model.layers.0.self_attn.query.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")

        match = (
            r"layers.0.self_attn.q_proj.weight: is not in .* \(near: .*expected every weight that an adapter changes"
        )
        self.refused(model, self.edited(source, tmp_path / "s", renamed), tmp_path / "o", CheckpointError, match)

    def test_a_shape_that_does_not_match(self, model, source, tmp_path):
        def cut(tensors):
            tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:70].clone()

        match = r"model.embed_tokens.weight: has shape \(70, 48\) in .*, expected \(80, 48\)"
        self.refused(model, self.edited(source, tmp_path / "s", cut), tmp_path / "o", CheckpointError, match)

    def test_a_quantized_checkpoint(self, model, source, tmp_path):
        def to_int8(tensors):
            name = "model.layers.0.self_attn.q_proj.weight"
            tensors[name] = tensors[name].to(torch.int8)

        match = r"q_proj.weight: is stored as torch.int8, expected a floating dtype"
        self.refused(model, self.edited(source, tmp_path / "s", to_int8), tmp_path / "o", CheckpointError, match)

    def test_an_adapter_that_changed_the_weight_when_it_was_added(self, source, tmp_path):
        """PiSSA trains the main part and leaves the rest as weight: it is to be merged into the rest."""
        config = LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights="pissa")
        model = quantized(adapted(source, config))
        match = r"differs from .*an adapter has changed the weight when it was added \(PiSSA"
        self.refused(model, source, tmp_path / "o", CheckpointError, match)

    def test_no_checkpoint(self, model, tmp_path):
        with pytest.raises(CheckpointError, match="is no file, expected a safetensors file or a folder"):
            quaff_fx.merge_into_checkpoint(model, tmp_path / "missing", tmp_path / "o")

    def test_output_that_exists(self, model, source):
        with pytest.raises(CheckpointError, match="exists, expected a new or an empty folder"):
            quaff_fx.merge_into_checkpoint(model, source, source)

    def test_output_that_cannot_be_written(self, model, source, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError("No space left on device")

        monkeypatch.setattr(checkpoint, "copy_other_files", full)
        match = r"o: cannot be written \(No space left on device\), expected room for a copy of"
        self.refused(model, source, tmp_path / "o", CheckpointError, match)

    def test_an_unknown_adapter(self, model, source, tmp_path):
        match = r"adapter_names: has 'defualt', expected some of \['default'\]"
        self.refused(model, source, tmp_path / "o", WeightError, match, adapter_names=["defualt"])

    def test_nothing_to_merge(self, source, tmp_path):
        plain = LlamaForCausalLM.from_pretrained(source).requires_grad_(False)
        self.refused(plain, source, tmp_path / "o", WeightError, "model: has no adapter and no weight that was trained")
        fresh = get_peft_model(plain, LoraConfig(r=4, target_modules=PROJECTIONS))
        self.refused(fresh, source, tmp_path / "o", WeightError, "model: holds nothing that the checkpoint does not")

    def test_a_learned_prompt(self, source, tmp_path):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(source), config)
        self.refused(model, source, tmp_path / "o", WeightError, "model: its adapter is a learned prompt")

    def test_an_adapter_that_is_merged_already(self, source, tmp_path):
        model = adapted(source, ADAPTERS["LoRA"]())
        model.merge_adapter()
        self.refused(model, source, tmp_path / "o", WeightError, "its adapter is merged already")

    def test_an_adapter_that_is_broken(self, source, tmp_path):
        model = adapted(source, ADAPTERS["IA3"]())
        model.base_model.model.model.layers[1].mlp.down_proj.ia3_l["default"].data[0, 3] = torch.nan
        match = "layers.1.mlp.down_proj: PEFT cannot merge its adapter .NaNs detected"
        self.refused(model, source, tmp_path / "o", WeightError, match)

    def test_a_sharded_model(self, source, tmp_path):
        model = adapted(source, ADAPTERS["LoRA"]())
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            fully_shard(model.base_model.model.model.layers[1], mesh=init_device_mesh("cpu", (1,)))
            match = r"model.layers.1.self_attn.q_proj: is sharded, expected whole weights"
            self.refused(model, source, tmp_path / "o", WeightError, match)
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft")
    def test_a_tied_weight(self, tmp_path):
        source = tmp_path / "source"
        float_llama(tie_word_embeddings=True).save_pretrained(source)
        config = LoraConfig(r=4, target_modules=PROJECTIONS, modules_to_save=["embed_tokens"])
        match = (
            "model.embed_tokens.weight: is tied to lm_head.weight, expected an adapter on a weight of one place only"
        )
        self.refused(adapted(source, config), source, tmp_path / "o", CheckpointError, match)


class TestIntoInt8Weights:
    """Refused before anything is changed, whenever the adapter was added."""

    @pytest.mark.parametrize("name", ["LoRA and modules_to_save", "DoRA", "IA3"])
    @pytest.mark.parametrize("added", ["before", "after"])
    @pytest.mark.compatibility("Merging", "merge_and_unload into int8: refused, with the way out")
    def test_refused_with_the_way_out_and_the_model_stays(self, source, name, added):
        if added == "before":
            model = quantized(adapted(source, ADAPTERS[name]()))
        else:
            base = quantized(LlamaForCausalLM.from_pretrained(source).requires_grad_(False))
            model = as_if_trained(get_peft_model(base, ADAPTERS[name]()))
        modules = [(name, id(module)) for name, module in model.named_modules()]
        values = copy.deepcopy(model.state_dict())
        for merge, safe_merge in itertools.product((model.merge_adapter, model.merge_and_unload), (False, True)):
            with pytest.raises(WeightError, match="is int8 and rebuilt at each read") as raised:
                merge(safe_merge=safe_merge)
            assert "quaff_fx.merge_into_checkpoint(model, source, output)" in str(raised.value)
            assert "quaff_fx.dequantize(model)" in str(raised.value)
        assert [(name, id(module)) for name, module in model.named_modules()] == modules
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())

    def test_one_layer_alone_is_refused_too(self, source):
        model = quantized(adapted(source, ADAPTERS["LoRA"]()))
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        with pytest.raises(WeightError, match="is int8 and rebuilt at each read"):
            layer.merge()
        assert not layer.merged

    def test_float_models_merge_as_ever(self, source):
        """The guard looks at int8 weights only."""
        merged = adapted(source, ADAPTERS["LoRA"]()).merge_and_unload()
        old = weights_of(source)["model.layers.0.mlp.up_proj.weight"]
        assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, old)

    def test_an_adapter_on_a_float_layer_beside_int8_ones_merges(self, source):
        model = quantized(LlamaForCausalLM.from_pretrained(source).requires_grad_(False))
        model = as_if_trained(get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"])))
        old = weights_of(source)["lm_head.weight"]
        merged = model.merge_and_unload()
        assert not torch.equal(merged.lm_head.weight, old)

    def test_while_it_is_observed_the_weights_are_float_and_merging_edits_them(self, source):
        model = quaff_fx.compile(adapted(source, ADAPTERS["LoRA"]()), QUIET).eval()
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        before = layer.base_layer.weight.clone()
        model.merge_adapter()
        assert not torch.equal(layer.base_layer.weight, before)
        model.unmerge_adapter()
        torch.testing.assert_close(layer.base_layer.weight, before, rtol=0, atol=1e-6)


@pytest.mark.compatibility("Merging", "dequantize, then merge_and_unload and save_pretrained")
def test_dequantized_merged_saved_and_loaded_it_is_the_same_model(source, tmp_path):
    """The way without the original checkpoint: what is saved carries the rounding of the int8 weights."""
    model = quaff_fx.dequantize(quantized(adapted(source, ADAPTERS["LoRA"]()))).eval()
    ids = token_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded(input_ids=ids).logits, merged(input_ids=ids).logits)
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    reference = adapted(source, ADAPTERS["LoRA"]()).merge_and_unload().eval()
    with torch.no_grad():
        difference = (expected - reference(input_ids=ids).logits).norm() / expected.norm()
    assert 0 < difference < 0.02
