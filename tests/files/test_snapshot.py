"""Calibration and smoothing state: taken, brought back bit for bit, and refused where it does not fit."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

import quaff_fx
from quaff_fx import calls
from quaff_fx.api import stages_of
from quaff_fx.errors import CalibrationError, CheckpointError, ConfigError
from quaff_fx.files.saved_state import METADATA, SavedState
from quaff_fx.weights import OutlierState, QuantizedWeight
from quaff_fx.weights.owners import RUN
from tests.documentation import code_of
from tests.models import float_llama, token_ids, with_lora

FILE = "quaff_state.safetensors"
CONFIG = {"calibration_steps": 2, "outlier_budget": 0.05, "progress": False}
STEPS = 5
LAYER = "model.layers.0.self_attn.q_proj.weight"


def base(**config: Any) -> LlamaForCausalLM:
    return float_llama(initializer_range=0.1, **config)


def compiled(float_model: nn.Module | None = None, **config: Any) -> nn.Module:
    lora = with_lora(float_model or base(), lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    lora.enable_input_require_grads()  # the first block is like the others then: one graph to compile instead of two
    return quaff_fx.compile(lora.train(), CONFIG | config)


def documented(section: str) -> dict[str, Any]:
    """What the code of a section of docs/training-loops.md defines."""
    namespace: dict[str, Any] = {"os": os, "torch": torch, "quaff_fx": quaff_fx}
    namespace |= {f.__name__: f for f in (get_peft_model_state_dict, set_peft_model_state_dict)}
    exec(code_of("training-loops.md", section), namespace)
    return namespace


@dataclass
class Training:
    """A model in a plain loop."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=STEPS)

    def step(self, step: int) -> None:
        ids = token_ids(seed=step)
        loss = self.model(input_ids=ids, labels=ids).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item())


@dataclass
class Recorded:
    """An uninterrupted run: its checkpoints before each step, its losses, what it ended with."""

    folder: Path
    losses: list[float]
    adapter: dict[str, Tensor]
    states: list[dict[str, Tensor]]
    model: nn.Module


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    torch.manual_seed(0)
    folder, save = tmp_path_factory.mktemp("plain"), documented("Plain PyTorch")["save"]
    run, states = Training(compiled()), []
    for step in range(STEPS):
        save(folder / f"{step}.pt", run.model, run.optimizer, run.scheduler, step)
        states.append(quaff_fx.state_dict(run.model))
        run.step(step)
    states.append(quaff_fx.state_dict(run.model))
    adapter = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(run.model).items()}
    return Recorded(folder, run.losses, adapter, states, run.model)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# --- brought back --------------------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4], ids=["calibrating", "before the conversion", "converted"])
def test_a_plain_loop_goes_on_bit_for_bit(recorded: Recorded, step: int) -> None:
    torch.manual_seed(step)
    run = Training(compiled())
    assert (
        documented("Plain PyTorch")["resume"](recorded.folder / f"{step}.pt", run.model, run.optimizer, run.scheduler)
        == step
    )
    for each in range(step, STEPS):
        run.step(each)
    assert run.losses == recorded.losses[step:]
    assert_equal(get_peft_model_state_dict(run.model), recorded.adapter)
    assert_equal(quaff_fx.state_dict(run.model), recorded.states[STEPS])


@pytest.fixture(autouse=True)
def no_state_of_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in singletons, which would leak into the next test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared() -> tuple[Training, Accelerator]:
    """A new run whose parts Accelerate saves."""
    accelerator, run = Accelerator(cpu=True), Training(compiled())
    run.model, run.optimizer, run.scheduler = accelerator.prepare(run.model, run.optimizer, run.scheduler)
    return run, accelerator


@pytest.mark.compile
@pytest.mark.slow
def test_accelerate_saves_and_loads(tmp_path: Path) -> None:
    register = documented("Accelerate")["register"]
    run, accelerator = prepared()
    register(accelerator, run.model)
    for step in range(STEPS):
        if step in (1, 3):
            accelerator.save_state(str(tmp_path / str(step)))
        run.step(step)
    for step in (1, 3):
        resumed, accelerator = prepared()
        register(accelerator, resumed.model)
        accelerator.load_state(str(tmp_path / str(step)))
        for each in range(step, STEPS):
            resumed.step(each)
        assert resumed.losses == run.losses[step:], step


