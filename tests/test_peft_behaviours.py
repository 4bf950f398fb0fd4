"""What PEFT does with an adapter besides training it, for every method of PEFT, on an int8 base and on its float twin.

Rewritten graphs run as they are, without Inductor: these tests ask what is computed and not what it is lowered to.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from torch import Tensor, nn

import quaff_fx
from tests.blocks import UNTRACED
from tests.peft_methods import (
    EIGHT_BITS,
    IDS,
    LORA_KINDS,
    METHODS,
    OF_PEFT,
    OTHER_LORA_OPTIONS,
    PEFT_METHODS,
    TRAINABLE,
    UNTRAINABLE,
    add,
    batch,
    int8_base,
    llama,
    outputs,
    rounded_base,
    train,
    two_blocks,
)

pytestmark = [pytest.mark.compile, pytest.mark.slow, UNTRACED, *OF_PEFT]

ROUNDING = 0.02  # of the logits, as a share of their norm: what int8 rounds in these models is a tenth to a half of it
ONE_ROUNDING = 0.003  # one activation that is rounded the other way, as a graph of another shape may: 0.003 of a logit

# These cannot be added to int8 weights, by PEFT's own check: add them before quaff_fx.compile.
NEED_FLOAT_LINEARS = {"GLORA": "is not a plain torch.nn.Linear"}
# These make their adapter from the base weights, so that one file gives another model on other (rounded) weights.
MADE_FROM_THE_BASE = {"FROD", "OSF", "PSOFT", "SUPERTUNING"}
# A batch with rows for several adapters: PEFT has it for these.
MIXES_ADAPTERS = {"GLORA", "LORA", "ROAD"}
# These kinds of LoRA take something out of the base weights.
CHANGE_THE_BASE = {"KaSA", "OLoRA", "PiSSA"}
# Loaded frozen, these stay so when they are made the active one: PEFT does not train prompts on.
STAYS_FROZEN = {"CARTRIDGE", "CPT"}


@pytest.fixture(scope="module", autouse=True)
def without_inductor():
    torch._dynamo.pgo.reset_code_state()
    inductor = importlib.import_module("torch._inductor.compile_fx")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(inductor, "compile_fx", lambda graph_module, *_, **__: graph_module.forward)
        # A conversion collects garbage twice, which takes a second with all packages loaded; a hundred models convert.
        monkeypatch.setattr(gc, "collect", lambda *_: 0)
        yield


@contextmanager
def own_graphs() -> Iterator[None]:
    """Drops what was traced for a pair after its tests."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs_of_one_test():
    with own_graphs():
        yield


@pytest.fixture
def run_eagerly():
    with eagerly():
        yield


def eagerly() -> AbstractContextManager[Any]:
    """Runs int8 models uncompiled, in the numbers of the compiled ones: copies would all be traced anew."""
    return torch.compiler.set_stance("force_eager")


def test_every_method_of_peft_is_here():
    assert METHODS.keys() == PEFT_METHODS
    assert UNTRAINABLE.keys() <= METHODS.keys()


def test_every_option_of_lora_is_here():
    of_all = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    chosen = {option for options in LORA_KINDS.values() for option in options}
    assert chosen | OTHER_LORA_OPTIONS.keys() == {field.name for field in dataclasses.fields(peft.LoraConfig)} - of_all


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_what_cannot_be_trained_here_cannot_be_trained_in_float(name):
    with pytest.raises(ImportError, match="scikit-learn is required"):
        train(add(METHODS[name].base(), name), name)


