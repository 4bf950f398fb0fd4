"""Malformed files and states: each is to be refused with an error of quaff_fx, or read as what it was before.

What nothing could notice is left out: a plain safetensors file has no checksum, so its header is attacked and not the
bits of its tensors, nor two of its tensors exchanged; and in ``trainer_state.json`` the entries of other callbacks.
"""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import TrainerState

import quaff_fx
from quaff_fx import trainer
from quaff_fx.errors import QuaffError
from quaff_fx.files.saved_state import METADATA, SavedState

QUIET = {"progress": False}
INDEX = "model.safetensors.index.json"


@dataclass
class Counts:
    """What became of malformed inputs.

    Attributes:
        refused: a QuaffError, or an older checkpoint. equal: read as before. misread: read as something else.
        foreign: any other exception. examples: of the last two, one per kind.
    """

    refused: int = 0
    equal: int = 0
    misread: int = 0
    foreign: int = 0
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        return self.refused + self.equal + self.wrong

    @property
    def wrong(self) -> int:
        return self.misread + self.foreign


# --- samples -------------------------------------------------------------------------------------------------------

_LEFT_ALONE = {"left_alone": {"embed.weight": "outside the repeated blocks (scope='blocks')"}}
_CONFIG = {"calibration_steps": 4, "outlier_budget": 0.05, "include": ["*"], "momentum": 0.1}


