"""Fine-tunes a language model with LoRA on word problems, its frozen weights in int8: the program to start from.

    python examples/finetune.py                   # SmolLM2-135M, some minutes on two CPU cores
    python examples/finetune.py --compare         # the same training in floating point as well, and a table
    python examples/finetune.py --model my/model  # any causal language model: a folder, or an id on a hub

The only line here that another training program lacks is the one with `quaff_fx.compile`.
"""

import argparse
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from measurements import Measurements, comparison_table, frozen_weight_bytes, measure_each
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import quaff_fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of the checkout, which holds workloads/

from workloads.memory import peak_memory_mib, reset_peak_memory
from workloads.smollm2 import DownloadError, load_model
from workloads.word_problems import (
    IGNORED_LABEL,
    Batch,
    held_out_batches,
    held_out_problems,
    prompt,
    training_batches,
)

LLAMA_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEASURED_PROBLEMS = 32  # for the held-out loss, rounded up to whole batches
SHOWN_PROBLEMS = 3
ANSWER_TOKENS = 128
STEPS_THAT_COMPILE = 2  # after the conversion: one compiles for sure, a second may
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended

METHODS = {"eager": ["--no-quaff"], "compiled": ["--no-quaff", "--compile-blocks"], "quaff_fx": []}


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    if options.compare:
        return compare(options, arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    try:
        base, tokenizer = load_model(options.model, getattr(torch, options.dtype))
    except (DownloadError, OSError, ValueError) as error:
        return complain(f"--model {options.model}: cannot be loaded. {error}")
    try:
        shape = (options.batch_size, options.max_tokens)
        batches = training_batches(tokenizer, options.steps, *shape, seed=options.seed)
        measured = held_out_batches(tokenizer, math.ceil(MEASURED_PROBLEMS / options.batch_size), *shape)
    except ValueError as error:
        return complain(str(error))

    torch.manual_seed(options.seed)  # the adapters start from random values
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=target_modules(base), task_type="CAUSAL_LM")
    model = get_peft_model(base.to(options.device), lora)
    if options.gradient_checkpointing:
        base.activation_checkpointing_enable()
    model.print_trainable_parameters()

    print("\nAnswers before training\n")
    print_answers(model, tokenizer)
    loss_before = held_out_loss(model, measured, "Held-out loss before")

    if options.compile_blocks:
        for block in blocks(model):
            block.compile()
    elif not options.no_quaff:
        config = quaff_fx.QuaffConfig(
            calibration_steps=options.calibration_steps,
            outlier_budget=options.outlier_budget,
            activation_bits=options.activation_bits,
        )
        model = quaff_fx.compile(model, config)  # the only line that quaff_fx needs; the config has defaults

    with StopRequest() as stop:
        seconds, peak_memory, steady_memory = train(model, batches, options, stop)
        model.save_pretrained(options.output)
    print(f"\nSaved the adapter to {options.output} after {len(seconds)} of {options.steps} steps")
    if stop.requested:
        return INTERRUPTED

    loss_after = held_out_loss(model, measured, "Held-out loss after")
    print("\nAnswers after training\n")
    # Plainly compiled blocks recompile for each layer's part of the key-value cache: minutes that measure nothing.
    with torch.compiler.set_stance("force_eager" if options.compile_blocks else "default"):
        print_answers(model, tokenizer)
    if not options.no_quaff:
        print(f"{quaff_fx.explain(model)}\n")

    step_seconds = statistics.median(seconds[timed_from(options) :])
    speed = options.batch_size * options.max_tokens / step_seconds
    print(f"Held-out loss: {loss_before:.3f} before, {loss_after:.3f} after {options.steps} steps")
    print(f"Median step: {step_seconds * 1000:.0f} ms, {speed:.0f} tokens/s; peak memory then: {steady_memory:.0f} MiB")
    if options.report:
        weight_bytes = frozen_weight_bytes(model)
        Measurements(step_seconds, speed, peak_memory, steady_memory, weight_bytes, loss_before, loss_after).save(
            options.report
        )
    return 0


def train(
    model: PeftModel, batches: list[Batch], options: argparse.Namespace, stop: "StopRequest"
) -> tuple[list[float], float, float]:
    """Returns the seconds of each step, and the peak memory in MiB over all steps and over the timed ones."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate)
    warm_up = max(1, len(batches) // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up + 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    seconds: list[float] = []
    memory_of_first_steps = 0.0
    model.train()
    reset_peak_memory()
    with tqdm(batches, desc="Training", unit="step") as bar:
        for step, batch in enumerate(bar):
            if step == timed_from(options):
                memory_of_first_steps = peak_memory_mib(model.device)
                reset_peak_memory()
            start = time.perf_counter()
            try:
                loss = model(**to_device(batch, model), use_cache=False).loss
                loss.backward()
            except Exception:
                # A terminal sends Ctrl-C to the C++ compiler of torch.compile too, and this step fails with it.
                if not stop.requested:
                    raise
                break
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            shown = f"{loss.item():.3f}"  # waits for a GPU to finish the step
            seconds.append(time.perf_counter() - start)
            bar.set_postfix(loss=shown, ms=f"{seconds[-1] * 1000:.0f}")
            if stop.requested:
                break
    steady_memory = peak_memory_mib(model.device)
    return seconds, max(memory_of_first_steps, steady_memory), steady_memory


def timed_from(options: argparse.Namespace) -> int:
    """Returns the first step whose time counts; the same for every method, so that all are timed on the same batches.

    quaff_fx observes the first steps in floating point. Then it converts the weights, and Inductor compiles the int8
    step: a pause of up to some minutes that belongs to no step. What counts is how training goes on from there.
    """
    return int(options.calibration_steps) + STEPS_THAT_COMPILE


@torch.no_grad()
def held_out_loss(model: PeftModel, batches: list[Batch], description: str) -> float:
    """Returns the mean loss in nats per token of the solutions."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in tqdm(batches, desc=description, unit="batch"):
        count = int((batch["labels"] != IGNORED_LABEL).sum())
        total += model(**to_device(batch, model), use_cache=False).loss.item() * count
        tokens += count
    return total / tokens


