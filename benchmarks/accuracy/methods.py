"""What is compared: ways to hold the frozen weights, ways to adapt them, and outliers to test them with.

Each method changes only what lies under the adapters of a float32 model, or compiles it with quaff_fx, so all train the
same parameters from the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

import quaff_fx
from benchmarks import peers
from benchmarks.accuracy import forms, layers
from benchmarks.peers import PAPER, QuaffLinear, adapted_layers, with_base_layers
from quaff_fx.api import stages_of
from quaff_fx.weights.owners import RUN
from workloads.word_problems import Batch

ACTIVATION_MAX = {8: 127, 7: 63}


@dataclass(frozen=True)
class Method:
    """One way to hold the frozen weights.

    Attributes:
        name: in the table.
        prepare: takes the adapted float32 model, the bits and calibration batches; returns the model to measure.
        bits: of the activations, a row for each.
        config: of quaff_fx or of a form; what is stored with a result. None where there is nothing to choose.
        is_compiled: whether it is compiled by quaff_fx.
        is_stressed: whether it is measured with injected outliers, at its fewest bits.
        is_adapted: whether it is measured with each of `ADAPTERS` and not only LoRA.
        reason_missing: why it cannot run here, None if it can.
    """

    name: str
    prepare: Callable[[nn.Module, int, list[Batch]], nn.Module]
    bits: tuple[int, ...] = (8, 7)
    config: Mapping[str, object] | None = None
    is_compiled: bool = False
    is_stressed: bool = False
    is_adapted: bool = False
    reason_missing: Callable[[], str | None] = field(default=lambda: None)


# --- floating point and weights alone ----------------------------------------------------------------------------


def float32(model: nn.Module, bits: int, calibration: list[Batch]) -> nn.Module:
    """Returns the model as it is."""
    return model


def bfloat16(model: nn.Module, bits: int, calibration: list[Batch]) -> nn.Module:
    """The base model in bfloat16; the adapters stay float32, as PEFT keeps them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.to(torch.bfloat16)
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return model


def each_base_layer(change: Callable[[nn.Linear], nn.Module], model: nn.Module, *_: object) -> nn.Module:
    return with_base_layers(model, change)


# --- int8 weights and activations --------------------------------------------------------------------------------


def plain(model: nn.Module, bits: int, calibration: list[Batch]) -> nn.Module:
    return with_base_layers(model, lambda linear: layers.Int8Linear(linear, ACTIVATION_MAX[bits]))


def llm_int8(model: nn.Module, bits: int, calibration: list[Batch]) -> nn.Module:
    return with_base_layers(model, lambda linear: layers.LLMInt8Linear(linear, ACTIVATION_MAX[bits]))


def smooth_quant_dynamic(model: nn.Module, bits: int, calibration: list[Batch]) -> nn.Module:
    return with_base_layers(model, lambda linear: layers.SmoothQuantLinear(linear, ACTIVATION_MAX[bits], None))


def smooth_quant_static(model: nn.Module, bits: int, calibration: list[Batch]) -> nn.Module:
    absmax = input_absmax(model, calibration)
    return with_base_layers(
        model, lambda linear: layers.SmoothQuantLinear(linear, ACTIVATION_MAX[bits], absmax[linear])
    )


def paper_code(model: nn.Module, bits: int, calibration: list[Batch]) -> nn.Module:
    """As in the paper's code: one scale per weight, and no channel that never reaches 100 × the mean.

    quaff_fx has a scale per row and fills its budget with the next largest channels. Calibrated by one large batch.
    """
    with_base_layers(model, lambda linear: QuaffLinear(linear, ACTIVATION_MAX[bits], fills_budget=False))
    run([{name: torch.cat([batch[name] for batch in calibration]) for name in calibration[0]}], model)
    return model