def attempt(action: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    try:
        return action(model)
    except Exception as error:
        return error


def same_outcome(action: Callable[[nn.Module], Any], model: nn.Module, twin: nn.Module) -> tuple[Any, Any] | None:
    """What the action gives on the model and on its float twin; None if PEFT refuses it for both alike."""
    expected, got = attempt(action, twin), attempt(action, model)
    if isinstance(expected, Exception):
        assert type(got) is type(expected), f"float: {expected!r}, int8: {got!r}"
        assert first_line(got) == first_line(expected)
        return None
    if isinstance(got, Exception):
        raise got
    return got, expected


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def distance(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


def assert_gradients_follow(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    if not expected:  # a merge took them away
        return
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        # a share of it, or what int8 rounds in all: a router of a few numbers has next to no gradient of its own
        assert (got[name] - gradient).norm() <= 0.2 * gradient.norm() + 2e-3 * whole, name
        assert gradient.norm() == 0 or got[name].norm() > 0, name


def int8_rows(model: nn.Module) -> list[str]:
    return [row.name for row in quaff_fx.explain(model).rows if row.stage == "int8"]


@pytest.fixture(scope="module")
def saved_adapter(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of an adapter that somebody trained on the float model, per method."""
    folders: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            add(METHODS[name].base(), name, seed=2).save_pretrained(folders[name])
        return folders[name]

    return save


@dataclass
class Pair:
    """A model on an int8 base and its float twin, after the same two training steps.

    Attributes:
        added: the adapter, before the base was made int8 or after. second: there is an adapter "frozen" too, as
            PEFT loads it by default. gradients, twin_gradients: of the steps.
    """

    name: str
    added: str
    model: nn.Module
    twin: nn.Module
    second: bool
    gradients: list[dict[str, Tensor]]
    twin_gradients: list[dict[str, Tensor]]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return batch(self.name)

    def copies(self) -> tuple[nn.Module, nn.Module]:
        for each in (self.model, self.twin):
            outputs(each, self.inputs)  # X-LoRA keeps what it computed last, which has no copy if it had gradients
        return copy.deepcopy(self.model), copy.deepcopy(self.twin)

    def same_outcome(self, action: Callable[[nn.Module], Any]) -> tuple[Any, Any] | None:
        return same_outcome(action, self.model, self.twin)


def load_frozen(model: nn.Module, folder: Path) -> Any:
    """Loads the adapter as PEFT does by default: it is not trainable, and the first one stays active."""
    return model.load_adapter(str(folder), "frozen")


def make_pair(name: str, added: str, folder: Path) -> Pair:
    if added == "before":
        model, twin = (add(METHODS[name].base(), name) for _ in range(2))
    else:
        model, twin = add(int8_base(name), name), add(rounded_base(name), name)
    second = same_outcome(lambda each: load_frozen(each, folder), model, twin) is not None
    if added == "before":
        if not second:  # what the refusal left behind
            model, twin = (add(METHODS[name].base(), name) for _ in range(2))
        quaff_fx.calibrate(quaff_fx.compile(model, EIGHT_BITS), [batch(name)])
    gradients, twin_gradients = (train(each, name, steps=2) for each in (model, twin))
    return Pair(name, added, model, twin, second, gradients, twin_gradients)


CASES = [
    (name, added)
    for name in TRAINABLE
    for added in ("before", "after")
    if added == "before" or name not in NEED_FLOAT_LINEARS
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def pair(request, saved_adapter) -> Iterator[Pair]:
    """The tests of one pair run one after the other and each leaves it as it was."""
    name, added = request.param
    with own_graphs():
        yield make_pair(name, added, saved_adapter(name))


class TestInt8Base:
    def test_gradients_follow_float(self, pair):
        for got, expected in zip(pair.gradients, pair.twin_gradients, strict=True):
            assert expected
            assert_gradients_follow(got, expected)
        assert len(int8_rows(pair.model)) > 0

    def test_no_parameter_of_an_adapter_is_int8(self, pair):
        """Of the frozen one neither: PEFT could not save it or train it on."""
        of_base = {in_base(name) for name, _ in METHODS[pair.name].base().named_parameters()}
        got, expected = (
            {
                name: parameter
                for name, parameter in each.named_parameters()
                if in_base(name) not in of_base and "quaff_weight" not in name
            }
            for each in (pair.model, pair.twin)
        )
        assert expected
        assert got.keys() == expected.keys()
        assert {n: p.requires_grad for n, p in got.items()} == {n: p.requires_grad for n, p in expected.items()}
        linears = {name for name, module in METHODS[pair.name].base().named_modules() if isinstance(module, nn.Linear)}
        assert {in_base(name) for name in int8_rows(pair.model)} <= {in_base(name) for name in linears}

    def test_files_are_those_of_float(self, pair, tmp_path):
        for adapter in ("default", "frozen") if pair.second else ("default",):
            got, expected = (
                peft.get_peft_model_state_dict(each, adapter_name=adapter) for each in (pair.model, pair.twin)
            )
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                assert (got[key].shape, got[key].dtype) == (value.shape, value.dtype), key
                if adapter == "frozen":
                    torch.testing.assert_close(got[key], value)
        for each, folder in ((pair.model, "int8"), (pair.twin, "float")):
            each.save_pretrained(tmp_path / folder)
        names = {
            folder: {path.relative_to(tmp_path / folder) for path in (tmp_path / folder).rglob("*")}
            for folder in ("int8", "float")
        }
        assert names["int8"] == names["float"]
        for file in names["float"]:
            if file.suffix == ".safetensors":
                got, expected = (
                    {
                        key: (value.shape, value.dtype)
                        for key, value in load_file(tmp_path / folder / file).items()
                        if pair.name != "XLORA" or file.parts[0] == file.name or ".lora_A." in key or ".lora_B." in key
                    }  # beside its own file X-LoRA writes one per LoRA, with the whole base model in each
                    for folder in ("int8", "float")
                )
                assert got == expected

    def test_saved_it_loads_on_float(self, pair, tmp_path):
        make = METHODS[pair.name].base
        for each, folder in ((pair.model, "int8"), (pair.twin, "float")):
            each.save_pretrained(tmp_path / folder)
        got, expected = (
            attempt(lambda base, f=folder: outputs(load(base, tmp_path / f, pair.name), pair.inputs), make())
            for folder in ("int8", "float")
        )
        if isinstance(expected, Exception):
            assert (type(got), first_line(got)) == (type(expected), first_line(expected))
            return
        assert distance(got, expected) < ROUNDING
        if pair.added == "before" or pair.name not in MADE_FROM_THE_BASE:
            assert distance(got, outputs(pair.model, pair.inputs)) < ROUNDING

    def test_saved_it_loads_on_int8(self, pair, tmp_path):
        if pair.added == "before":
            pytest.skip("its file is loaded on the float model above; this base was calibrated without an adapter")
        pair.model.save_pretrained(tmp_path)
        base, float_base = int8_base(pair.name), rounded_base(pair.name)
        with eagerly():
            both = same_outcome(lambda each: outputs(load(each, tmp_path, pair.name), pair.inputs), base, float_base)
        if both is None:
            return
        got, expected = both
        assert distance(got, expected) < ROUNDING
        assert distance(got, outputs(pair.model, pair.inputs)) < ONE_ROUNDING

    def test_switching_to_a_frozen_one_and_back(self, pair):
        if not pair.second:
            pytest.skip("PEFT has one adapter at a time of this method")
        before = outputs(pair.model, pair.inputs)

        def switched(model: nn.Module) -> Tensor:
            model.set_adapter("frozen")
            try:
                return outputs(model, pair.inputs)
            finally:
                model.set_adapter("default")

        got, expected = pair.same_outcome(switched)
        assert distance(got, expected) < ROUNDING
        assert distance(before, expected) > ROUNDING
        torch.testing.assert_close(outputs(pair.model, pair.inputs), before, rtol=0, atol=0)

    def test_the_frozen_one_can_be_trained_on(self, pair):
        if not pair.second:
            pytest.skip("PEFT has one adapter at a time of this method")

        def trained_on(model: nn.Module) -> dict[str, Tensor]:
            model.set_adapter("frozen")
            try:
                return train(model, pair.name, rate=0.0)[0]
            finally:
                model.set_adapter("default")

        with eagerly() if pair.added == "after" else nullcontext():
            both = pair.same_outcome(trained_on)
        assert (both is None) == (pair.name in STAYS_FROZEN)
        if both is not None:
            assert_gradients_follow(*both)

    def test_disabled_it_is_the_base(self, pair):
        inputs = pair.inputs

        def disabled(model: nn.Module) -> Tensor:
            with model.disable_adapter():
                return outputs(model, inputs)

        before = outputs(pair.model, inputs)
        both = pair.same_outcome(disabled)
        if both is not None:
            got, expected = both
            assert distance(got, expected) < ROUNDING
            if pair.added == "after" and not METHODS[pair.name].inputs:
                assert distance(got, outputs(int8_base(pair.name), inputs)) < ONE_ROUNDING
        torch.testing.assert_close(outputs(pair.model, inputs), before, rtol=0, atol=0)

    def test_a_batch_of_several_adapters(self, pair):
        """Right after a plain call, and the next plain call is a plain one again."""
        mixed = pair.inputs | {"adapter_names": ["default", "frozen", "__base__", "default"]}
        before = outputs(pair.model, pair.inputs)
        if pair.name not in MIXES_ADAPTERS:  # copies: PEFT leaves its hooks behind where it fails
            with eagerly():
                same_outcome(lambda model: outputs(model, mixed), *pair.copies())
            return
        got, expected = pair.same_outcome(lambda model: outputs(model, mixed))
        assert distance(got, expected) < ROUNDING
        assert distance(got[1:3], before[1:3]) > ROUNDING
        torch.testing.assert_close(outputs(pair.model, pair.inputs), before, rtol=0, atol=0)

    @pytest.mark.parametrize("unload", [False, True])
    @pytest.mark.usefixtures("run_eagerly")
    def test_merging_is_refused_before_anything_changes(self, pair, unload):
        def merge(model: nn.Module) -> nn.Module:
            if unload:
                return model.merge_and_unload()
            model.merge_adapter()
            return model

        model, twin = pair.copies()
        in_float = attempt(merge, twin)
        if isinstance(in_float, Exception):
            with pytest.raises((type(in_float), quaff_fx.QuaffError)):
                merge(model)
        elif adapts_int8(pair.model):
            modules = [name for name, _ in model.named_modules()]
            before = outputs(model, pair.inputs)
            with pytest.raises(quaff_fx.QuaffError, match="dequantize"):
                merge(model)
            assert [name for name, _ in model.named_modules()] == modules
            torch.testing.assert_close(outputs(model, pair.inputs), before, rtol=0, atol=0)
        else:
            merged = attempt(merge, model)  # all that it adapts is in float: merged right, or refused
            if isinstance(merged, quaff_fx.QuaffError):
                merged = model
            assert distance(outputs(merged, pair.inputs), outputs(pair.model, pair.inputs)) < 1e-3

    @pytest.mark.parametrize("unload", [False, True])
    def test_merging_after_dequantize(self, pair, unload):
        def merge(model: nn.Module) -> Tensor:
            merged = model.merge_and_unload() if unload else model.merge_adapter()
            return outputs(merged if unload else model, pair.inputs)

        model, twin = pair.copies()
        quaff_fx.dequantize(model)
        before = outputs(model, pair.inputs)
        assert distance(before, outputs(pair.model, pair.inputs)) < ROUNDING
        twin_before = outputs(twin, pair.inputs)
        both = same_outcome(merge, model, twin)
        if both is None:
            return
        got, expected = both
        if distance(expected, twin_before) < 1e-4:
            torch.testing.assert_close(got, before, rtol=1e-4, atol=1e-4)
        assert distance(got, expected) < ROUNDING

    @pytest.mark.usefixtures("run_eagerly")
    def test_unloaded_it_is_the_int8_base_and_takes_an_adapter_again(self, pair):
        model, twin = pair.copies()
        int8 = len(int8_rows(model))
        both = same_outcome(lambda each: each.unload(), model, twin)
        if both is None:
            return
        base, float_base = both
        plain = {"input_ids": IDS}
        assert [n for n, _ in float_base.named_modules()] == [n for n, _ in base.named_modules() if "quaff" not in n]
        assert distance(outputs(base, plain), outputs(float_base, plain)) < ROUNDING
        assert len(int8_rows(base)) == int8
        again = copy.deepcopy(base)
        if pair.name in NEED_FLOAT_LINEARS:
            with pytest.raises(ValueError, match=NEED_FLOAT_LINEARS[pair.name]):
                add(again, pair.name)
        elif pair.name not in MADE_FROM_THE_BASE:
            gradients = [train(add(each, pair.name, seed=3), pair.name)[0] for each in (again, float_base)]
            assert_gradients_follow(*gradients)
            float_base = twin.unload() if hasattr(twin, "unload") else float_base
        expected = outputs(base, plain)
        plain_model = quaff_fx.dequantize(base)
        for module in plain_model.modules():
            if isinstance(module, nn.Linear):
                assert type(module) is nn.Linear
                assert type(module.weight) is nn.Parameter
        assert distance(outputs(plain_model, plain), expected) < ROUNDING


class TestWhileCalibrating:
    """Before the conversion all is as on the float model, to the bit."""

    @pytest.fixture(scope="class", params=TRAINABLE)
    @classmethod
    def pair(cls, request, saved_adapter) -> Iterator[Pair]:
        name = request.param
        model, twin = (add(METHODS[name].base(), name) for _ in range(2))
        quaff_fx.compile(model, EIGHT_BITS | {"calibration_steps": 2})
        second = same_outcome(lambda each: load_frozen(each, saved_adapter(name)), model, twin) is not None
        gradients, twin_gradients = (train(each, name) for each in (model, twin))
        with own_graphs():
            yield Pair(name, "before", model, twin, second, gradients, twin_gradients)

    def test_steps_are_those_of_float(self, pair):
        assert quaff_fx.explain(pair.model).steps == 1
        torch.testing.assert_close(pair.gradients, pair.twin_gradients, rtol=0, atol=0)

    def test_files_are_those_of_float(self, pair, tmp_path):
        contents = []
        for each, folder in ((pair.model, tmp_path / "observed"), (pair.twin, tmp_path / "float")):
            each.save_pretrained(folder)
            paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"]
            contents.append({path.relative_to(folder): path.read_bytes() for path in paths})
        assert contents[0] == contents[1]

    def test_switched_and_disabled(self, pair):
        def switched(model: nn.Module) -> Tensor:
            model.set_adapter("frozen")
            try:
                return outputs(model, pair.inputs)
            finally:
                model.set_adapter("default")

        def disabled(model: nn.Module) -> Tensor:
            with model.disable_adapter():
                return outputs(model, pair.inputs)

        for action in (switched, disabled, lambda model: outputs(model, pair.inputs)):
            assert_same(pair.same_outcome(action))

    def test_a_batch_of_several_adapters(self, pair):
        mixed = pair.inputs | {"adapter_names": ["default", "frozen", "__base__", "default"]}
        model, twin = pair.copies()
        both = same_outcome(lambda each: outputs(each, mixed), model, twin)
        assert_same(both)
        if pair.name in MIXES_ADAPTERS:
            assert both is not None
            assert_same(same_outcome(lambda each: outputs(each, pair.inputs), model, twin))

    @pytest.mark.parametrize("method", ["unload", "merge_and_unload"])
    def test_unloaded(self, pair, method):
        model, twin = pair.copies()
        both = same_outcome(lambda each: getattr(each, method)(), model, twin)
        if both is not None:
            assert_same(same_outcome(lambda each: outputs(each, {"input_ids": IDS}), *both))

    @pytest.mark.usefixtures("run_eagerly")
    def test_merged_unmerged_and_then_converted(self, pair):
        """The last one: it leaves the pair int8."""
        if pair.same_outcome(lambda model: model.merge_adapter()) is not None:
            assert_same(pair.same_outcome(lambda model: outputs(model, pair.inputs)))
            assert_same(pair.same_outcome(lambda model: model.unmerge_adapter() or outputs(model, pair.inputs)))
        train(pair.model, pair.name), train(pair.twin, pair.name)
        got, expected = train(pair.model, pair.name), train(pair.twin, pair.name)
        assert quaff_fx.explain(pair.model).stage == "quantize"
        assert_gradients_follow(got[0], expected[0])
        calibrated = quaff_fx.compile(add(METHODS[pair.name].base(), pair.name), EIGHT_BITS)
        quaff_fx.calibrate(calibrated, [pair.inputs])
        assert int8_rows(pair.model) == int8_rows(calibrated)


def assert_same(both: tuple[Tensor, Tensor] | None) -> None:
    if both is not None:
        torch.testing.assert_close(*both, rtol=0, atol=0)


def follow(model: nn.Module, twin: nn.Module, **how: Any) -> None:
    assert_gradients_follow(*(train(each, "LORA", **how)[0] for each in (model, twin)))


def refused(action: Callable[[], nn.Module], base: nn.Module) -> nn.Module | None:
    """The model; None if the int8 base refused, with a way out and unchanged."""
    modules, before = [name for name, _ in base.named_modules()], outputs(base, {"input_ids": IDS})
    model = attempt(lambda _: action(), base)
    if isinstance(model, quaff_fx.QuaffError):
        assert re.search("before quaff_fx.compile|dequantize", str(model))
        assert [name for name, _ in base.named_modules()] == modules
        torch.testing.assert_close(outputs(base, {"input_ids": IDS}), before, rtol=0, atol=0)
        return None
    if isinstance(model, Exception):
        raise model
    return model


@pytest.mark.parametrize("kind", LORA_KINDS)
@pytest.mark.usefixtures("graphs_of_one_test")
class TestKindsOfLora:
    def test_added_before(self, kind):
        model, twin = (add(two_blocks(), "LORA", **LORA_KINDS[kind]) for _ in range(2))
        quaff_fx.calibrate(quaff_fx.compile(model, EIGHT_BITS), [{"input_ids": IDS}])
        follow(model, twin)
        got, expected = (peft.get_peft_model_state_dict(each) for each in (model, twin))
        assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
        assert distance(outputs(model, batch("LORA")), outputs(twin, batch("LORA"))) < ROUNDING

    @pytest.mark.usefixtures("run_eagerly")
    def test_added_to_int8(self, kind):
        base = int8_base("LORA")
        if kind == "target_parameters":  # PEFT looks for a parameter of that name, and an int8 module has none
            with pytest.raises(NoMatchingPeftModuleError, match="target_parameters"):
                add(base, "LORA", **LORA_KINDS[kind])
            return
        model = refused(lambda: add(base, "LORA", **LORA_KINDS[kind]), base)
        assert (model is None) == (kind in CHANGE_THE_BASE)
        if model is None:
            return
        twin = add(rounded_base("LORA"), "LORA", **LORA_KINDS[kind])
        follow(model, twin)
        got, expected = (peft.get_peft_model_state_dict(each) for each in (model, twin))
        assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
        assert distance(outputs(model, batch("LORA")), outputs(twin, batch("LORA"))) < ROUNDING


@pytest.mark.parametrize("added", ["before", "after"])
class TestFrozenParts:
    def test_frozen_factor(self, added):
        """LoRA-FA trains B alone."""

        def factor_frozen(model: nn.Module) -> nn.Module:
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(False)
            return model

        if added == "before":
            model, twin = (factor_frozen(add(two_blocks(), "LORA")) for _ in range(2))
            quaff_fx.calibrate(quaff_fx.compile(model, EIGHT_BITS), [{"input_ids": IDS}])
        else:
            model, twin = (factor_frozen(add(make("LORA"), "LORA")) for make in (int8_base, rounded_base))
        follow(model, twin)
        assert not any("lora" in name for name in int8_rows(model))
        got, expected = (peft.get_peft_model_state_dict(each) for each in (model, twin))
        assert got.keys() == expected.keys()
        assert all(value.is_floating_point() for value in got.values())

    def test_blocks_that_share_their_weights(self, added):
        """PEFT's layer_replication: more blocks than weights, each block with an adapter of its own."""

        def replicated(base: nn.Module) -> nn.Module:
            torch.manual_seed(0)
            options = {"layer_replication": [[0, 2], [0, 2]], "target_modules": ["q_proj", "down_proj"]}
            return peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, **options))

        def step(model: nn.Module) -> dict[str, Tensor]:
            model.train()
            model(input_ids=IDS, labels=IDS).loss.backward()
            return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        if added == "before":
            model, twin = (replicated(llama()) for _ in range(2))
            quaff_fx.calibrate(quaff_fx.compile(model, EIGHT_BITS), [{"input_ids": IDS}])
        else:
            base = int8_base("PROMPT_TUNING")
            model, twin = refused(lambda: replicated(base), base), replicated(rounded_base("PROMPT_TUNING"))
        if model is not None:
            assert_gradients_follow(step(model), step(twin))
            assert len(int8_rows(model)) == 14
            assert len(list(model.get_decoder().layers)) == 4


@pytest.mark.parametrize("by", ["steps", "calibrate"])
def test_activated_lora(by):
    """Its adapter acts on the tokens from the invocation on: PEFT tells its layers by hooks where that is."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
        return peft.get_peft_model(llama(), peft.LoraConfig(r=4, alora_invocation_tokens=[5, 6], **options)).train()

    ids = IDS.clone()
    for row, start in enumerate((2, 4, 6, 8)):
        ids[row, start : start + 2] = torch.tensor([5, 6])

    def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    model, twin = quaff_fx.compile(build(), EIGHT_BITS), build()
    if by == "steps":
        torch.testing.assert_close(step(model, ids), step(twin, ids), rtol=0, atol=0)
    else:
        quaff_fx.calibrate(model, [{"input_ids": ids}])
    for each in (ids, ids.roll(1, 0), ids):
        assert_gradients_follow(step(model, each), step(twin, each))
    assert len(int8_rows(model)) == 14
    got, expected = (outputs(each, {"input_ids": ids}) for each in (model, twin))
    assert distance(got, expected) < ROUNDING


@pytest.mark.parametrize("modules", [["head"], ["mix"], ["down"]])
def test_modules_to_save_added_to_int8(modules):
    """A trainable float copy of the int8 layer, with its values; or a refusal that says what to do."""
    options = {"target_modules": ["up"], "modules_to_save": modules}
    base = int8_base("LORA")
    model = refused(lambda: add(base, "LORA", **options), base)
    if model is None:
        assert modules != ["head"]
        return
    twin = add(rounded_base("LORA"), "LORA", **options)
    follow(model, twin, steps=1)
    got, expected = (peft.get_peft_model_state_dict(each) for each in (model, twin))
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    with model.disable_adapter():
        torch.testing.assert_close(
            outputs(model, {"input_ids": IDS}), outputs(int8_base("LORA"), {"input_ids": IDS}), rtol=1e-5, atol=1e-5
        )


def load(base: nn.Module, folder: Path, name: str) -> nn.Module:
    model = peft.PeftModel.from_pretrained(base, str(folder))
    assert model.peft_config["default"].peft_type == name
    return model


WRAPPERS = ("base_model", "lora_model", "model", "base_layer")


def in_base(name: str) -> str:
    """The name of a module without what PEFT puts around it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def adapts_int8(model: nn.Module) -> bool:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return any("weight" not in dict(layer.get_base_layer().named_parameters()) for layer in layers)
