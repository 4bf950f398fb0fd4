"""What of quaff_fx works on a card: a small model with planted outliers in every mode, and the kernels alone.

Its gradient is compared with float32's on the same device, and with that of quaff_fx on the CPU. There it runs without
being compiled, in the same numbers.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quaff_fx
from benchmarks.card import device as cards
from benchmarks.card.exactness import CHECKS as EXACTNESS
from benchmarks.card.small_model import (
    CALIBRATION_STEPS,
    CPU,
    batch,
    expect,
    expect_cosine,
    gpt2,
    gradient,
    int8_weights,
    llama,
    loss_of,
    on_cpu,
    quantized,
)
from quaff_fx.kernels.dispatch import kernels_of


@dataclass(frozen=True)
class Mode:
    """A way to train in.

    Attributes:
        dtype: of the model. autocast: dtype, or None for none. config: of quaff_fx, beside the defaults.
        least: of the cosine of its gradient with float32's. A wrong scale, row or sign anywhere gives far less.
    """

    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    config: tuple[tuple[str, Any], ...] = ()
    least: float = 0.99


MODES = {
    "float32": Mode(least=0.995),
    "bfloat16": Mode(torch.bfloat16),
    "float16": Mode(torch.float16),
    "autocast, bfloat16": Mode(autocast=torch.bfloat16),
    "autocast, float16": Mode(autocast=torch.float16),
    "7 bits": Mode(config=(("activation_bits", 7),), least=0.97),
    "no rotation": Mode(config=(("rotation", 1),), least=0.98),
    "momentum, as in the paper": Mode(config=(("smoothing", "momentum"),), least=0.95),
}

LEAST_COSINE_CPU = 0.985
"""With the CPU's gradient. Compiled and eager code round 16 bits in other places, so integers near an edge fall to
either side of it: 0.995 in bfloat16 between the two on one CPU."""


def stages(names: Sequence[str], device: str, is_eager: bool = False) -> Iterator[dict[str, Any]]:
    """Imports; then makes each check, an answer for each. `is_eager`: nothing is compiled, for a dry run."""
    if is_eager:
        torch.compiler.set_stance("force_eager")
    yield {}
    yield {**cards.description(torch.device(device)), "more": True}
    for name in names:
        yield {**result_of(name, torch.device(device)), "more": True}
    yield {"end": True}


def result_of(name: str, device: torch.device) -> dict[str, Any]:
    """Makes a check; returns whether it passed, failed or could not be made ("skipped"), and what it found."""
    try:
        return {"check": name, "status": "passed", "detail": CHECKS[name](device)}
    except MissingError as reason:
        return {"check": name, "status": "skipped", "detail": str(reason)}
    except Exception as error:  # what a check raises is its result
        traceback.print_exc()
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        return {"check": name, "status": "failed", "detail": text}


class MissingError(Exception):
    """A check needs what is not installed."""


def kernels_in_use(device: torch.device) -> str:
    """Which kernels compute here and on the CPU. First of all checks: it builds the CPU's, which others wait for."""
    here, there, plain = (kernels_of(each).name for each in (device, CPU, torch.device("meta")))
    expect(here != plain, f"{device.type} has no kernels of its own but {plain}")
    return f"{device.type}: {here}; CPU: {there}"


def fidelity(mode: Mode, device: torch.device) -> str:
    """Its gradient beside float32's and the CPU's."""
    return _fidelity(llama, mode, device)


def _fidelity(make: Callable[..., nn.Module], mode: Mode, device: torch.device) -> str:
    exact = gradient(make(device))
    config = dict(mode.config)
    found = gradient(quantized(make(device, mode.dtype), mode.autocast, **config), mode.autocast)
    near_exact = expect_cosine("gradient with float32", found, exact, mode.least)
    here = on_cpu(partial(make, dtype=mode.dtype), mode.autocast, **config)
    return f"{near_exact}, {expect_cosine('with the CPU', found, here, LEAST_COSINE_CPU)}"


def conv1d(device: torch.device) -> str:
    return _fidelity(gpt2, Mode(), device)