class Pair:
    """What Accelerate wants of an object that it saves."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return quaff_fx.state_dict(self.model)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        quaff_fx.load_state_dict(self.model, state)


@pytest.mark.compile
@pytest.mark.slow
def test_accelerate_takes_the_pair_as_a_registered_object(tmp_path: Path) -> None:
    """It works where the model has the saved stage; else it is too late, and Accelerate says so before it is asked."""
    run, accelerator = prepared()
    accelerator.register_for_checkpointing(Pair(run.model))
    for step in range(4):
        accelerator.save_state(str(tmp_path / str(step)))
        run.step(step)
    accelerator.load_state(str(tmp_path / "3"))
    run.step(3)
    assert run.losses[3] == run.losses[4]

    resumed, accelerator = prepared()
    accelerator.register_for_checkpointing(Pair(resumed.model))
    accelerator.load_state(str(tmp_path / "1"))
    assert quaff_fx.explain(resumed.model).steps == 1
    with pytest.raises(RuntimeError, match="Missing key"):
        accelerator.load_state(str(tmp_path / "3"))


def test_it_goes_through_torch_save_without_pickle(recorded: Recorded, tmp_path: Path) -> None:
    torch.save(recorded.states[1], tmp_path / "state.pt")
    assert_equal(torch.load(tmp_path / "state.pt", weights_only=True), recorded.states[1])


@pytest.mark.parametrize("step", [1, 4], ids=["observe", "quantize"])
def test_a_file_gives_back_what_was_written(recorded: Recorded, tmp_path: Path, step: int) -> None:
    model = compiled()
    quaff_fx.load_state_dict(model, recorded.states[step])
    assert quaff_fx.save_state(model, tmp_path) == tmp_path / FILE
    assert quaff_fx.save_state(model, tmp_path / "new" / "a.safetensors") == tmp_path / "new" / "a.safetensors"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.safetensors", "new", FILE]
    for path in (tmp_path, tmp_path / FILE, tmp_path / "new" / "a.safetensors"):
        again = compiled()
        quaff_fx.load_state(again, path)
        assert_equal(quaff_fx.state_dict(again), recorded.states[step])
    assert quaff_fx.explain(again).stage == ("observe" if step < 2 else "quantize")
    assert quaff_fx.explain(again).steps == min(step, 2)


def outlier_states(model: nn.Module) -> dict[str, OutlierState]:
    named = model.named_modules()
    return {name: module.outliers for name, module in named if isinstance(module, QuantizedWeight)}


def test_sites_that_shared_an_outlier_state_share_it_again(recorded: Recorded) -> None:
    model = compiled()
    quaff_fx.load_state_dict(model, recorded.states[STEPS])
    before, after = outlier_states(recorded.model), outlier_states(model)
    assert before.keys() == after.keys()
    assert len({id(outliers) for outliers in after.values()}) == len({id(o) for o in before.values()}) == 8
    for left, right in ((a, b) for a in before for b in before):
        assert (before[left] is before[right]) == (after[left] is after[right])
    assert_equal(*({n: t for n, t in m.state_dict().items() if "lora_" not in n} for m in (recorded.model, model)))


def test_a_converted_model_takes_back_its_smoothing_scales(recorded: Recorded) -> None:
    """Rolled back in the same process; its outlier states stay the objects that compiled graphs have seen."""
    state = as_momentum(recorded.states[STEPS])
    model = compiled(smoothing="momentum", share_activations=True)
    quaff_fx.load_state_dict(model, state)
    outliers = list(outlier_states(model).values())
    for each in outliers:
        each.smoothing_scale.add_(3.0)
        each.next_smoothing_scale.add_(5.0)
    quaff_fx.load_state_dict(model, state)
    assert all(a is b for a, b in zip(outliers, outlier_states(model).values(), strict=True))
    assert_equal(quaff_fx.state_dict(model), state)


@pytest.mark.parametrize("step", [1, STEPS], ids=["observe", "quantize"])
def test_saved_and_brought_back_in_inference_mode_it_can_be_trained(recorded: Recorded, step: int) -> None:
    config = {"smoothing": "momentum", "share_activations": True} if step == STEPS else {}
    model = compiled(**config)
    with torch.inference_mode():
        state = as_momentum(recorded.states[step]) if config else recorded.states[step]
        quaff_fx.load_state_dict(model, state)
        state = quaff_fx.state_dict(model)
    again = compiled(**config)
    quaff_fx.load_state_dict(again, state)
    for each in (model, again):
        assert_equal(quaff_fx.state_dict(each), state)
        assert not any(tensor.is_inference() for tensor in (*each.parameters(), *each.buffers()))
        stages_of(each).commit()
        for block in stages_of(each).blocks:  # the same numbers, without Inductor
            del block.__dict__[RUN]
        Training(each).step(0)


def test_weights_that_were_loaded_as_int8(recorded: Recorded, tmp_path: Path) -> None:
    """Their outlier columns come from the file, for the saved channels."""
    base().save_pretrained(tmp_path)
    float_model = quaff_fx.from_pretrained(LlamaForCausalLM, tmp_path, config=CONFIG)
    model, expected = compiled(float_model), compiled()
    for each in (model, expected):
        quaff_fx.load_state_dict(each, recorded.states[STEPS])
    assert_equal(model.state_dict(), expected.state_dict())
    assert_equal(quaff_fx.state_dict(model), recorded.states[STEPS])

    again = compiled(quaff_fx.from_pretrained(LlamaForCausalLM, tmp_path, config=CONFIG))
    observed = quaff_fx.state_dict(again)
    quaff_fx.load_state_dict(again, observed)
    assert_equal(quaff_fx.state_dict(again), observed)
    assert_refused(compiled(), observed, "loaded in the same way")  # it calibrated with float weights
    (tmp_path / "model.safetensors").unlink()
    assert_refused(again, recorded.states[STEPS], "cannot be read any more")


def test_the_activation_range_is_that_of_the_state(recorded: Recorded) -> None:
    """It was chosen for the processor that the run began on."""
    used = {entry["activation_max"] for entry in metadata_of(recorded.states[STEPS])["sites"].values()}
    other = 63 if used == {127} else 127
    state = edited(recorded.states[STEPS], lambda m: [e.update(activation_max=other) for e in m["sites"].values()])
    model = compiled()
    quaff_fx.load_state_dict(model, state)
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    assert {weight.activation_max for weight in weights} == {other}


def test_a_site_that_was_left_alone_at_conversion_is_left_alone_again(recorded: Recorded) -> None:
    state = edited(recorded.states[1], lambda m: m["sites"][LAYER].update(in_dim_seen=2))
    model = compiled()
    quaff_fx.load_state_dict(model, state)
    model._quaff.convert()
    expected = quaff_fx.explain(model)
    reasons = {row.weight: row.reason for row in expected.rows}
    assert "not only linears" in reasons[LAYER]
    again = compiled()
    quaff_fx.load_state_dict(again, quaff_fx.state_dict(model))
    assert quaff_fx.explain(again).rows == expected.rows
    assert_equal(again.state_dict(), model.state_dict())


# --- refused -------------------------------------------------------------------------------------------------------


def metadata_of(state: dict[str, Tensor]) -> dict[str, Any]:
    return json.loads(bytes(state[METADATA].tolist()))


def edited(state: dict[str, Tensor], edit: Callable[[dict[str, Any]], Any]) -> dict[str, Tensor]:
    """A copy of a state with its metadata edited, and the checksum that its content has then."""
    metadata = metadata_of(state)
    edit(metadata)
    tensors = {name: tensor for name, tensor in state.items() if name != METADATA}
    values = {name: value for name, value in metadata.items() if name not in ("format", "checksum")}
    with contextlib.suppress(TypeError, AttributeError):  # a field is missing or of another kind
        metadata["checksum"] = json.loads(SavedState(**values, tensors=tensors)._metadata())["checksum"]
    return state | {METADATA: torch.tensor(list(json.dumps(metadata).encode()), dtype=torch.uint8)}


def rechecked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the checksum of its tensors."""
    return edited(state, lambda _: None)


