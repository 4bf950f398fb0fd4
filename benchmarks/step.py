"""A LoRA training step of quaff_fx beside other systems: time, memory, start-up and loss.

    python benchmarks/step.py                                  # two Llama blocks of a 1B model, 1 x 512 tokens
    python benchmarks/step.py --shape smollm2 --batch-size 4
    python benchmarks/step.py --systems float32 quaff_fx --profile "quaff_fx, 8 bits"

Each system runs in a process of its own, so peak memory is its own, and all take turns, so a change of the machine's
clock or load meets all alike. A step is forward, backward and AdamW on the adapters (r = 16 on all linears of the
blocks); no KV cache, the loss counts all tokens. Writes the table as CSV, and as a chart if matplotlib is there, into
runs/. Start-up counts from the float model to the end of the first real step: calibration, conversion and compilation
with empty caches.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):
    # What peers log at import and in every step would break the progress bar; not so where a test imports this file.
    logging.disable(logging.WARNING)

import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import peers  # noqa: E402
from examples import smollm2, word_problems  # noqa: E402
from examples.measurements import peak_memory_mib, reset_peak_memory  # noqa: E402
from quaff_fx.kernels import cpu, product  # noqa: E402

SIZES = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "vocab_size": 4096},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96},
}
BATCHES = 4
"""Every system sees these in turn, again and again, so that the loss falls."""

WARM_UP_STEPS = 3
"""After the first real one: compiled systems may compile once more."""


# --- what is measured ----------------------------------------------------------------------------------------------


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
    """A system is ready: seconds from the float model to the end of the first real step, and what it holds."""

    seconds: float
    frozen_bytes: int
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


@dataclass
class Record:
    """All of one system."""

    system: peers.System
    started: Started
    turns: list[Turn] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        return statistics.median(seconds for turn in self.turns for seconds in turn.steps)

    @property
    def fastest_seconds(self) -> float:
        return min(seconds for turn in self.turns for seconds in turn.steps)

    def part_seconds(self, part: str) -> float:
        return statistics.median(seconds for turn in self.turns for seconds in getattr(turn, part))

    def ratios(self, baseline: Record) -> list[float]:
        """How many times as fast as the baseline, in each round."""
        return [
            statistics.median(theirs.steps) / statistics.median(ours.steps)
            for ours, theirs in zip(self.turns, baseline.turns, strict=True)
        ]

    @property
    def gops(self) -> float:
        """Operations of the frozen linears in a step over the time of the whole step, in 1e9 per second."""
        return 2 * sum(linear.multiply_adds for linear in self.started.linears) / self.step_seconds / 1e9


# --- the model ---------------------------------------------------------------------------------------------------


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


# --- a worker: one system in its own process ---------------------------------------------------------------------


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
            connection.send(Started(seconds, peers.frozen_bytes(trainer.model), linears))
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


def measure(options: argparse.Namespace) -> tuple[list[Record], dict[str, str], dict[str, str]]:
    """Starts the systems one after another, then lets them take turns.

    Returns a record per system, the reason for each that is missing, and profiles by name.
    """
    records: list[Record] = []
    missing: dict[str, str] = {}
    profiles: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    systems = selected_systems(options)
    with contextlib.ExitStack() as stack:
        # The whole of the work is unknown: compiling takes seconds or minutes.
        bar = stack.enter_context(tqdm(total=len(systems) * (1 + options.rounds), unit="turn"))
        for system in systems:
            bar.set_description(f"Starting {system.name}")
            worker = Worker(system, options)
            stack.callback(worker.close)
            answer = worker.receive()
            if isinstance(answer, Failed):
                missing[system.name] = answer.reason
                bar.total -= options.rounds
            else:
                records.append(Record(system, answer))
                workers[system.name] = worker
            bar.update()
        for turn in range(options.rounds):
            # Each round starts with another system, so none is always behind the same one.
            first = turn % max(1, len(records))
            for record in records[first:] + records[:first]:
                bar.set_description(f"Round {turn + 1}, {record.system.name}")
                answer = workers[record.system.name].ask("turn", options.steps)
                if isinstance(answer, Failed):
                    missing[record.system.name] = answer.reason
                else:
                    record.turns.append(answer)
                bar.update()
            records = [record for record in records if record.system.name not in missing]
        for record in records:
            if record.system.name in options.profile:
                profiles[record.system.name] = workers[record.system.name].ask("profile", options.steps)
    return records, missing, profiles


# --- the roofline --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """What int8 products can reach here, in 1e9 operations per second, and what they and float32 need for a step."""

    peak_gops: float
    kernel_gops: float
    kernel_seconds: float
    float32_seconds: float


def int8_roofline(
    connection: Connection, linears: tuple[Linear, ...], activation_maxes: tuple[int, ...], threads: int
) -> None:
    """Sends a `Roofline` per activation_max: the bare products of one step, forward and backward."""
    # That program reads its options when it is imported.
    sys.argv = ["int8_product.py", "--threads", str(threads), "--repeats", "5"]
    from benchmarks import int8_product

    torch.set_num_threads(threads)
    forward = Counter((linear.out_features, linear.in_features, linear.tokens) for linear in linears)
    backward = Counter(
        (linear.out_features, linear.in_features, linear.tokens) for linear in linears if linear.has_backward
    )
    seconds: Counter[str] = Counter()
    for n, k, tokens in forward:
        for _, _, direction, name, milliseconds, *_ in int8_product.product_rows(["native"], n, k, tokens):
            times = (forward if direction == "forward" else backward)[n, k, tokens]
            seconds[str(name)] += times * float(str(milliseconds)) / 1e3  # type: ignore[assignment]
    operations = 2 * sum(linear.multiply_adds for linear in linears)
    connection.send(
        {
            q: Roofline(
                int8_product.peak("native", q) * threads / 1e9,
                operations / seconds[f"native, Q={q}"] / 1e9,
                seconds[f"native, Q={q}"],
                seconds["float32"],
            )
            for q in activation_maxes
        }
    )


def rooflines(records: list[Record], options: argparse.Namespace) -> dict[int, Roofline]:
    """Returns a roofline per activation_max of the measured systems; none on CUDA or without the compiled kernel."""
    wanted = tuple(sorted({r.system.activation_max for r in records if r.system.activation_max}))
    if not wanted or options.device != "cpu" or cpu.reason_unavailable() is not None:
        return {}
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    threads = options.threads or torch.get_num_threads()
    process = context.Process(target=int8_roofline, args=(far, records[0].started.linears, wanted, threads))
    process.start()
    far.close()
    try:
        result: dict[int, Roofline] = near.recv()
    except EOFError:
        return {}
    finally:
        process.join()
    return result


# --- results -----------------------------------------------------------------------------------------------------


def best_float32(records: list[Record]) -> Record | None:
    return min((r for r in records if r.system.is_float32), key=lambda r: r.step_seconds, default=None)


def table_rows(records: list[Record], tokens: int) -> list[dict[str, Any]]:
    """Returns a row per system, with numbers as they are."""
    baseline = best_float32(records)
    rows = []
    for record in records:
        ratios = record.ratios(baseline) if baseline else [float("nan")]
        rows.append(
            {
                "system": record.system.name,
                "step ms": record.step_seconds * 1e3,
                "fastest ms": record.fastest_seconds * 1e3,
                "forward ms": record.part_seconds("forward") * 1e3,
                "backward ms": record.part_seconds("backward") * 1e3,
                "optimizer ms": record.part_seconds("optimizer") * 1e3,
                "tokens/s": tokens / record.step_seconds,
                "times as fast as best float32": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "peak MiB": max(turn.peak_mib for turn in record.turns),
                "frozen MiB": record.started.frozen_bytes / 2**20,
                "start-up s": record.started.seconds,
                "loss after": record.turns[-1].loss,
            }
        )
    return rows


def printed_table(rows: list[dict[str, Any]]) -> str:
    shown = [
        {
            "system": row["system"],
            "step\nms": f"{row['step ms']:.0f}",
            "fastest\nms": f"{row['fastest ms']:.0f}",
            "forward\nms": f"{row['forward ms']:.0f}",
            "backward\nms": f"{row['backward ms']:.0f}",
            "AdamW\nms": f"{row['optimizer ms']:.0f}",
            "tokens/s": f"{row['tokens/s']:.0f}",
            "times as fast as\nbest float32": f"{row['times as fast as best float32']:.2f} "
            f"({row['lowest']:.2f}-{row['highest']:.2f})",
            "peak\nMiB": f"{row['peak MiB']:.0f}",
            "frozen\nMiB": f"{row['frozen MiB']:.1f}",
            "start-up\ns": f"{row['start-up s']:.1f}",
            "loss\nafter": f"{row['loss after']:.4f}",
        }
        for row in rows
    ]
    return tabulate(shown, headers="keys", disable_numparse=True, colalign=("left", *["right"] * 11))


def footer(
    records: list[Record], missing: dict[str, str], roofs: dict[int, Roofline], options: argparse.Namespace
) -> str:
    """Returns what one must know to read the table, line by line."""
    lines = [f"{options.shape}, {options.batch_size} x {options.tokens} tokens on {device_name(options)}"]
    steps = 2 + WARM_UP_STEPS + options.rounds * options.steps
    baseline = best_float32(records)
    lines.append(
        f"Medians of {options.rounds} rounds of {options.steps} steps in turns; a step includes AdamW on the adapters. "
        f"Loss at step {steps}, the same batches in every system."
    )
    if baseline:
        lines.append(
            f"Ratios to {baseline.system.name}: median, lowest and highest round. Peak memory is the whole process, "
            "Python and torch included; frozen is what lies under the adapters."
        )
    if options.keep_cache:
        lines.append("Start-up with whatever the cache of compiled code held (--keep-cache).")
    idle = max((turn.idle_cpu_seconds for record in records for turn in record.turns[1:]), default=0.0)
    lines.append(f"Waiting systems used at most {idle * 1e3:.0f} ms of CPU time between two turns.")
    with contextlib.suppress(OSError):
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > cores + 1:
            lines.append(
                f"The load was {load:.1f} on {cores} cores at the end: others computed too. The fastest step and the "
                "ratios then say more than the medians."
            )
    for record in records:
        roof = roofs.get(record.system.activation_max or 0)
        if roof:
            lines.append(
                f"{record.system.name}: {record.gops:.0f} GOPS of int8 over the whole step; its products alone reach "
                f"{roof.kernel_gops:.0f} of {roof.peak_gops:.0f} GOPS in registers and take "
                f"{roof.kernel_seconds * 1e3:.0f} ms of a step (in float32 {roof.float32_seconds * 1e3:.0f} ms)."
            )
    lines += [f"Not run: {name}: {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


def device_name(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        model = Path("/proc/cpuinfo").read_text().split("model name")[1].split(":")[1].split("\n")[0].strip()
    threads = options.threads or torch.get_num_threads()
    kernel = product.describe(torch.device("cpu"))
    return f"{model}, {threads} threads, int8 products: {kernel}, torch {torch.__version__}"


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_chart(rows: list[dict[str, Any]], title: str, path: Path) -> str | None:
    """Draws the parts of each system's step as a bar; returns why not, if it cannot."""
    try:
        import matplotlib
    except ImportError:
        return "no chart: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda row: row["step ms"], reverse=True)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    names = [row["system"] for row in rows]
    left = [0.0] * len(rows)
    for part, color in (("forward", "#4477aa"), ("backward", "#88aacc"), ("optimizer", "#bbbbbb")):
        widths = [row[f"{part} ms"] for row in rows]
        axes.barh(names, widths, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, end, row in zip(names, left, rows, strict=True):
        axes.annotate(f" {row['times as fast as best float32']:.2f}×", (end, name), va="center")
    axes.set(title=title, xlabel="ms per training step; × is the speed over the best float32")
    axes.margins(x=0.12)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None


# --- the command -------------------------------------------------------------------------------------------------


def selected_systems(options: argparse.Namespace) -> list[peers.System]:
    """All, or those with one of the words in their name; a word that is a whole name means that system alone."""
    names = [system.name for system in peers.SYSTEMS]
    wanted = {
        name
        for word in options.systems or names
        for name in ([word] if word in names else [name for name in names if word in name])
    }
    return [system for system in peers.SYSTEMS if system.name in wanted]


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=("llama-1b", "smollm2", "tiny"), default="llama-1b", help="(default: %(default)s)")
    add("--layers", type=int, default=2, help="blocks of llama-1b and tiny (default: %(default)s)")
    add("--batch-size", type=int, default=1, help="(default: %(default)s)")
    add("--tokens", type=int, default=512, help="in a sequence (default: %(default)s)")
    add("--rounds", type=int, default=5, help="turns of each system (default: %(default)s)")
    add("--steps", type=int, default=2, help="steps in a turn (default: %(default)s)")
    add("--systems", nargs="+", metavar="WORDS", help="only those with one of these in their name, or these")
    add("--profile", nargs="+", metavar="NAME", default=[], help="print the ops of these systems after the table")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--output", type=Path, default=ROOT / "runs", help="folder for CSV and chart (default: runs/)")
    add(
        "--keep-cache", action="store_true", help="compile into the usual cache: a faster start, which then says little"
    )
    add("--verbose", action="store_true", help="print where a system failed")
    options = parser.parse_args(arguments)
    for name in ("layers", "batch_size", "tokens", "rounds", "steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: is {value}, expected at least 1.")
    if not selected_systems(options):
        names = ", ".join(repr(system.name) for system in peers.SYSTEMS)
        parser.error(f"argument --systems: {' '.join(options.systems)} matches none, expected part of one of {names}.")
    for name in options.profile:
        if name not in [system.name for system in selected_systems(options)]:
            parser.error(f"argument --profile: {name!r} is not measured, expected the whole name of a system.")
    return options


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    if options.shape == "smollm2":
        smollm2.fetch_smollm2()  # here, where its progress shows, and not in each worker
    records, missing, profiles = measure(options)
    if not records:
        print("\n".join(f"Not run: {name}: {reason}" for name, reason in missing.items()))
        return 1
    rows = table_rows(records, options.batch_size * options.tokens)
    text = f"{printed_table(rows)}\n\n{footer(records, missing, rooflines(records, options), options)}"
    print(f"\n{text}")
    for name, profile in profiles.items():
        print(f"\n{name}, {profile}")
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"step-{options.shape}-{options.batch_size}x{options.tokens}"
    write_csv(rows, stem.with_suffix(".csv"))
    title = f"LoRA training step, {options.shape}, {options.batch_size} × {options.tokens} tokens"
    reason = write_chart(rows, title, stem.with_suffix(".png"))
    print(f"\nWritten: {stem}.csv{f'; {reason}' if reason else ' and .png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
