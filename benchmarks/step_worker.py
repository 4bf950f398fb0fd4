"""A system of `step.py` in a process of its own: what it trains, and what it measures on the way."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config

from benchmarks import peers
from workloads import smollm2, word_problems
from workloads.memory import peak_memory_mib, reset_peak_memory

SIZES: dict[str, dict[str, int]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "vocab_size": 4096},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96},
}
WHOLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma3-270m": (
        Gemma3TextConfig,
        {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
        },
    ),
    "qwen3-0.6b": (
        Qwen3Config,
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
}
"""Small models with large vocabularies and tied heads, whole: the shape of a published one, with random weights."""

BATCHES = 4
"""Every system sees these in turn, again and again, so that the loss falls."""

WARM_UP_STEPS = 3
"""After the first real one: compiled systems may compile once more."""


@dataclass(frozen=True)
class Linear:
    """A frozen linear of the model: (N, K), its tokens, and whether its input needs a gradient."""

    out_features: int
    in_features: int
    tokens: int
    has_backward: bool

    @property
    def multiply_adds(self) -> int:
        return self.tokens * self.out_features * self.in_features * (2 if self.has_backward else 1)


@dataclass(frozen=True)
class Started:
    """A system is ready: seconds from the float model to the end of the first real step, and what it holds.

    Attributes:
        peak_tensor_bytes: most bytes of all tensors in a step, parameters included; 0 on CUDA, where `Turn.peak_mib`
            is that.
    """

    seconds: float
    frozen_bytes: int
    peak_tensor_bytes: int
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Failed:
    reason: str


@dataclass(frozen=True)
class Turn:
    """Some steps in a row.

    Attributes:
        forward, backward, optimizer: seconds of each step. peak_mib: highest memory of the turn.
        loss: of the last step. idle_cpu_seconds: what the process used since its last turn, while others ran.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    optimizer: tuple[float, ...]
    peak_mib: float
    loss: float
    idle_cpu_seconds: float

    @property
    def steps(self) -> list[float]:
        return [sum(parts) for parts in zip(self.forward, self.backward, self.optimizer, strict=True)]


def adapted_model(options: argparse.Namespace) -> tuple[nn.Module, list[Tensor]]:
    """Returns the float32 model with LoRA on all linears of its blocks, in training mode, and the batches of tokens."""
    shape = (BATCHES, options.batch_size, options.tokens)
    torch.manual_seed(0)
    if options.shape == "smollm2":
        model, tokenizer = smollm2.load_model()
        # Problems in a row and no padding: tokens of real text at every position.
        problems = word_problems.held_out_problems(word_problems.HELD_OUT_PROBLEMS)
        text = "\n\n".join(f"{problem.question}\n{problem.solution}" for problem in problems)
        ids = tokenizer(text, return_tensors="pt")["input_ids"].flatten()
        needed = BATCHES * options.batch_size * options.tokens
        if needed > len(ids):
            raise ValueError(f"tokens: {needed} are needed, expected at most {len(ids)}. Lower --tokens.")
        ids = ids[:needed].view(shape)
    elif options.shape in WHOLE:
        config_class, sizes = WHOLE[options.shape]
        config = config_class(**sizes, max_position_embeddings=options.tokens)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        ids = torch.randint(0, sizes["vocab_size"], shape)
    else:
        sizes = SIZES[options.shape]
        config = LlamaConfig(**sizes, num_hidden_layers=options.layers, max_position_embeddings=options.tokens)
        model = LlamaForCausalLM(config)
        ids = torch.randint(0, sizes["vocab_size"], shape)
    linears = [name for name, module in peers.blocks(model).named_modules() if isinstance(module, nn.Linear)]
    targets = sorted({name.rpartition(".")[2] for name in linears})
    torch.manual_seed(0)  # the adapters of all systems start from the same values
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    return model.train().to(options.device), list(ids.to(options.device))


def frozen_linears(model: nn.Module, ids: Tensor) -> tuple[Linear, ...]:
    """Returns the base layers of the adapters, each as one forward in training mode reaches it."""
    found: list[Linear] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(Linear(*module.weight.shape, ids.numel(), inputs[0].requires_grad))

    hooks = [layer.base_layer.register_forward_pre_hook(record) for layer in peers.adapted_layers(model)]
    model(input_ids=ids[:1, :8], use_cache=False)
    for hook in hooks:
        hook.remove()
    return tuple(found)