def as_momentum(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of the split form as one with smoothing scales, each of its own."""
    scales = {
        name: torch.arange(1, tensor.numel() + 1).float() + (0.5 if "next" in name else 0.0)
        for name, tensor in state.items()
        if "smoothing_scale" in name
    }
    return edited(state | scales, lambda m: m["config"].update(smoothing="momentum", share_activations=True))


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that loading a state would change."""
    modules = [(name, type(module), calls.is_compiled(module)) for name, module in model.named_modules()]
    state = {name: tensor.tolist() for name, tensor in quaff_fx.state_dict(model).items()}
    parameters = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return [modules, str(state), str(parameters), str(quaff_fx.explain(model))]


def assert_refused(model: nn.Module, state: Any, match: str) -> None:
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        quaff_fx.load_state_dict(model, state)
    assert ", expected " in str(caught.value)
    assert fingerprint(model) == before


class TestOtherModels:
    @pytest.mark.parametrize("step", [1, 4])
    @pytest.mark.parametrize(
        ("model", "match"),
        [
            ({"num_hidden_layers": 3}, r"layers\.2\.\S+: is not in the state"),
            (
                {"num_hidden_layers": 1},
                r"layers\.1\.\S+: is in the state but is no frozen weight of the model \(near: ",
            ),
            ({"hidden_size": 64}, r"q_proj\.weight: has shape \[64, 64\], expected \[48, 48\]"),
            ({"initializer_range": 0.2}, r"q_proj\.weight: has other values than in the saved run"),
        ],
    )
    def test_of_another_shape_or_checkpoint(self, recorded: Recorded, step: int, model: Any, match: str) -> None:
        assert_refused(compiled(float_llama(**({"initializer_range": 0.1} | model))), recorded.states[step], match)

    @pytest.mark.parametrize("step", [1, 4])
    def test_one_value_of_the_last_layer(self, recorded: Recorded, step: int) -> None:
        model = base()
        model.model.layers[1].mlp.down_proj.weight.data[3, 5] *= 1.5
        assert_refused(compiled(model), recorded.states[step], r"layers\.1\.mlp\.down_proj\.weight: has other values")

    def test_of_another_dtype(self, recorded: Recorded) -> None:
        assert_refused(compiled(base().bfloat16()), recorded.states[4], "has dtype bfloat16, expected float32")

    def test_of_another_architecture(self, recorded: Recorded) -> None:
        linears = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))).requires_grad_(False)
        model = quaff_fx.compile(linears, CONFIG)
        assert_refused(model, recorded.states[1], r"layers\.0\.\S+: is in the state but is no frozen weight")

    def test_a_layer_that_is_left_alone_here(self, recorded: Recorded) -> None:
        model = base()
        model.model.layers[0].self_attn.q_proj.weight.data = torch.zeros(0, 48)
        assert_refused(compiled(model), recorded.states[4], r"is left alone here \(weight has shape")

    def test_a_plain_model(self, recorded: Recorded) -> None:
        for call in (quaff_fx.state_dict, lambda model: quaff_fx.load_state_dict(model, recorded.states[1])):
            with pytest.raises(ConfigError, match="was not compiled by quaff_fx"):
                call(base())


