"""Does it hold that outliers stay where they are? The channels chosen at the start, along a fine-tuning in float32.

    python benchmarks/hypothesis.py                          # SmolLM2-135M, about six minutes on two cores
    python benchmarks/hypothesis.py --seeds 0 --steps 200 --every 20 --budgets 0.01 0.03

The outlier spatial stability hypothesis of Quaff: the outlier channels found before fine-tuning are those that are
outliers along it. The first steps choose the channels, as quaff_fx does; later ones are compared with what they show.
For each input of a frozen linear, step, rule and budget:

    hit rate         share of a batch's own outlier channels that were chosen. Under "absmax_rank" they are its largest
                     channels, as many as the budget allows; under "mean_multiple" those with values over 100 × mean
    previous batch   share of them that the batch before would have chosen: how much batches differ without training
    noise saved      of the rounding noise of int8 that this batch's own channels would remove, the share that the
                     chosen ones remove; counting calls a channel missed that is a hair below the next, this does not
    noise left       rounding noise without the chosen channels, over that without any choice
    excess           what the chosen channels have above the median absmax, over what the batch's own have
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path

if __name__ == "__main__":
    logging.disable(logging.WARNING)  # what libraries log at import would break the progress bar

import torch
from tabulate import tabulate
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import tasks  # noqa: E402
from benchmarks.accuracy.methods import ADAPTERS, adapted  # noqa: E402
from benchmarks.hypothesis_recorder import RULES, Observation, Recorder  # noqa: E402
from workloads import smollm2, word_problems  # noqa: E402


def observations_of(options: argparse.Namespace) -> list[Observation]:
    """Fine-tunes in float32, once for each seed, and returns all that was observed."""
    found = []
    sizes = (options.batch_size, options.max_tokens)
    for seed in tqdm(options.seeds, unit="seed"):
        model, tokenizer = smollm2.load_model(options.model)
        batches = word_problems.training_batches(tokenizer, options.steps, *sizes, seed=seed)
        model = adapted(model, "LoRA", seed)
        recorder = Recorder(model, seed, options.budgets, options.calibration_steps, options.every)
        tasks.train(model, batches, ADAPTERS["LoRA"].learning_rate, recorder.finish_step)
        found += recorder.observations
    return found


# --- results ---------------------------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    """Returns the mean of those that are numbers, NaN if none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.fmean(numbers) if numbers else math.nan


def ratio(
    group: list[Observation], above: Callable[[Observation], float], below: Callable[[Observation], float]
) -> float:
    """Returns the ratio of two sums, NaN over nothing: a mean of ratios would be that of the smallest layers."""
    whole = sum(map(below, group))
    return sum(map(above, group)) / whole if whole > 0 else math.nan


MEASURES: dict[str, Callable[[list[Observation]], float]] = {
    "hit rate": lambda group: mean(one.hit_rate for one in group),
    "previous batch": lambda group: mean(one.previous_batch for one in group),
    "noise saved": lambda group: ratio(
        group, lambda one: one.noise - one.noise_chosen, lambda one: one.noise - one.noise_best
    ),
    "noise left": lambda group: ratio(group, lambda one: one.noise_chosen, lambda one: one.noise),
    "excess": lambda group: ratio(group, lambda one: one.excess_chosen, lambda one: one.excess_best),
    "have outliers": lambda group: mean(float(not math.isnan(one.hit_rate)) for one in group),
}
"""Each over any set of observations."""