class Trainer:
    """Takes training steps of one system, and times their parts."""

    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        self.model = model
        self.batches = batches
        self.device = batches[0].device
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
        self.steps = 0

    def step(self) -> tuple[float, float, float, float]:
        """Returns seconds of forward, backward and optimizer, and the loss."""
        ids = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        times = [self._now()]
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        times.append(self._now())
        loss.backward()
        times.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(self._now())
        forward, backward, optimizer = (end - start for start, end in itertools.pairwise(times))
        return forward, backward, optimizer, loss.item()

    def turn(self, steps: int, idle_cpu_seconds: float) -> Turn:
        reset_peak_memory()
        forward, backward, optimizer, losses = zip(*(self.step() for _ in range(steps)), strict=True)
        return Turn(forward, backward, optimizer, peak_memory_mib(self.device), losses[-1], idle_cpu_seconds)

    def profile(self, steps: int) -> str:
        """Returns the ops that take most time, as torch.profiler lists them, and the time of all per step."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(steps):
                self.step()
        averages = profiler.key_averages()
        table: str = averages.table(sort_by=f"self_{self.device.type}_time_total", row_limit=40)
        return f"{steps} steps\n{table}"

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def work(connection: Connection, name: str, options: argparse.Namespace) -> None:
    """Prepares a system, sends `Started`, then answers each command until the other end closes."""
    try:
        with contextlib.nullcontext() if options.keep_cache else empty_inductor_cache(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            system = next(system for system in peers.SYSTEMS if system.name == name)
            if options.threads:
                torch.set_num_threads(options.threads)
            if reason := system.reason_missing():
                connection.send(Failed(reason))
                return
            model, batches = adapted_model(options)
            linears = frozen_linears(model, batches[0])
            start = time.perf_counter()
            trainer = Trainer(system.prepare(model), batches)
            # Step 2 is the first real one of a system that calibrates; all the others take two as well.
            trainer.step()
            seconds = time.perf_counter() - start
            trainer.step()
            if system.calibrates:
                seconds = time.perf_counter() - start
            for _ in range(WARM_UP_STEPS):
                trainer.step()
            peak = tensor_peak_bytes(trainer.step) if options.device == "cpu" else 0
            connection.send(Started(seconds, peers.frozen_bytes(trainer.model), peak, linears))
            used = time.process_time()
            while (command := connection.recv()) is not None:
                idle = time.process_time() - used
                connection.send(trainer.turn(command[1], idle) if command[0] == "turn" else trainer.profile(command[1]))
                used = time.process_time()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as error:  # whatever a peer raises is a reason in the footer, not the end of the benchmark
        if options.verbose:
            traceback.print_exc()
        connection.send(Failed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))


@contextlib.contextmanager
def empty_inductor_cache() -> Iterator[None]:
    """Gives this process an empty cache of compiled code, so that start-up is what a new user sees."""
    with tempfile.TemporaryDirectory(prefix="quaff-step-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


class Worker:
    """The near end of a worker's process."""

    def __init__(self, system: peers.System, options: argparse.Namespace) -> None:
        self.system = system
        context = multiprocessing.get_context("spawn")
        self._connection, far = context.Pipe()
        self._process = context.Process(target=work, args=(far, system.name, options), daemon=True)
        self._process.start()
        far.close()  # so that the end of the process is the end of the pipe

    def receive(self) -> Any:
        """Returns the next answer; `Failed` if the process ended without one."""
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            return Failed(f"its process ended with exit code {self._process.exitcode}")

    def ask(self, command: str, steps: int) -> Any:
        self._connection.send((command, steps))
        return self.receive()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(None)
        self._process.join(timeout=30)
        self._process.kill()


def tensor_peak_bytes(run: Callable[[], object]) -> int:
    """Returns the most bytes that all tensors on the CPU take while `run` runs: those there before, and new ones."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    }
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        run()
    held = peak = sum(storages.values())
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