class TestOtherConfigs:
    @pytest.mark.parametrize("step", [1, 4])
    @pytest.mark.parametrize(
        "config",
        [
            {"outlier_budget": 0.06},
            {"outlier_budget": {"*": 0.05}},
            {"outlier_rule": "mean_multiple"},
            {"smoothing": "momentum"},
            {"momentum": 0.2},
            {"activation_bits": 7},
            {"share_activations": False},
            {"exclude": ("lm_head", "k_proj")},
            {"scope": "model"},
        ],
        ids=str,
    )
    def test_what_changes_numbers(self, recorded: Recorded, config: dict[str, Any], step: int) -> None:
        (name,) = config
        assert_refused(
            compiled(**config), recorded.states[step], rf"config: {name} is .*, expected .* saved run had it"
        )

    def test_calibration_steps_matter_until_they_are_done(self, recorded: Recorded) -> None:
        assert_refused(compiled(calibration_steps=3), recorded.states[1], "config: calibration_steps is 3, expected 2")
        quaff_fx.load_state_dict(compiled(calibration_steps=3), recorded.states[4])

    def test_progress_does_not_matter(self, recorded: Recorded) -> None:
        model = compiled(progress=True)
        quaff_fx.load_state_dict(model, recorded.states[1])
        assert quaff_fx.explain(model).steps == 1


