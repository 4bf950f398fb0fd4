"""All methods of PEFT, each with the smallest config that trains on a tiny model, and what is done with them."""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora_config
from torch import Tensor, nn
from torch.nn import functional

import quaff_fx
from tests.models import VOCABULARY, float_llama, token_ids

HIDDEN = 64
EIGHT_BITS = {"progress": False, "calibration_steps": 1, "activation_bits": 8}
BATCH = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)  # no adapter is put on it
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.mix(self.norm(x)))))


class TwoBlocks(nn.Module):
    """The least that every method which adapts linears can be added to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if torch.is_grad_enabled():
            x.requires_grad_()  # one graph serves both blocks
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def two_blocks() -> nn.Module:
    torch.manual_seed(0)
    return TwoBlocks().requires_grad_(False)


def llama() -> nn.Module:
    """For methods that ask for a model of transformers."""
    return float_llama(hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, use_cache=False).requires_grad_(False)


PROJECTIONS = {two_blocks: ["up", "down"], llama: ["q_proj", "down_proj"]}


OF_PEFT = [
    # What it says of its own methods: what they cannot merge, ignore, or do without CUDA.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # Its prompts.
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    # Its caches of functions (SHiRA, super-tuning) and its sparse matrices (FROD, SHiRA).
    pytest.mark.filterwarnings(
        "ignore:Dynamo (detected a call to a `functools|does not know how to trace):UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]
"""The marks of tests of all methods of PEFT: the warnings of these methods."""


@dataclass(frozen=True)
class Method:
    """One method of PEFT.

    Attributes:
        options: of its config. base: makes the model that it is added to. inputs: what its forward takes besides ids.
        noise: what is added to its parameters, as if they had been trained: enough to move the output by a tenth, which
            is much more than what int8 rounds.
    """

    options: dict[str, Any]
    base: Callable[[], nn.Module] = two_blocks
    inputs: dict[str, Tensor] = field(default_factory=dict)
    noise: float = 0.1


def prompt(**options: Any) -> Method:
    return Method({"num_virtual_tokens": 4, "target_modules": None, **options}, base=llama)


TASKS = {"task_ids": torch.arange(BATCH) % 2}
METHODS: dict[str, Method] = {
    "ADALORA": Method({"init_r": 4, "target_r": 2, "total_step": 10}, noise=0.2),
    "ADAMSS": Method({"r": 8, "num_subspaces": 2}, noise=0.3),
    "ADAPTION_PROMPT": Method({"adapter_len": 4, "adapter_layers": 2, "target_modules": None}, base=llama, noise=0.15),
    "BEFT": Method({}),
    "BOFT": Method({"boft_block_size": 4}, noise=0.3),
    "C3A": Method({"block_size": 16}, noise=5),
    "CARTRIDGE": prompt(),
    "CPT": Method(
        {
            "cpt_token_ids": [1, 2, 3, 4],
            "cpt_mask": [1] * 4,
            "cpt_tokens_type_mask": [1, 2, 3, 4],
            "target_modules": None,
        },
        base=llama,
    ),
    "DEFT": Method({"r": 4}, noise=0.15),
    "DELORA": Method({"r": 4}, noise=0.001),
    "FOURIERFT": Method({"n_frequency": 16}, noise=0.001),
    "FROD": Method({"progressbar": False}, noise=0.3),
    "GLORA": Method({"r": 4}, noise=0.15),
    "GRALORA": Method({"r": 4, "alpha": 4}, noise=0.15),
    "HIRA": Method({"r": 4}, noise=0.7),
    "HRA": Method({"r": 4}, noise=20),
    "IA3": Method({"feedforward_modules": ["down"]}, noise=0.7),
    "LILY": Method({"r": 4}, noise=0.15),
    "LN_TUNING": Method({"target_modules": ["norm"]}, noise=0.7),
    "LOHA": Method({"r": 4}, noise=0.2),
    "LOKR": Method({"r": 4}, noise=0.15),
    "LORA": Method({"r": 4}),
    "MISS": Method({"r": 4}, noise=0.03),
    "MULTITASK_PROMPT_TUNING": Method(
        {"num_virtual_tokens": 4, "num_tasks": 2, "target_modules": None}, base=llama, inputs=TASKS
    ),
    "OFT": Method({"oft_block_size": 8}, noise=0.15),
    "OSF": Method({"effective_rank": 8}, noise=0.05),
    "P_TUNING": prompt(encoder_hidden_size=16),
    "PEANUT": Method({"r": 4}, noise=0.2),
    "POLY": Method({"r": 4, "n_tasks": 2, "n_skills": 2}, base=llama, inputs=TASKS, noise=0.2),
    "PREFIX_TUNING": prompt(),
    "PROMPT_TUNING": prompt(),
    "PSOFT": Method({"r": 4}, noise=0.7),
    "PVERA": Method({"r": 4}, noise=0.5),
    "RANDLORA": Method({"r": 4, "randlora_alpha": 4}),
    "ROAD": Method({"group_size": 4}, noise=0.5),
    "SHADOW": Method({"r": 4, "target_modules": None, "shadow_dropout": 0.0}, base=llama, noise=0.02),
    "SHIRA": Method({"r": 2}, noise=0.15),
    "SUPERTUNING": Method({}, noise=0.5),
    "TINYLORA": Method({"u": 4}, noise=2),
    "TRAINABLE_TOKENS": Method({"token_indices": [1, 2, 3], "target_modules": ["embed"]}, noise=1),
    "UNILORA": Method({"theta_d_length": 16}, noise=2),
    "VBLORA": Method({"num_vectors": 8, "vector_length": 8}, noise=0.15),
    "VERA": Method({"r": 4}, noise=0.5),
    "WAVEFT": Method({"n_frequency": 16}, noise=0.05),
    "XLORA": Method(
        {"hidden_size": HIDDEN, "xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0, "target_modules": None},
        base=llama,
    ),
}


# A method that cannot be trained on a float model here, with the reason.
UNTRAINABLE: dict[str, str] = {}
if importlib.util.find_spec("sklearn") is None:
    UNTRAINABLE["ADAMSS"] = "needs scikit-learn, which is not installed"
# LoRA has kinds of its own, each by the option that chooses it.
LORA_KINDS: dict[str, dict[str, Any]] = {
    "BD-LoRA": {
        "use_bdlora": lora_config.BdLoraConfig(target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2)
    },
    "DoRA": {"use_dora": True},
    "EVA": {"init_lora_weights": "eva"},
    "KaSA": {"kasa_config": lora_config.KasaConfig()},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "MiCA": {"init_lora_weights": "mica"},
    "MonteCLoRA": {"monteclora_config": lora_config.MontecloraConfig()},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "QALoRA": {"use_qalora": True, "qalora_group_size": 16},
    "VeLoRA": {"velora_config": lora_config.VeloraConfig(num_groups=4)},
    "all biases": {"bias": "all"},
    "all linears": {"target_modules": "all-linear"},
    "bias": {"lora_bias": True},
    "biases of its linears": {"bias": "lora_only"},
    "dropout": {"lora_dropout": 0.2},
    "embedding": {"target_modules": ["up", "embed"]},
    "modules_to_save": {"modules_to_save": ["mix", "head"]},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "ranks": {"rank_pattern": {"up": 2}, "alpha_pattern": {"up": 2}},
    "rsLoRA": {"use_rslora": True},
    "target_parameters": {"target_modules": [], "target_parameters": ["up.weight"]},
    "token indices": {"trainable_token_indices": {"embed": [1, 2]}},
}
# Options of LoraConfig that choose no kind of the above, with what becomes of them here.
OTHER_LORA_OPTIONS = {
    "alora_invocation_tokens": "tested with tokens of its own",
    "arrow_config": "mixes adapters that are saved, as X-LoRA does",
    "corda_config": "needs its own run over data",
    "ensure_weight_tying": "for embeddings",
    "eva_config": "how EVA's own run over data is made",
    "exclude_modules": "which modules",
    "fan_in_fan_out": "for Conv1D",
    "layer_replication": "tested on Llama",
    "loftq_config": "needs scipy",
    "lora_alpha": "a number",
    "lora_ga_config": "needs gradients of its own",
    "megatron_config": "needs megatron",
    "megatron_core": "needs megatron",
    "r": "a number",
    "runtime_config": "for other devices",
}
TRAINABLE = sorted(METHODS.keys() - UNTRAINABLE.keys())
PEFT_METHODS = {peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}


@functools.cache
def lora_folder() -> str:
    """A saved LoRA for X-LoRA, which mixes such."""
    folder = tempfile.mkdtemp()
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": PROJECTIONS[llama], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    peft.get_peft_model(llama(), peft.LoraConfig(**options)).save_pretrained(folder)
    return folder


def config(name: str, **changes: Any) -> peft.PeftConfig:
    method = METHODS[name]
    options = {"target_modules": PROJECTIONS[method.base]} | method.options | changes
    if options["target_modules"] is None:
        del options["target_modules"]
    if method.base is llama:
        options["task_type"] = "CAUSAL_LM"
    if name == "XLORA":
        options["adapters"] = {"0": lora_folder()}
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)](**options)


def as_if_trained(model: nn.Module, noise: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn_like(parameter)
    return model


def add(base: nn.Module, name: str, seed: int = 1, **changes: Any) -> nn.Module:
    """The base with an adapter of the method, as if it had been trained; with some options of its config changed."""
    options = config(name, **changes)  # X-LoRA's makes an adapter when it is first asked for
    torch.manual_seed(seed)
    return as_if_trained(peft.get_peft_model(base, options), METHODS[name].noise, seed)


IDS = token_ids(BATCH, 12)


def batch(name: str) -> dict[str, Tensor]:
    return {"input_ids": IDS} | METHODS[name].inputs


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits in evaluation."""
    was_training = model.training
    model.eval()
    try:
        result = model(**inputs)
    finally:
        model.train(was_training)
    return result if isinstance(result, Tensor) else result.logits


def train(model: nn.Module, name: str, steps: int = 1, rate: float = 0.01) -> list[dict[str, Tensor]]:
    """The gradients of some training steps, zero where a parameter was not reached."""
    gradients = []
    trained = {n: parameter for n, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=rate)
    model.train()
    for _ in range(steps):
        torch.manual_seed(0)
        if METHODS[name].base is llama:
            loss = model(**batch(name), labels=IDS).loss
        else:
            loss = functional.cross_entropy(model(**batch(name)).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in trained.items() if p.grad is not None})
        optimizer.step()
    return gradients


@functools.cache
def _int8_base(make: Callable[[], nn.Module]) -> nn.Module:
    return quaff_fx.calibrate(quaff_fx.compile(make(), EIGHT_BITS), [{"input_ids": IDS}])


def int8_base(name: str) -> nn.Module:
    """The base in int8, a copy that may be changed; each copy has the same int8 values."""
    return copy.deepcopy(_int8_base(METHODS[name].base))


def rounded_base(name: str) -> nn.Module:
    """The base in float, with the values that its int8 weights have."""
    return quaff_fx.dequantize(int8_base(name))