def checkpointing(device: torch.device) -> str:
    plain = gradient(quantized(llama(device, torch.bfloat16)))
    model = llama(device, torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # The same sums, recomputed; Inductor may fuse, and so round, a float part of them differently.
    return expect_cosine("gradient with that without it", gradient(quantized(model)), plain, 0.999)


def grad_scaler(device: torch.device) -> str:
    model = quantized(llama(device), torch.float16)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trainable]
    optimizer = torch.optim.SGD(trainable, lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    scaler.scale(loss_of(model, 9, torch.float16)).backward()
    scaler.unscale_(optimizer)
    found = torch.cat([p.grad.flatten().double().cpu() for _, p in sorted(model.named_parameters()) if p.requires_grad])
    scaler.step(optimizer)
    scaler.update()
    changed = sum(not torch.equal(old, new) for old, new in zip(before, trainable, strict=True))
    expect(changed == len(trainable), f"{changed} of {len(trainable)} adapters changed")
    return expect_cosine("gradient with float32", found, gradient(llama(device)), 0.99)


def trainer(device: torch.device) -> str:
    """The Trainer of transformers with dropout, bfloat16 and the callback, six steps and two checkpoints."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise MissingError("accelerate is not installed (pip install accelerate)") from None
    from transformers import Trainer, TrainingArguments

    model = quaff_fx.compile(
        llama(device, dropout=0.05), quaff_fx.QuaffConfig(calibration_steps=CALIBRATION_STEPS, progress=False)
    )
    rows = [batch(model, seed)[0].cpu() for seed in range(24)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=6,
            per_device_train_batch_size=2,
            bf16=True,
            use_cpu=device.type == "cpu",
            logging_steps=2,
            report_to=[],
            save_steps=3,
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        loss = Trainer(model, arguments, train_dataset=data, callbacks=[quaff_fx.QuaffCallback()]).train().training_loss
        states = len(list(Path(folder).glob("checkpoint-*/quaff_state.safetensors")))
    expect(states == 2, f"{states} checkpoints have a state, expected 2")
    expect(int8_weights(model) > 0, "no weight is int8")
    # Random tokens: nothing to learn but the outliers' size, so about the loss of the float model.
    exact = loss_of(llama(device), 9).item()
    expect(abs(loss - exact) < 0.3, f"loss {loss:.3f}, expected about {exact:.3f}")
    return f"loss {loss:.3f}, float32's without training {exact:.3f}, 2 states saved"


def calibrate_then_dequantize(device: torch.device) -> str:
    exact = gradient(llama(device))
    model = quaff_fx.compile(llama(device, torch.bfloat16), quaff_fx.QuaffConfig(progress=False, activation_bits=8))
    quaff_fx.calibrate(model, [batch(model, 0), batch(model, 1)])
    first = expect_cosine("gradient of int8", gradient(model), exact, 0.99)
    quaff_fx.dequantize(model)
    expect(int8_weights(model) == 0, "a weight is still int8")
    return f"{first}, {expect_cosine('dequantized', gradient(model), exact, 0.99)}"


def save_and_load(device: torch.device) -> str:
    model = quantized(llama(device, torch.bfloat16))
    expected = gradient(model)
    with tempfile.TemporaryDirectory() as folder:
        quaff_fx.save_state(model, folder)
        loaded = quaff_fx.compile(
            llama(device, torch.bfloat16),
            quaff_fx.QuaffConfig(calibration_steps=CALIBRATION_STEPS, progress=False, activation_bits=8),
        )
        quaff_fx.load_state(loaded, folder)
    # Equal but for the order in which a card may add up what atomics add.
    return expect_cosine("gradient with that of before", gradient(loaded), expected, 0.9999)


def generate(device: torch.device) -> str:
    """Greedy tokens with a KV cache, each the best, or nearly, by a forward without one."""
    model = quantized(llama(device, torch.bfloat16)).eval()
    prompt = batch(model, 3, tokens=8)
    tokens = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expect(tokens.shape == (2, 13), f"shape {tuple(tokens.shape)}")
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits[:, 7:].float()
    chosen = logits.gather(2, tokens[:, 8:].unsqueeze(2)).squeeze(2)
    behind = float(((logits.amax(dim=2) - chosen) / logits.std()).max())
    expect(behind < 0.2, f"a token is {behind:.2f} standard deviations behind the best")
    return f"5 tokens, at most {behind:.3f} standard deviations behind the best"


def move_between_devices(device: torch.device) -> str:
    model = quantized(llama(device))
    expected = gradient(model)
    model.to(CPU)
    with torch.compiler.set_stance("force_eager"):
        there = expect_cosine("gradient on the CPU", gradient(model), expected, LEAST_COSINE_CPU)
    model.to(device)
    return f"{there}, {expect_cosine('back again', gradient(model), expected, 0.9999)}"


def no_recompiles(device: torch.device) -> str:
    """Four layers share their graphs, and later steps make no new ones."""
    model = quantized(llama(device, torch.bfloat16, layers=4))
    gradient(model)
    graphs = len(quaff_fx.graphs(model))
    for _ in range(3):
        gradient(model)
    expect(len(quaff_fx.graphs(model)) == graphs, f"{graphs} graphs became {len(quaff_fx.graphs(model))}")
    expect(graphs <= 4, f"{graphs} graphs for four equal layers")
    last = str(quaff_fx.explain(model)).splitlines()[-1]
    return f"{graphs} graphs; {last}"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "kernels in use": kernels_in_use,
    **EXACTNESS,
    **{name: partial(fidelity, mode) for name, mode in MODES.items()},
    "Conv1D": conv1d,
    "checkpointing": checkpointing,
    "GradScaler": grad_scaler,
    "Trainer": trainer,
    "calibrate and dequantize": calibrate_then_dequantize,
    "save and load": save_and_load,
    "generate": generate,
    "move between devices": move_between_devices,
    "no recompiles": no_recompiles,
}
"""Each returns what it found in words; it raises where something is wrong."""