class TestConverted:
    def test_back_to_calibration(self, recorded: Recorded) -> None:
        assert_refused(recorded.model, recorded.states[1], "is int8 already, but the state was saved while")

    def test_to_other_channels(self, recorded: Recorded) -> None:
        state = dict(recorded.states[4])
        state["outliers.3.outlier_channels"] = state["outliers.3.outlier_channels"].roll(1)
        assert_refused(recorded.model, rechecked(state), "was converted with other outlier channels")

    def test_to_another_sharing(self, recorded: Recorded) -> None:
        state = dict(recorded.states[4])
        state |= {f"outliers.9.{name.rpartition('.')[2]}": state[name] for name in state if "outliers.0." in name}
        state = edited(state, lambda m: m["sites"][LAYER].update(outliers=9))
        assert_refused(recorded.model, state, "was converted with other outlier channels")


def drop_site(metadata: dict[str, Any]) -> None:
    for entries in (metadata["sites"], metadata["multiply_adds"]):
        entries.pop(LAYER)


class TestDamaged:
    """Each on a model that was just compiled: nothing of it may change."""

    @pytest.mark.parametrize("state", [None, [], {"metadata": 3}, {}, {METADATA: torch.zeros(3)}])
    def test_no_state(self, state: Any) -> None:
        assert_refused(compiled(), state, "state: (is a|has no metadata)")

    @pytest.mark.parametrize(
        ("edit", "match"),
        [
            (lambda m: m.update(format=1), "has format 1, expected 3"),
            (lambda m: m.update(stage="lower"), "has stage 'lower', expected observe or quantize"),
            (lambda m: m.pop("steps"), "expected format, checksum, stage, steps, config, sites, left_alone"),
            (lambda m: m.update(steps=True), "expected format, checksum, stage, steps"),
            (lambda m: m.update(sites=[]), "expected format, checksum, stage, steps"),
            (lambda m: m["sites"].update({LAYER: 3}), "q_proj.weight: is 3 in the state"),
            (lambda m: m["sites"][LAYER].pop("crc32"), "expected shape, dtype, crc32"),
            (lambda m: m["sites"][LAYER].update(shape=[48, "48"]), "expected two sizes"),
            (lambda m: m["sites"][LAYER].update(in_dim=2), "has in_dim 2 and activation_max"),
            (lambda m: m["sites"][LAYER].update(activation_max=255), "and activation_max 255 in the state"),
            (lambda m: m["sites"][LAYER].update(rotation=3), "q_proj.weight: has rotation 3 in the state"),
            (lambda m: m["sites"][LAYER].update(rotation=0), "q_proj.weight: has rotation 0 in the state"),
            (lambda m: m["sites"][LAYER].update(outliers=99), r"outliers\.99\.\w+: is missing in the state"),
            (lambda m: m["sites"][LAYER].update(crc32=1), "q_proj.weight: has other values than in the saved run"),
            (drop_site, "q_proj.weight: is not in the state"),
        ],
    )
    def test_metadata(self, recorded: Recorded, edit: Callable[[dict[str, Any]], Any], match: str) -> None:
        assert_refused(compiled(), edited(recorded.states[4], edit), match)

    def test_statistics_out_of_range(self, recorded: Recorded) -> None:
        state = edited(recorded.states[1], lambda m: m["sites"][LAYER].update(in_dim_seen=3))
        assert_refused(compiled(), state, r"q_proj\.weight: has in_dim_seen 3 and steps 1 in the state")

    def test_metadata_that_is_no_json(self, recorded: Recorded) -> None:
        state = recorded.states[4] | {METADATA: torch.tensor([1, 2, 255], dtype=torch.uint8)}
        assert_refused(compiled(), state, "its metadata is no JSON")

    @pytest.mark.parametrize(
        ("step", "name", "value", "match"),
        [
            (1, f"{LAYER}.hits", torch.full((48,), torch.nan), "values out of range"),
            (1, f"{LAYER}.absmax_sum", torch.full((48,), torch.inf), "values out of range"),
            (1, f"{LAYER}.absmax_sum", torch.full((48,), -1.0), "values out of range"),
            (1, f"{LAYER}.hits", torch.zeros(47), r"is torch.float32 of shape \(47,\) in the state, expected"),
            (1, f"{LAYER}.hits", torch.zeros(48).double(), "is torch.float64 of shape"),
            (1, f"{LAYER}.more", torch.zeros(48), "is in the state but belongs to no site"),
            (4, "outliers.0.outlier_channels", torch.tensor([3, 48]), "values out of range"),
            (4, "outliers.0.outlier_channels", torch.tensor([3, 3]), "values out of range"),
            (4, "outliers.0.outlier_channels", torch.tensor([3.0, 4.0]), "is torch.float32 of shape"),
            (4, "outliers.0.outlier_w_absmax", torch.tensor([1.0, torch.nan]), "values out of range"),
            (4, "outliers.0.smoothing_scale", torch.tensor([torch.inf, torch.nan]), "values out of range"),
            (4, "outliers.0.next_smoothing_scale", torch.tensor([torch.inf, 2.0]), "values out of range"),
            (4, "outliers.0.next_smoothing_scale", torch.tensor([torch.inf]), r"of shape \(1,\) in the state"),
        ],
    )
    def test_tensors(self, recorded: Recorded, step: int, name: str, value: Tensor, match: str) -> None:
        assert_refused(compiled(), recorded.states[step] | {name: value}, rf"{re.escape(name)}: .*{match}")

    def test_a_tensor_is_missing(self, recorded: Recorded) -> None:
        state = {name: tensor for name, tensor in recorded.states[1].items() if name != f"{LAYER}.hits"}
        assert_refused(compiled(), state, r"q_proj\.weight\.hits: is missing in the state")

    def test_files(self, recorded: Recorded, tmp_path: Path) -> None:
        model = compiled()
        quaff_fx.load_state_dict(model, recorded.states[1])
        content = quaff_fx.save_state(model, tmp_path).read_bytes()
        before = fingerprint(model)
        truncated, empty, pickled, other = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c", "d"))
        truncated.write_bytes(content[:-100])
        empty.touch()
        torch.save(recorded.states[1], pickled)
        save_file({"weight": torch.zeros(3)}, other)
        for path, match in (
            (tmp_path / "nothing", r"nothing/quaff_state\.safetensors: does not exist, expected the state"),
            (truncated, "cannot be read as safetensors"),
            (empty, "cannot be read as safetensors"),
            (pickled, "cannot be read as safetensors"),
            (other, "has no metadata of quaff_fx"),
        ):
            with pytest.raises(CheckpointError, match=match):
                quaff_fx.load_state(model, path)
            assert fingerprint(model) == before