def summary(observations: list[Observation]) -> str:
    """Returns a table by projection, rule and budget, over layers, steps and seeds; and the hit rate of the ends."""
    groups: dict[tuple[str, str, float], list[Observation]] = defaultdict(list)
    for one in observations:
        groups[one.projections, one.rule, one.budget].append(one)
    lines = []
    for (projections, rule, budget), group in sorted(groups.items()):
        steps = sorted({one.step for one in group})
        ends = [mean(one.hit_rate for one in group if one.step == step) for step in (steps[0], steps[-1])]
        by_seed = [mean(one.hit_rate for one in group if one.seed == seed) for seed in {one.seed for one in group}]
        numbers = [*ends, min(by_seed), max(by_seed), *(measure(group) for measure in MEASURES.values())]
        texts = ["none" if math.isnan(number) else f"{number:.3f}" for number in numbers]
        lines.append([projections, rule, f"{budget:.1%}", f"{group[0].channels}", *texts])
    headers = [
        "input of",
        "rule",
        "budget",
        "channels",
        "first step",
        "last step",
        "lowest seed",
        "highest seed",
        *MEASURES,
    ]
    headers = [header.replace(" ", "\n") for header in headers]
    return tabulate(lines, headers=headers, disable_numparse=True)


def write_csv(observations: list[Observation], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(Observation)])
        writer.writeheader()
        writer.writerows(asdict(one) for one in observations)


def write_chart(observations: list[Observation], budget: float, path: Path) -> str | None:
    """Draws hit rate, ceiling and saved noise along training at one budget; returns why not, if it cannot."""
    try:
        import matplotlib
    except ImportError:
        return "no chart: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [one for one in observations if one.budget == budget]
    names = list(dict.fromkeys(one.projections for one in shown))
    steps = sorted({one.step for one in shown})
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), sharex=True, sharey=True, layout="constrained")
    for row, rule in zip(axes, RULES, strict=True):
        for plot, measure in zip(row, ("hit rate", "previous batch", "noise saved"), strict=True):
            for name in names:
                group = [one for one in shown if (one.projections, one.rule) == (name, rule)]
                means = [MEASURES[measure]([one for one in group if one.step == step]) for step in steps]
                plot.plot(steps, means, marker=".", label=name)
            plot.set(title=f"{rule}: {measure}", xlabel="step", ylim=(-0.02, 1.1))
    axes[0][0].legend(fontsize="small")
    figure.suptitle(f"Outlier channels chosen at the start, along fine-tuning; budget {budget:.1%}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="smollm2", help="folder or model id (default: SmolLM2-135M-Instruct, from a wheel)")
    add("--steps", type=int, default=48, help="of fine-tuning, calibration included (default: %(default)s)")
    add("--calibration-steps", type=int, default=8, help="first steps, which choose (default: %(default)s)")
    add("--every", type=int, default=4, help="steps between two observations (default: %(default)s)")
    add("--budgets", nargs="+", type=float, default=[0.005, 0.01, 0.03, 0.05], help="(default: 0.005 0.01 0.03 0.05)")
    add("--batch-size", type=int, default=2, help="problems in a step (default: %(default)s)")
    add("--max-tokens", type=int, default=192, help="tokens in a problem (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of adapter and training data (default: 0 1 2)")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--output", type=Path, default=ROOT / "runs", help="folder for CSV and chart (default: runs/)")
    options = parser.parse_args(arguments)
    for name in ("steps", "calibration_steps", "every", "batch_size", "max_tokens", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: is {value}, expected at least 1.")
    if options.steps <= options.calibration_steps:
        parser.error(f"argument --steps: is {options.steps}, expected more than the steps that calibrate.")
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        parser.error(f"argument --seeds: is {options.seeds}, expected different numbers of 0 or more.")
    if not all(0 < budget <= 1 for budget in options.budgets):
        parser.error(f"argument --budgets: is {options.budgets}, expected shares above 0 and at most 1.")
    return options


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    disable_progress_bar()
    observations = observations_of(options)
    print(f"\n{summary(observations)}\n\nOver all layers, observed steps and seeds. In front: hit rates.")
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "hypothesis"
    write_csv(observations, stem.with_suffix(".csv"))
    budget = min(options.budgets, key=lambda budget: abs(budget - 0.03))
    reason = write_chart(observations, budget, stem.with_suffix(".png"))
    print(f"\nWritten: {stem}.csv{f'; {reason}' if reason else ' and .png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
