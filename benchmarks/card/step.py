"""Training steps of one system at one shape: time on the wall and of the card, memory, seconds to compile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import peers
from benchmarks.card import device as cards
from benchmarks.card import parts, plan
from benchmarks.card.systems import SYSTEMS

VOCABULARY = 4096
"""Small, so that the blocks and not the head are what is measured."""
WARM_UP_STEPS = 4
WAKING_STEPS = 3
"""Before the timed ones: the card's clock has fallen while others were measured."""
PROFILED_STEPS = 3


def stages(
    shape: dict[str, Any],
    system: str,
    device: str,
    rounds: int,
    has_profile: bool = False,
    is_eager: bool = False,
) -> Iterator[dict[str, Any]]:
    """Imports; prepares and compiles; times; profiles. `is_eager`: nothing is compiled, for a dry run.

    Args:
        shape: the fields of `plan.Shape`. rounds: steps that are timed.
        has_profile: tell the card's time by part of the step.
    """
    if is_eager:
        torch.compiler.set_stance("force_eager")
    yield {}
    if reason := SYSTEMS[system].reason_missing():
        yield {"failed": reason}
        return
    trainer = Trainer(plan.Shape(**shape), SYSTEMS[system], torch.device(device))
    yield {**cards.description(trainer.device), **trainer.begin()}
    yield trainer.timed(rounds)
    yield trainer.profiled(has_profile)


def adapted_model(shape: plan.Shape, device: torch.device) -> nn.Module:
    """Returns a Llama of random weights on the device with LoRA on all linears of its blocks, in training mode."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=max(2048, shape.tokens),
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))  # no float32 copy of a large model on the way
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    linears = [name for name, module in peers.blocks(model).named_modules() if isinstance(module, nn.Linear)]
    targets = sorted({name.rpartition(".")[2] for name in linears})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # zeros would leave A without a gradient
    return model.train()


class Trainer:
    """Takes training steps: forward, backward, AdamW on the adapters."""

    def __init__(self, shape: plan.Shape, system: peers.System, device: torch.device) -> None:
        self.device, self.system = device, system
        # Libraries of the card are loaded by their first use; that belongs to no system.
        square = torch.ones(64, 64, device=device, dtype=getattr(torch, shape.dtype), requires_grad=True)
        (square @ square).sum().backward()
        model = adapted_model(shape, device)
        self.ids: Tensor = torch.randint(0, VOCABULARY, shape.batch, device=device)
        self.model = system.prepare(model)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def step(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _seconds(self) -> float:
        """The time of one step, from an idle device to an idle device."""
        cards.synchronize(self.device)
        begin = time.perf_counter()
        self.step()
        cards.synchronize(self.device)
        return time.perf_counter() - begin

    def begin(self) -> dict[str, Any]:
        """Takes the first steps; returns the seconds of the first one that is compiled, which counts the conversion."""
        if self.system.calibrates:
            self.step()
        seconds = self._seconds()
        for _ in range(WARM_UP_STEPS):
            self.step()
        self._free()
        return {"first_step_s": seconds, "graphs": _graphs()}

    def _free(self) -> None:
        """Gives back what no tensor needs, to those that wait beside it."""
        cards.synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, rounds: int) -> dict[str, Any]:
        """Returns milliseconds of a step and the most MiB of all tensors in it."""
        graphs = _graphs()
        for _ in range(WAKING_STEPS):
            self.step()
        cards.synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        times = [self._seconds() * 1e3 for _ in range(rounds)]
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else 0.0
        loss = self.step().item()
        self._free()
        return {
            "wall_ms": statistics.median(times),
            "fastest_ms": min(times),
            "peak_mib": peak,
            "frozen_mib": peers.frozen_bytes(self.model) / 2**20,
            "loss": loss,
            "recompiled": _graphs() - graphs,
        }

    def profiled(self, by_part: bool) -> dict[str, Any]:
        """Returns the milliseconds that a step keeps the device busy, and of each part of it."""
        kernels = parts.profiled_kernels(self.step, PROFILED_STEPS, self.device)
        if not kernels:
            return {"gpu_ms": cards.milliseconds(self.step, self.device, 1), "gpu_ms_from": "events, gaps included"}
        answer: dict[str, Any] = {"gpu_ms": sum(kernel.ms for kernel in kernels), "gpu_ms_from": "profiler"}
        if by_part:
            answer["parts"] = parts.milliseconds_by_part(kernels)
            answer["kernels"] = parts.longest(kernels)
        return answer


def _graphs() -> int:
    """How many graphs Dynamo has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