def test_a_failed_write_leaves_the_file_of_before(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled()
    before = quaff_fx.save_state(model, tmp_path).read_bytes()
    quaff_fx.load_state_dict(model, recorded.states[1])

    def disk_is_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*No space left"):
        quaff_fx.save_state(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.skipif(
    torch.__version__.startswith("2.11"), reason="torch 2.11's fully_shard wants a gradient of an int8 parameter"
)
def test_sharded_weights_have_the_same_state(recorded: Recorded, tmp_path: Path) -> None:
    model = compiled()
    quaff_fx.load_state_dict(model, recorded.states[STEPS])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for block in model.base_model.model.model.layers:
            fully_shard(block)
        assert_equal(quaff_fx.state_dict(model), recorded.states[STEPS])
        quaff_fx.load_state_dict(model, recorded.states[STEPS])
        observed = compiled()
        for block in observed.base_model.model.model.layers:
            fully_shard(block)
        with pytest.raises(CalibrationError, match="is sharded while it is observed"):
            quaff_fx.load_state_dict(observed, recorded.states[STEPS])
    finally:
        torch.distributed.destroy_process_group()


def test_processes_that_calibrate_cannot_save(monkeypatch: pytest.MonkeyPatch, recorded: Recorded) -> None:
    model = compiled()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(CheckpointError, match="still observed, by 2 processes"):
        quaff_fx.state_dict(model)
    assert_equal(quaff_fx.state_dict(recorded.model), recorded.states[STEPS])
