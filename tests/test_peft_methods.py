"""Every way of training a small part of a model that people use: the methods of PEFT, and adapters without PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

import quaff_fx
from quaff_fx import backend
from quaff_fx.api import stages_of
from quaff_fx.weights import owners
from tests.models import Run, cosine, float_llama, int8_products, tiny_llama, token_ids, with_lora
from tests.peft_methods import OF_PEFT

pytestmark = [pytest.mark.compile, pytest.mark.slow, *OF_PEFT]

EIGHT_BITS = {"progress": False, "calibration_steps": 1, "activation_bits": 8}


class Bottleneck(nn.Module):
    """A hand-written adapter behind a frozen module."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(size, 4)
        self.up = nn.Linear(4, size)

    def forward(self, x):
        y = self.inner(x)
        return y + self.up(torch.nn.functional.gelu(self.down(y)))


def embedded(model: nn.Module) -> nn.Module:
    """The input of the first block needs a gradient, as under Trainer's checkpointing: one graph serves all blocks."""
    model.enable_input_require_grads()
    return model


def lora(**config) -> nn.Module:
    return with_lora(embedded(float_llama()), **config).train()


def dora() -> nn.Module:
    model = lora(use_dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # as if it had been trained: at its start, DoRA's norm of the weight cancels
            parameter.data *= 1.0 + 0.1 * torch.rand_like(parameter)
    return model


def whole_modules() -> nn.Module:
    return lora(target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens", "o_proj", "lm_head"])


def ia3() -> nn.Module:
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    torch.manual_seed(0)
    model = get_peft_model(embedded(float_llama()), config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def prompt_learning(config_class: type, **config) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(float_llama(), config_class(task_type="CAUSAL_LM", num_virtual_tokens=4, **config)).train()


def biases_only() -> nn.Module:
    model = float_llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return embedded(model).train()


def hand_written() -> nn.Module:
    model = embedded(float_llama().requires_grad_(False))
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Bottleneck(layer.mlp, 48)
    return model.train()


METHODS: dict[str, Callable[[], nn.Module]] = {
    "LoRA with dropout": lambda: lora(lora_dropout=0.2),
    "rsLoRA": lambda: lora(use_rslora=True, lora_alpha=4),
    "LoRA and modules_to_save": whole_modules,
    "DoRA": dora,
    "IA3": ia3,
    "prompt tuning": lambda: prompt_learning(PromptTuningConfig),
    "P-tuning": lambda: prompt_learning(PromptEncoderConfig, encoder_hidden_size=16),
    "prefix tuning": lambda: prompt_learning(PrefixTuningConfig),
    "biases only": biases_only,
    "hand-written": hand_written,
}
MERGEABLE = ("rsLoRA", "LoRA and modules_to_save", "DoRA", "IA3")


@pytest.fixture(scope="module", autouse=True)
def shapes_are_static_at_first() -> None:
    """Dynamo remembers per code object which sizes varied, across models: another file's sizes would change these."""
    torch._dynamo.pgo.reset_code_state()


@dataclass
class Trained:
    """One method's first quantized step beside the float step, at the same parameters and with the same dropout."""

    run: Run
    reference: Run
    model: nn.Module


def step(run: Run) -> float:
    torch.manual_seed(0)
    return run.step(token_ids())


@pytest.fixture(scope="module")
def trained() -> Callable[[str], Trained]:
    done: dict[str, Trained] = {}

    def train(name: str) -> Trained:
        if name not in done:
            reference = Run(METHODS[name]())
            step(reference)
            run = Run(quaff_fx.compile(METHODS[name](), EIGHT_BITS))
            # Inductor's own random numbers would draw another dropout mask than eager code.
            with torch._inductor.config.patch(fallback_random=True):
                step(run)
                step(run)
            done[name] = Trained(run, reference, run.model)
        return done[name]

    return train


def assert_follows(run: Run, reference: Run, least: float = 0.98) -> None:
    """The last gradients of `run` are there where float's last are, and point the same way."""
    got, expected = run.gradients[-1], reference.gradients[-1]
    assert cosine(got, expected) > least
    for name, gradient in expected.items():
        if gradient.abs().max() > 0:
            assert got[name].abs().max() > 0, f"{name}: gradient is zero where float's is not"
            assert torch.isfinite(got[name]).all(), name


@pytest.mark.parametrize("name", METHODS)
class TestFirstQuantizedStep:
    @pytest.mark.compatibility("Adapters")
    def test_gradients_follow_float(self, trained, name, record_property):
        this = trained(name)
        record_property("int8 share", f"{quaff_fx.explain(this.model).int8_share:.0%}")
        assert_follows(this.run, this.reference)
        assert this.run.losses[1] == pytest.approx(this.reference.losses[0], rel=5e-3)
        assert this.run.losses[1] != this.run.losses[0]

    def test_gradients_follow_float_at_seven_bits_too(self, trained, name):
        """Run eagerly: the numbers of the compiled step, without the time that Inductor takes."""
        run = Run(quaff_fx.compile(METHODS[name](), EIGHT_BITS | {"activation_bits": 7}))
        step(run)
        stages = stages_of(run.model)
        stages.convert()
        for block in stages.blocks:
            del block.__dict__[owners.RUN]
        step(run)
        assert_follows(run, trained(name).reference, least=0.95)

    def test_calibration_step_is_the_float_step(self, trained, name):
        this = trained(name)
        assert this.run.losses[0] == pytest.approx(this.reference.losses[0], rel=1e-6)

    def test_calibration_without_training_observes_the_same(self, trained, name):
        run = Run(quaff_fx.compile(METHODS[name](), EIGHT_BITS))
        run.model.eval()
        quaff_fx.calibrate(run.model, [token_ids()])
        calibrated, expected = (quaff_fx.explain(model).rows for model in (run.model, trained(name).model))
        assert [(row.name, row.stage) for row in calibrated] == [(row.name, row.stage) for row in expected]

    def test_every_frozen_linear_of_the_blocks_is_int8(self, trained, name):
        explanation = quaff_fx.explain(trained(name).model)
        replaced = 2 if name == "LoRA and modules_to_save" else 0  # the frozen o_proj that nothing reads any more
        assert sum(row.stage == "int8" for row in explanation.rows) == 2 * 7 - replaced
        unread = [row.name for row in explanation.rows if row.reason == "no linear reads it"]
        assert len(unread) == replaced
        assert all("o_proj" in unread_name for unread_name in unread)


def test_the_norm_of_dora_reads_dequantized_weights_and_is_told(trained):
    """DoRA divides by the norm of W + sBA in each forward; the linears of all layers are int8 all the same."""
    explanation = quaff_fx.explain(trained("DoRA").model)
    assert len(explanation.also_read) == 7
    assert all("dequantized for add" in also_read for also_read in explanation.also_read)
    assert "also dequantized in each forward: self_attn.q_proj.base_layer.weight (" in str(explanation)
    (graph,) = quaff_fx.graphs(trained("DoRA").model)
    assert sum(change.action == "quantized" for change in graph.changes) == 7
    assert int8_products(graph.lowered) == [7, 7]


@pytest.mark.usefixtures("without_inductor")
def test_dora_with_dropout_multiplies_twice_in_int8():
    """With dropout DoRA multiplies the dropped activation by the weight once more, cast to its dtype."""
    model = quaff_fx.compile(lora(use_dora=True, lora_dropout=0.2), EIGHT_BITS)
    quaff_fx.calibrate(model, [token_ids()])
    model(input_ids=token_ids())
    graph = quaff_fx.graphs(model)[-1]
    assert graph.rewritten.count("torch.ops.quaff.linear.default(") == 2 * 7
    assert sum(change.action == "quantized" for change in graph.changes) == 2 * 7


@pytest.mark.parametrize("name", MERGEABLE)
class TestMerging:
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_int8_weights_refuse_and_the_model_stays(self, trained, name, safe_merge):
        this = trained(name)
        before = step(this.run)
        with pytest.raises(quaff_fx.QuaffError, match="is int8 and rebuilt at each read"):
            this.model.merge_adapter(safe_merge=safe_merge)
        assert step(this.run) == before

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_unloading_is_refused_as_well(self, trained, name, safe_merge):
        model = copy.deepcopy(trained(name).model)
        before = [module_name for module_name, _ in model.named_modules()]
        with pytest.raises(quaff_fx.QuaffError, match="is int8 and rebuilt at each read"):
            model.merge_and_unload(safe_merge=safe_merge)
        assert [module_name for module_name, _ in model.named_modules()] == before

    def test_after_dequantize_it_works(self, trained, name):
        model = quaff_fx.dequantize(copy.deepcopy(trained(name).model)).eval()
        ids = token_ids()
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            with model.disable_adapter():
                base = model(input_ids=ids).logits
            merged_in_place = copy.deepcopy(model)
            merged_in_place.merge_adapter()
            merged = model.merge_and_unload(safe_merge=True)
            for result in (merged_in_place, merged):
                torch.testing.assert_close(result(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert (expected - base).abs().max() > 100 * 1e-5  # the adapter does something that a lost merge would lose
        assert not any("lora" in module_name for module_name, _ in merged.named_modules())


class TestAdapters:
    @pytest.mark.compatibility("Adapters", "switching between two adapters")
    def test_switching_between_two(self):
        def build() -> nn.Module:
            model = lora()
            torch.manual_seed(1)
            model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
            return model

        run, reference = Run(quaff_fx.compile(build(), EIGHT_BITS)), Run(build())
        step(run)
        for adapter in ("default", "other", "default"):
            for each in (run, reference):
                each.model.set_adapter(adapter)
                step(each)
            assert_follows(run, reference)
            assert all(f".{adapter}." in gradient for gradient in run.gradients[-1])
        graphs = len(quaff_fx.graphs(run.model))
        run.model.set_adapter("other")
        with torch._dynamo.config.patch(error_on_recompile=True):
            step(run)
        assert len(quaff_fx.graphs(run.model)) == graphs
        assert run.losses[-1] == run.losses[2]

    @pytest.mark.compatibility("Adapters", "disable_adapter()")
    def test_disabled_it_is_the_reference_model(self, trained):
        """DPO and the like ask the same model, without its adapter, for reference log-probabilities."""
        this = trained("rsLoRA")
        before = step(this.run)
        with torch.no_grad(), this.model.disable_adapter():
            quantized = this.model(input_ids=token_ids()).logits
        with torch.no_grad():
            plain = float_llama()(input_ids=token_ids()).logits
            adapted = this.reference.model(input_ids=token_ids()).logits
        error = (quantized - plain).norm() / plain.norm()
        assert error < 0.02 < 0.1 < (adapted - plain).norm() / plain.norm()
        assert step(this.run) == before

    @pytest.mark.compatibility("Adapters", "added after compile")
    @pytest.mark.parametrize("converted", [False, True])
    def test_added_after_compile(self, converted):
        """`get_peft_model` on a compiled base, before calibration or on weights that are int8 already."""

        def base() -> nn.Module:
            return embedded(float_llama().requires_grad_(False))

        reference = Run(with_lora(base()).train())
        step(reference)
        compiled = quaff_fx.compile(base(), EIGHT_BITS)
        if converted:
            quaff_fx.calibrate(compiled, [token_ids()])
        run = Run(with_lora(compiled).train())
        if not converted:
            step(run)
            assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-6)
        step(run)
        assert_follows(run, reference)
        assert quaff_fx.explain(run.model).stage == "quantize"
        assert sum(row.stage == "int8" for row in quaff_fx.explain(run.model).rows) == 14

    def test_saved_and_loaded_it_is_the_same_adapter(self, trained, tmp_path):
        this = trained("rsLoRA")
        this.model.save_pretrained(tmp_path / "quantized")
        this.reference.model.save_pretrained(tmp_path / "float")
        quantized, plain = (
            {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.safetensors")}
            for folder in ("quantized", "float")
        )
        assert quantized == plain


def test_unfrozen_base_is_refused_before_an_adapter_freezes_it():
    with pytest.raises(quaff_fx.QuaffError, match=r"all .* weight matrices are trainable"):
        quaff_fx.compile(float_llama(), EIGHT_BITS)
    quaff_fx.compile(tiny_llama(), EIGHT_BITS)


PROJECTIONS = ["q_proj", "down_proj"]
OTHER_METHODS: dict[str, Callable[[], PeftConfig]] = {
    "AdaLoRA": lambda: AdaLoraConfig(r=4, target_modules=PROJECTIONS, total_step=10, task_type="CAUSAL_LM"),
    "DoRA": lambda: LoraConfig(r=4, target_modules=PROJECTIONS, use_dora=True),
    "HRA": lambda: HRAConfig(r=4, target_modules=PROJECTIONS),
    "OFT": lambda: OFTConfig(oft_block_size=12, r=0, target_modules=PROJECTIONS),
    "PiSSA": lambda: LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights="pissa"),
    "OLoRA": lambda: LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights="olora"),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}
EDITS_THE_WEIGHT = ("PiSSA", "OLoRA")


def adapted(model: nn.Module, name: str) -> nn.Module:
    """Adds an adapter as if it had been trained."""
    torch.manual_seed(1)
    model = get_peft_model(model, OTHER_METHODS[name]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.train()


@pytest.fixture
def without_inductor(monkeypatch):
    """Rewritten graphs run as they are: these tests ask what is computed and not what it is lowered to."""
    monkeypatch.setattr(backend, "_compile", lambda graph_module, _: graph_module.forward)


@pytest.mark.usefixtures("without_inductor")
class TestOtherMethods:
    """Methods that read or change the weight in some way of their own, on the first quantized step."""

    @pytest.mark.parametrize("name", OTHER_METHODS)
    def test_added_before_compile(self, name):
        run, reference = (Run(adapted(float_llama(), name)) for _ in range(2))
        quaff_fx.calibrate(quaff_fx.compile(run.model, EIGHT_BITS), [token_ids()])
        step(run)
        step(reference)
        assert_follows(run, reference)
        assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-3)
        rows = quaff_fx.explain(run.model).rows
        left = {row.name for row in rows if row.reason == "not only linears over one dimension read it"}
        # HRA multiplies the weight by a matrix of its own: that is no linear of the weight, and those stay in float.
        assert len(left) == (4 if name == "HRA" else 0)
        assert sum(row.stage == "int8" for row in rows) == 14 - len(left)

    @pytest.mark.parametrize("name", OTHER_METHODS)
    def test_added_to_int8_weights(self, name):
        base = quaff_fx.compile(float_llama().requires_grad_(False), EIGHT_BITS)
        quaff_fx.calibrate(base, [token_ids()])
        if name in EDITS_THE_WEIGHT:
            before = [module_name for module_name, _ in base.named_modules()]
            with pytest.raises(quaff_fx.QuaffError, match=r"is int8 and .* before quaff_fx.compile"):
                adapted(base, name)
            assert [module_name for module_name, _ in base.named_modules()] == before
            return
        run, reference = Run(adapted(base, name)), Run(adapted(float_llama(), name))
        step(run)
        step(reference)
        assert_follows(run, reference)
        assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-3)
        assert sum(row.stage == "int8" for row in quaff_fx.explain(run.model).rows) == 14
