"""The small model of the checks: with planted outliers, the same on every device, and what is asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import quaff_fx

VOCABULARY = 512
CALIBRATION_STEPS = 2
CPU = torch.device("cpu")


def llama(device: torch.device, dtype: torch.dtype = torch.float32, layers: int = 2, dropout: float = 0.0) -> nn.Module:
    """Returns a small Llama with planted outliers and LoRA on all its linears, the same on every device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] = layer.post_attention_layernorm.weight[9] = 40.0
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout)
    return _with_random_adapters(get_peft_model(model, lora, autocast_adapter_dtype=False)).to(device, dtype)


def gpt2(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a small GPT-2, whose linears are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128, use_cache=False)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(GPT2LMHeadModel(config), lora, autocast_adapter_dtype=False)
    return _with_random_adapters(model).to(device, dtype)


def _with_random_adapters(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.train()


def batch(model: nn.Module, seed: int, tokens: int = 64) -> Tensor:
    ids = torch.randint(0, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(next(model.parameters()).device)


def loss_of(model: nn.Module, seed: int, autocast: torch.dtype | None = None) -> Tensor:
    ids = batch(model, seed)
    with torch.autocast(ids.device.type, autocast) if autocast else contextlib.nullcontext():
        loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def gradient(model: nn.Module, autocast: torch.dtype | None = None) -> Tensor:
    """The gradient of all adapters, one float64 vector on the CPU."""
    model.zero_grad()
    loss_of(model, 9, autocast).backward()
    parts = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return torch.cat([part.flatten().double().cpu() for _, part in sorted(parts.items())])


def quantized(model: nn.Module, autocast: torch.dtype | None = None, **config: Any) -> nn.Module:
    """Compiles the model with quaff_fx and takes its steps of calibration and one more."""
    config = {"activation_bits": 8} | config
    model = quaff_fx.compile(model, quaff_fx.QuaffConfig(calibration_steps=CALIBRATION_STEPS, progress=False, **config))
    for seed in range(CALIBRATION_STEPS + 1):
        loss_of(model, seed, autocast).backward()
        model.zero_grad()
    expect(int8_weights(model) > 0, "no weight is int8")
    return model


def on_cpu(make: Callable[[torch.device], nn.Module], autocast: torch.dtype | None = None, **config: Any) -> Tensor:
    """The gradient of the same model on the CPU."""
    with torch.compiler.set_stance("force_eager"):
        return gradient(quantized(make(CPU), autocast, **config), autocast)


def int8_weights(model: nn.Module) -> int:
    return sum(parameter.dtype == torch.int8 for parameter in model.parameters())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def expect(is_met: bool, what: str) -> None:
    if not is_met:
        raise AssertionError(what)


def expect_cosine(what: str, a: Tensor, b: Tensor, least: float) -> str:
    found = cosine(a, b)
    expect(found >= least, f"{what} {found:.4f}, expected at least {least}")
    return f"{what} {found:.4f}"