@torch.no_grad()
def print_answers(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints what the model answers greedily to a few held-out problems."""
    model.eval()
    problems = held_out_problems(SHOWN_PROBLEMS)
    prompts = tokenizer(
        [prompt(tokenizer, problem.question) for problem in problems],
        add_special_tokens=False,
        padding=True,
        padding_side="left",  # so that all answers start at the same position
        return_tensors="pt",
    )
    inputs = to_device({name: prompts[name] for name in ("input_ids", "attention_mask")}, model)
    output = model.generate(
        **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for number, (problem, answer) in enumerate(zip(problems, answers, strict=True), start=1):
        indented = answer.strip().replace("\n", "\n     ")
        print(f"  {number}. {problem.question}\n     Expected: {problem.answer}. Answered:\n     {indented}\n")


def to_device(batch: Batch, model: PeftModel) -> Batch:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def target_modules(model: nn.Module) -> list[str] | str:
    """Returns the seven projections of a Llama-like block, or peft's word for all linears but the head."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return LLAMA_PROJECTIONS if names.issuperset(LLAMA_PROJECTIONS) else "all-linear"


def blocks(model: nn.Module) -> nn.ModuleList:
    """Returns the repeated blocks of the model: its longest module list."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM only sets `requested`; a second one ends the program as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        print("\nStopping after this step; once more to stop now, without saving", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def compare(options: argparse.Namespace, arguments: list[str]) -> int:
    program = [sys.executable, __file__, *(word for word in arguments if word != "--compare")]
    results = measure_each(program, METHODS, options.output)
    if isinstance(results, int):
        return results
    print(f"\n{comparison_table(results)}\n")
    print(f"Median time and the last peak from step {timed_from(options) + 1} on, on {options.device}. The other peak")
    print("includes the float weights that quaff_fx holds while it calibrates. Tokens include padding.")
    return 0


def parse_options(arguments: list[str]) -> argparse.Namespace:
    title, _, text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--model", default="smollm2", help="folder or model id; smollm2, the default, comes from a wheel of 93 MB")
    add("--steps", type=whole(1), default=60, help="training steps, calibration included (default: %(default)s)")
    add("--batch-size", type=whole(1), default=2, help="problems in a step (default: %(default)s)")
    add("--max-tokens", type=whole(1), default=256, help="problems are padded to this, longer ones left out (256)")
    add("--learning-rate", type=between(0, 1), default=5e-4, help="highest rate, after warm-up (default: %(default)s)")
    add("--seed", type=whole(0), default=0, help="for the first adapter values and the problems (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations in backward: less memory, slower")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default=device, help=f"where to train (default here: {device})")
    add("--threads", type=whole(1), help="CPU threads (default: torch's own choice)")
    add("--output", type=Path, default=Path("adapter"), help="folder to save the adapter in (default: %(default)s)")
    add("--report", type=Path, metavar="FILE", help="write the measurements there as JSON")

    quaff = parser.add_argument_group("quaff_fx").add_argument
    quaff("--calibration-steps", type=whole(1), default=8, help="first steps, only observed (default: %(default)s)")
    quaff("--outlier-budget", type=between(0, 0.25), default=0.01, help="largest share of outlier channels (0.01)")
    quaff(
        "--activation-bits",
        type=lambda text: int(text) if text.isdecimal() else text,
        choices=("auto", 7, 8),
        default="auto",
        help="8 is more accurate, 7 faster on some CPUs; auto, the default, knows which these are",
    )

    others = parser.add_argument_group("without quaff_fx").add_argument
    others("--no-quaff", action="store_true", help="train in floating point")
    others("--compile-blocks", action="store_true", help="with --no-quaff: use torch.compile on each block")
    others("--compare", action="store_true", help=f"train in each way, then print a table: {', '.join(METHODS)}")

    options = parser.parse_args(arguments)
    if options.compare and (options.no_quaff or options.report):
        parser.error("argument --compare: expected neither --no-quaff nor --report beside it. Leave them out.")
    if options.compile_blocks and not options.no_quaff:
        parser.error("argument --compile-blocks: expected --no-quaff beside it, as quaff_fx compiles them itself.")
    if options.steps <= timed_from(options):
        parser.error(
            f"argument --steps: is {options.steps}, expected more than {timed_from(options)}: the first "
            f"{options.calibration_steps} calibrate and {STEPS_THAT_COMPILE} compile. "
            "Raise it or lower --calibration-steps."
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: is cuda, but torch sees no CUDA device here. Leave the option out.")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"argument --output: {options.output} is a file, expected a folder. Name another.")
    return options


def whole(low: int) -> Callable[[str], int]:
    """Returns a type for argparse: a whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected a whole number of at least {low}.")
        return int(text)

    return parse


def between(low: float, high: float) -> Callable[[str], float]:
    """Returns a type for argparse: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected a number between {low} and {high}.")
        return value

    return parse


def complain(message: str) -> int:
    print(f"finetune.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nInterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