def input_absmax(model: nn.Module, batches: list[Batch]) -> dict[nn.Module, Tensor]:
    """Returns the largest absolute value of each input channel, (K,), over all batches, by base layer."""
    absmax: dict[nn.Module, Tensor] = {}

    def observe(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen = arguments[0].flatten(0, -2).abs().amax(dim=0)
        absmax[module] = torch.maximum(absmax[module], seen) if module in absmax else seen

    handles = [layer.get_base_layer().register_forward_pre_hook(observe) for layer in adapted_layers(model)]
    run(batches, model)
    for handle in handles:
        handle.remove()
    return absmax


@torch.no_grad()
def run(batches: list[Batch], model: nn.Module) -> None:
    for inputs in model_inputs(batches):
        model(**inputs, use_cache=False)


def model_inputs(batches: list[Batch]) -> list[Batch]:
    """Returns the batches without labels."""
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


# --- quaff_fx ----------------------------------------------------------------------------------------------------


def quaff(config: Mapping[str, object], model: nn.Module, bits: int, calibration: list[Batch]) -> nn.Module:
    """Compiles and calibrates the model with quaff_fx, the product itself."""
    quaff_fx.compile(model, {"progress": False, "activation_bits": bits} | dict(config))
    return quaff_fx.calibrate(model, model_inputs(calibration))


def without_compiler(model: nn.Module) -> nn.Module:
    """Makes the blocks of a calibrated quaff_fx model run eagerly: the same numbers and nothing to compile.

    One difference: what `smoothing="momentum"` calibrated stays, as only the compiled graph moves it on.
    """
    for block in stages_of(model).blocks:
        del block.__dict__[RUN]
    return model


CONFIGS: dict[str, Mapping[str, object]] = {
    "quaff_fx: Quaff's formulas": PAPER,
    "quaff_fx: default": {},
    "quaff_fx: head in float": {"exclude": ("lm_head",)},
}
"""The configurations of quaff_fx."""


def quaff_method(name: str, config: Mapping[str, object]) -> Method:
    is_adapted = name == "quaff_fx: default"
    return Method(
        name, partial(quaff, config), config=config, is_compiled=True, is_stressed=True, is_adapted=is_adapted
    )


def of_form(form: forms.Form, model: nn.Module, bits: int, calibration: list[Batch]) -> nn.Module:
    """Quantizes in one of the forms that the ablations compare, emulated."""

    def run_all() -> None:
        for batch in calibration:
            run([batch], model)

    key = calibration[0]["input_ids"]
    if form.rounding == "error feedback":  # needs more than the others
        activations = forms.observed(form, model, run_all)
    elif (activations := OBSERVED.get(key)) is None:
        activations = OBSERVED[key] = forms.observed(form, model, run_all)
    return forms.quantized(form, model, ACTIVATION_MAX[bits], activations, run_all)


OBSERVED: MutableMapping[Tensor, list[forms.Activation]] = WeakTensorKeyDictionary()
"""What calibration showed, by its first batch: the same for all forms."""


def form_method(name: str, form: forms.Form) -> Method:
    return Method(name, partial(of_form, form), config=asdict(form))


METHODS = (
    Method("float32", float32, bits=(32,), is_stressed=True, is_adapted=True),
    Method("bfloat16", bfloat16, bits=(16,)),
    Method("int8 weights alone", partial(each_base_layer, layers.int8_weight_values), bits=(32,)),
    Method(
        "QLoRA NF4",
        partial(each_base_layer, layers.nf4_weight_values),
        bits=(32,),
        reason_missing=peers.reason_no_bitsandbytes,
    ),
    Method("plain W8A8", plain, is_stressed=True),
    Method("LLM.int8", llm_int8, is_stressed=True),
    Method("SmoothQuant, static", smooth_quant_static, is_stressed=True),
    Method("SmoothQuant, dynamic", smooth_quant_dynamic, is_stressed=True),
    Method("Quaff, the paper's code", paper_code),
    *(quaff_method(name, config) for name, config in CONFIGS.items()),
)

ABLATIONS = (METHODS[0], *(form_method(name, form) for name, form in forms.FORMS.items()))
"""What `--ablations` compares: float32 and the forms of Quaff's linear."""


# --- adapters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A PEFT method and its learning rate, chosen by what its papers use and not tuned here."""

    config: Callable[[nn.Module], PeftConfig]
    learning_rate: float


def lora(model: nn.Module) -> PeftConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def ia3(model: nn.Module) -> PeftConfig:
    """Rescales what PEFT names for the architecture: keys, values and what goes into down_proj in a Llama."""
    return IA3Config(task_type="CAUSAL_LM")


def prompt_tuning(model: nn.Module) -> PeftConfig:
    return PromptTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM")


def p_tuning(model: nn.Module) -> PeftConfig:
    hidden_size = model.get_input_embeddings().embedding_dim
    return PromptEncoderConfig(num_virtual_tokens=16, encoder_hidden_size=hidden_size, task_type="CAUSAL_LM")


ADAPTERS = {
    "LoRA": Adapter(lora, 5e-4),
    "prompt tuning": Adapter(prompt_tuning, 1e-2),
    "P-tuning": Adapter(p_tuning, 1e-3),
    "IA3": Adapter(ia3, 5e-3),
}


def adapted(model: nn.Module, adapter: str, seed: int) -> nn.Module:
    """Returns the model with an adapter whose first values depend on the seed alone."""
    torch.manual_seed(seed)
    return get_peft_model(model, ADAPTERS[adapter].config(model)).eval()


# --- injected outliers -------------------------------------------------------------------------------------------

INJECTED_CHANNELS = 4
NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@torch.no_grad()
def inject_outliers(model: nn.Module, factor: float, seed: int) -> None:
    """Makes `INJECTED_CHANNELS` channels of the input of q, k, v and of gate, up `factor` times as large, in place.

    The gain of the norm before them is multiplied and the columns of the linears after it are divided, so the model
    computes what it did. Ordinary channels are taken: those whose gain is nearest to the norm's median, with each seed
    others.

    Raises:
        ValueError: the model's blocks do not have these norms.
    """
    found = 0
    for module in model.modules():
        for norm_name, linear_names in NORMS.items():
            norm = getattr(module, norm_name, None)
            if norm is None:
                continue
            gain = norm.weight.abs()
            by_distance = (gain - gain.median()).abs().argsort(stable=True)
            channels = by_distance[seed * INJECTED_CHANNELS :][:INJECTED_CHANNELS]
            if len(channels) < INJECTED_CHANNELS:
                raise ValueError(
                    f"seed: is {seed}, expected one that leaves {INJECTED_CHANNELS} of {len(gain)} channels."
                )
            norm.weight[channels] *= factor
            for name in linear_names:
                module.get_submodule(name).weight[:, channels] /= factor
            found += 1
    if not found:
        raise ValueError(f"model: has no {' or '.join(NORMS)}, expected blocks like those of Llama for this test.")


def randomize_lora(model: nn.Module, seed: int) -> None:
    """Gives every second factor of LoRA small random values, as after some steps: both factors then have gradients."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            bound = 0.05 / math.sqrt(parameter.shape[1])
            parameter.data = (2 * torch.rand(parameter.shape, generator=generator) - 1) * bound


def clear_lora(model: nn.Module) -> None:
    """Undoes `randomize_lora`."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