def observed_state() -> SavedState:
    """The statistics of two sites."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"0.weight": [6, 4], "1.weight": [3, 8]}
    numbers = {"dtype": "float32", "in_dim_seen": 1, "steps": 3}
    return SavedState(
        stage="observe",
        steps=3,
        config=_CONFIG | {"smoothing": "momentum"},
        sites={name: {"shape": shape, "crc32": 7 * len(shape)} | numbers for name, shape in shapes.items()},
        tensors={
            f"{name}.{statistic}": torch.rand(max(shape), generator=draw)
            for name, shape in shapes.items()
            for statistic in ("hits", "absmax_sum")
        },
        multiply_adds={"0.weight": 24, "1.weight": 24, "embed.weight": 0},
        **_LEFT_ALONE,
    )


def converted_state() -> SavedState:
    """Three int8 weights, of which two share their outlier channels."""
    numbers = {"dtype": "bfloat16", "in_dim": 1, "activation_max": 127, "rotation": 2}
    entries = {"0.weight": ([6, 8], 0), "1.weight": ([3, 8], 0), "2.weight": ([5, 4], 1)}
    values = {"outlier_w_absmax": 0.5, "smoothing_scale": 1.5, "next_smoothing_scale": 2.5}
    tensors = {f"outliers.{group}.outlier_channels": torch.tensor([3, group]) for group in (0, 1)}
    tensors |= {
        f"outliers.{group}.{name}": torch.tensor([value, value + group + 1.0])
        for group in (0, 1)
        for name, value in values.items()
    }
    return SavedState(
        stage="quantize",
        steps=4,
        config=_CONFIG | {"smoothing": "momentum"},
        sites={
            name: {"shape": shape, "crc32": shape[0]} | numbers | {"outliers": group}
            for name, (shape, group) in entries.items()
        },
        tensors=tensors,
        multiply_adds=dict.fromkeys((*entries, "embed.weight"), 100),
        **_LEFT_ALONE,
    )


def float_model(device: str = "cpu") -> nn.Sequential:
    """Two blocks, whose linears are loaded as int8, and one linear that stays in float."""
    with torch.device(device):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)) for _ in range(2)]
        return nn.Sequential(*blocks, nn.Linear(8, 3)).requires_grad_(False)


# --- contents, as something to compare -----------------------------------------------------------------------------


def _of_tensors(tensors: Mapping[str, Tensor]) -> Any:
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


def _of_state(saved: SavedState) -> Any:
    names = ("stage", "steps", "config", "sites", "left_alone", "multiply_adds")
    return json.dumps({name: getattr(saved, name) for name in names}, sort_keys=True), _of_tensors(saved.tensors)


def _of_trainer_state(folder: Path) -> Any:
    values = json.loads((folder / trainer.TRAINER_STATE).read_text(encoding="utf-8"))
    saved = trainer._saved_by(values.pop("stateful_callbacks"))
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != trainer.TRAINER_STATE}
    return json.dumps(values, sort_keys=True), saved, files


# --- attacks -------------------------------------------------------------------------------------------------------

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 63, 1.0, 1.5, -0.5, 2**31, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**30, 1e308),
    *(float("nan"), float("inf"), "", "0.weight", "\0", "\ud800", "ü", "..", "../../x", "/", "x" * 5000, "F32", "I64"),
    *([], [[]], {}, {"": None}, [0] * 100, [2**62, 4], [2**63, 0], [0, 2**63 - 1], [-1], [1, 1, 1, 1]),
    *("w.safetensors", "../w.safetensors", "model.safetensors", "observe", "quantize", "split"),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be changed in JSON: the keys that lead there."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in entries for place in _places(child, (*path, key)))]


def _edited_json(draw: random.Random, value: Any) -> Any:
    """A copy with one entry changed, removed, renamed, added or exchanged with another."""
    value = json.loads(json.dumps(value))
    *path, last = draw.choice(_places(value)[1:])
    parent = value
    for key in path:
        parent = parent[key]
    kind = draw.randrange(6)
    if kind == 0 and isinstance(parent[last], int) and not isinstance(parent[last], bool):
        parent[last] += draw.choice((-1, 1, 7, 2**31, -(2**63)))
    elif kind == 1:
        del parent[last]
    elif kind == 2 and isinstance(parent, dict):
        parent[draw.choice(("", "x", f"{last}x", f"{last}"[1:], *parent))] = parent.pop(last)
    elif kind == 3 and isinstance(parent, dict):
        parent[draw.choice(("x", "0.weight", "format", "metadata"))] = draw.choice(_VALUES)
    elif kind == 4:
        other = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[last], parent[other] = parent[other], parent[last]
    else:
        parent[last] = draw.choice(_VALUES)
    return value


def _edited_text(draw: random.Random, text: str) -> bytes:
    """JSON with an entry changed, or no proper JSON any more."""
    kind = draw.randrange(10)
    if kind == 0:
        depth = draw.choice((10, 300, 900, 990, 100_000))
        return (draw.choice(("[", '{"a":')) * depth + "1" + "]" * depth).encode()
    if kind == 1:
        return text.encode(draw.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le")))
    if kind == 2:
        return draw.choice((b"", b"null", b"3", b"[]", b"{}", b"\xff\xfe", b"9" * 5000, b'"' + b"x" * 10**6))
    if kind == 3:
        return text.replace("{", '{"weight_map": {}, "steps": 1, ', 1).encode()
    if kind == 4:
        return _edited_bytes(draw, text.encode())
    return json.dumps(_edited_json(draw, json.loads(text))).encode()


def _edited_bytes(draw: random.Random, content: bytes, end: int | None = None) -> bytes:
    """Bits flipped, parts zeroed, exchanged, cut out or put in, before `end`; or the end cut off or added to."""
    end = len(content) if end is None else end
    changed, kind = bytearray(content), draw.randrange(9)
    start = draw.randrange(end)
    part = slice(start, min(end, start + draw.randrange(1, 64)))
    if kind < 3:
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
    elif kind == 3:
        return content[: draw.randrange(len(content))]
    elif kind == 4:
        return content + draw.randbytes(draw.randrange(1, 99))
    elif kind == 5:
        changed[part] = bytes(part.stop - part.start)
    elif kind == 6:
        changed[part] = draw.randbytes(draw.randrange(64))
    elif kind == 7:
        other = draw.randrange(end)
        changed[start], changed[other] = changed[other], changed[start]
    else:
        return draw.randbytes(draw.randrange(64))
    return bytes(changed)


def _header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _edited_safetensors(draw: random.Random, content: bytes, *, has_checksum: bool) -> bytes:
    header, data = _header_of(content)
    kind = draw.randrange(6)
    if kind == 0:
        sizes = (0, 1, len(content), len(content) - 8, 10**8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
        return draw.choice(sizes).to_bytes(8, "little") + content[8:]
    if kind == 1:
        return _edited_bytes(draw, content, None if has_checksum else len(content) - len(data))
    if kind == 2:
        return _with_header(_edited_text(draw, json.dumps(header)), data)
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    if kind == 3:
        sizes = (
            [],
            [0],
            [1],
            [-1],
            [2**63, 0],
            [0, 2**62],
            [2**32, 2**32],
            [2**64],
            [1] * 70,
            [1.5],
            "x",
            None,
            [True],
        )
        header[name]["shape"] = draw.choice((*sizes, [*header[name]["shape"], 1], header[name]["shape"][::-1]))
    elif kind == 4:
        kinds = (
            "F32",
            "F64",
            "F16",
            "BF16",
            "I64",
            "I32",
            "U32",
            "U8",
            "BOOL",
            "F8_E4M3",
            "F4",
            "C64",
            "X",
            "",
            None,
            3,
        )
        header[name]["dtype"] = draw.choice(kinds)
    elif has_checksum and draw.random() < 0.5:
        other = draw.choice(names)
        header[name], header[other] = header[other], header[name]
    else:
        header[draw.choice(("x", "", "\0", name.upper(), *names))] = header.pop(name)
    return _with_header(header, data)


def _edited_tensors(draw: random.Random, tensors: dict[str, Tensor]) -> dict[Any, Any]:
    name, other = draw.choice(list(tensors)), draw.choice(list(tensors))
    tensor, changed, kind = tensors[name], dict(tensors), draw.randrange(9)
    if kind < 2:
        changed[name] = tensor.clone()
        changed[name].view(torch.uint8)[draw.randrange(tensor.nbytes)] ^= 1 << draw.randrange(8)
    elif kind == 2:
        dtypes = (torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
        changed[name] = tensor.to(draw.choice(dtypes))
    elif kind == 3:
        forms: tuple[Callable[[Tensor], Any], ...] = (
            lambda t: t[:-1],
            lambda t: t[None],
            lambda t: t[0],
            lambda t: t[:0],
            lambda t: t.flip(0),
            lambda t: torch.cat([t, t]),
            lambda t: t.repeat_interleave(2)[::2],
            lambda t: t.to("meta"),
            lambda t: t.to_sparse(),
            lambda t: t.tolist(),
            lambda t: t.numpy(),
            lambda t: nn.Parameter(t, requires_grad=False),
            lambda t: t.view(torch.int32) if t.dtype == torch.float32 else t.roll(1),
        )
        changed[name] = draw.choice(forms)(tensor)
    elif kind == 4:
        changed[name], changed[other] = changed[other], changed[name]
    elif kind == 5:
        del changed[name]
    elif kind == 6:
        changed[draw.choice(("x", "", f"{name}.hits", 3, None, ("a",), other))] = changed.pop(name)
    else:
        text = _edited_text(draw, bytes(tensors[METADATA].tolist()).decode())
        changed[METADATA] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0).byte()
    return changed


# --- subjects: what is attacked and how it is read -----------------------------------------------------------------

Case = Callable[[random.Random], Callable[[], Any]]
"""Draws a malformed input; calling the result reads it and returns its content."""


def _state_files(folder: Path, saved: SavedState) -> tuple[Any, Case]:
    path = folder / "quaff_state.safetensors"
    saved.write(path)
    content = path.read_bytes()
    header, data = _header_of(content)

    def case(draw: random.Random) -> Callable[[], Any]:
        if draw.random() < 0.4:
            text = _edited_text(draw, header["__metadata__"][METADATA]).decode("utf-8", "replace")
            path.write_bytes(_with_header(header | {"__metadata__": {METADATA: text}}, data))
        else:
            path.write_bytes(_edited_safetensors(draw, content, has_checksum=True))
        return lambda: _of_state(SavedState.read(path))

    return _of_state(saved), case


def _state_dicts(folder: Path, saved: SavedState) -> tuple[Any, Case]:
    tensors = saved.to_tensors()

    def case(draw: random.Random) -> Callable[[], Any]:
        changed = _edited_tensors(draw, tensors)
        return lambda: _of_state(SavedState.from_tensors(changed))

    return _of_state(saved), case


def _loaded(folder: Path) -> Any:
    return _of_tensors(quaff_fx.load_checkpoint(float_model("meta"), folder, QUIET).state_dict())


def _weights(folder: Path) -> tuple[Any, Case]:
    content = save(float_model().state_dict(), {"format": "pt"})
    path = folder / "model.safetensors"
    path.write_bytes(content)
    expected = _loaded(folder)

    def case(draw: random.Random) -> Callable[[], Any]:
        path.write_bytes(_edited_safetensors(draw, content, has_checksum=False))
        return lambda: _loaded(folder)

    return expected, case


def _merged(model: nn.Module, folder: Path) -> Any:
    with tempfile.TemporaryDirectory() as output:
        quaff_fx.merge_into_checkpoint(model, folder, output, progress=False)
        return _of_tensors({n: t for path in Path(output).rglob("*.safetensors") for n, t in load_file(path).items()})


def _index(folder: Path, *, is_merged: bool) -> tuple[Any, Case]:
    tensors = float_model().state_dict()
    weight_map = {name: ("a/w" if name[0] == "0" else "w") + ".safetensors" for name in tensors}
    (folder / "a").mkdir()
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    text = json.dumps({"metadata": {"total_size": 900}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(text)
    torch.manual_seed(0)
    model = get_peft_model(float_model(), LoraConfig(r=2, target_modules=["1.0", "1.1"], init_lora_weights=False))
    read: Callable[[], Any] = (lambda: _merged(model, folder)) if is_merged else (lambda: _loaded(folder))
    expected = read()

    def case(draw: random.Random) -> Callable[[], Any]:
        if draw.random() < 0.1:  # nothing of one file
            gone = draw.choice(sorted(set(weight_map.values())))
            kept = {name: file for name, file in weight_map.items() if file != gone}
            (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 900}, "weight_map": kept}))
        else:
            (folder / INDEX).write_bytes(_edited_text(draw, text))
        return read

    return expected, case


def _trainer_states(folder: Path) -> tuple[Any, Case]:
    contents = {
        "quaff_state.safetensors": save(observed_state().tensors),
        "adapter_model.safetensors": save({"weight": torch.ones(3)}),
        "optimizer.pt": bytes(range(256)),
    }
    for step in (1, 2):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name, content in contents.items():
            (checkpoint / name).write_bytes(content)
        log = [{"epoch": step / 3, "loss": 1.25 / step, "learning_rate": 1e-05, "step": step}]
        state = TrainerState(global_step=step, epoch=step / 3, max_steps=6, log_history=log)
        callback = quaff_fx.QuaffCallback()
        callback.files = {name: trainer._checksum(checkpoint / name) for name in contents}
        callback.checksum = trainer._checksum_of_state(dataclasses.asdict(state), callback.files)
        state.stateful_callbacks["QuaffCallback"] = callback.state()
        state.save_to_json(str(checkpoint / trainer.TRAINER_STATE))
    last = folder / "checkpoint-2"
    text = (last / trainer.TRAINER_STATE).read_text()
    expected = _of_trainer_state(last)

    def case(draw: random.Random) -> Callable[[], Any]:
        for name, content in contents.items():
            (last / name).write_bytes(content)
        (last / trainer.TRAINER_STATE).write_text(text)
        if draw.random() < 0.2:
            name = draw.choice(list(contents))
            (last / name).write_bytes(_edited_bytes(draw, contents[name]))
        else:
            (last / trainer.TRAINER_STATE).write_bytes(_edited_text(draw, text))
        return read

    def read() -> Any:
        found = quaff_fx.last_checkpoint(folder)
        if found != str(last):
            assert found == str(folder / "checkpoint-1"), found
            raise Refused
        return _of_trainer_state(last)

    return expected, case


class Refused(Exception):  # noqa: N818
    """`last_checkpoint` took the older one."""


SUBJECTS: dict[str, Callable[[Path], tuple[Any, Case]]] = {
    "state file, observing": lambda folder: _state_files(folder, observed_state()),
    "state file, converted": lambda folder: _state_files(folder, converted_state()),
    "state dict, observing": lambda folder: _state_dicts(folder, observed_state()),
    "state dict, converted": lambda folder: _state_dicts(folder, converted_state()),
    "model.safetensors": _weights,
    "index, loaded": lambda folder: _index(folder, is_merged=False),
    "index, merged": lambda folder: _index(folder, is_merged=True),
    "trainer_state.json": _trainer_states,
}


def run(cases: int, seed: int = 0) -> dict[str, Counts]:
    """Reads `cases` malformed inputs, the same for the same seed; returns what became of them, by what was attacked."""
    return {name: run_subject(name, -(-cases // len(SUBJECTS)), seed) for name in SUBJECTS}


def run_subject(name: str, cases: int, seed: int = 0) -> Counts:
    """As `run`, of one of the `SUBJECTS`."""
    counts, outcomes = Counts(), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        expected, case = SUBJECTS[name](Path(folder))
        for number in range(cases):
            draw = random.Random(f"{name} {seed} {number}")
            read = case(draw)
            try:
                outcome = "equal" if read() == expected else "misread"
                found = "read as something else"
            except (QuaffError, Refused):
                outcome = "refused"
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # safetensors' panics are no Exception
                outcome, found = "foreign", f"{type(error).__name__}: {error!s:.200}"
            outcomes[outcome] += 1
            if outcome in ("misread", "foreign"):
                counts.examples.setdefault(found, f"{name}, seed {seed}, case {number}")
    for outcome, count in outcomes.items():
        setattr(counts, outcome, count)
    return counts
