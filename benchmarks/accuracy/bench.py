"""What is to be measured, and the measuring: which results need which model, and each of them."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn

from benchmarks.accuracy import methods, tasks
from benchmarks.accuracy.methods import ABLATIONS, ADAPTERS, METHODS, Method
from benchmarks.accuracy.results import Cell, Store
from benchmarks.accuracy.tasks import Material, Measures, Sizes
from workloads import smollm2

STAGES = ("before", "after", "injected", "adapters")
TASKS = ("words", "shakespeare", "choices", "gradient", "answers")
INJECTED_FACTORS = (100, 1000)


@dataclass(frozen=True)
class Group:
    """The cells that need one and the same model, in the order in which it gives them."""

    method: Method
    cells: tuple[Cell, ...]


def planned(options: argparse.Namespace) -> list[Group]:
    """Returns everything to measure: all methods with one seed, then with the next."""
    found = []
    for seed in options.seeds:
        for method in selected_methods(options):
            for bits in method.bits:
                found += groups_of_row(method, bits, seed, options)
    return [group for group in found if group.cells]


def groups_of_row(method: Method, bits: int, seed: int, options: argparse.Namespace) -> Iterator[Group]:
    """Yields the groups of a row of the table with one seed."""

    def cells(adapter: str, stage: str, names: Iterable[str]) -> tuple[Cell, ...]:
        return tuple(Cell(method.name, bits, adapter, seed, stage, name) for name in names)

    chosen = [task for task in TASKS if task in options.tasks]
    before = [task for task in chosen if task != "answers" and (task, method.name) != ("gradient", "float32")]
    after = [task for task in chosen if task not in ("gradient", "answers")]
    if "answers" in chosen and options.answers:
        after.append(f"answers {options.answers}")
    wanted: tuple[Cell, ...] = ()
    if "before" in options.stages:
        wanted += cells("LoRA", "before", before)
    if "after" in options.stages:
        wanted += cells("LoRA", "after", ["training", *after])
    yield Group(method, wanted)
    if "injected" in options.stages and method.is_stressed and bits == min(method.bits):
        for factor in INJECTED_FACTORS:
            yield Group(method, cells("LoRA", f"injected {factor}", ["words"]))
    if "adapters" in options.stages and method.is_adapted:
        for adapter in ADAPTERS:
            if adapter != "LoRA":
                before_and_after = cells(adapter, "before", ["words"]) + cells(adapter, "after", ["training", "words"])
                yield Group(method, before_and_after)


def stored(options: argparse.Namespace, store: Store) -> list[Group]:
    """Returns everything that was measured before with these options, in the order of the methods."""
    answers = f"answers {options.answers}"
    cells = [cell for cell in store.cells() if cell.task == answers or not cell.task.startswith("answers")]
    return [
        Group(method, tuple(cell for cell in cells if (cell.method, cell.bits) == (method.name, bits)))
        for method in methods_of(options)
        for bits in method.bits
    ]


def methods_of(options: argparse.Namespace) -> tuple[Method, ...]:
    """Returns the methods that `--methods` chooses from."""
    return ABLATIONS if options.ablations else METHODS


def selected_methods(options: argparse.Namespace) -> list[Method]:
    """All, or those with one of the words in their name; a whole name means that method alone."""
    known = methods_of(options)
    if not options.methods:
        return list(known)
    names = [method.name for method in known]
    wanted = {
        name
        for word in ["float32", *options.methods]
        for name in ([word] if word in names else [name for name in names if word in name])
    }
    return [method for method in known if method.name in wanted]


def sizes(options: argparse.Namespace) -> Sizes:
    return Sizes(
        options.max_tokens,
        options.batch_size,
        options.steps,
        options.words,
        options.windows,
        options.choices,
    )


class Bench:
    """Measures groups on models that it loads and prepares anew for each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        _, tokenizer = smollm2.load_model(options.model)
        self.material = Material(tokenizer, sizes(options), is_validation=options.ablations)
        self.float_gradients = cache(self._float_gradients)

    def measure(self, group: Group, missing: set[Cell]) -> Iterator[tuple[Cell, Measures]]:
        """Yields each missing cell of a group as soon as it is measured."""
        gc.collect()  # compiled models are held in cycles
        first = group.cells[0]
        material = self.material
        model = self._adapted(first)
        model = group.method.prepare(model, first.bits, material.calibration(first.seed)).eval()
        if group.method.is_compiled and self.options.eager:
            methods.without_compiler(model)
        is_trained = False
        for cell in group.cells:
            if (
                cell.stage == "after"
                and not is_trained
                and missing.intersection(group.cells[group.cells.index(cell) :])
            ):
                curve = tasks.train(model, material.training(cell.seed), ADAPTERS[cell.adapter].learning_rate)
                is_trained = True
            if cell in missing:
                yield cell, curve if cell.task == "training" else self._measure_task(cell, model)

    def _measure_task(self, cell: Cell, model: nn.Module) -> Measures:
        material, tokenizer = self.material, self.material.tokenizer
        if cell.task == "gradient":
            expected = self.float_gradients(cell.seed)
            return tasks.gradient_distance(self._gradients(model, cell.seed), expected)
        measured: dict[str, Callable[[], Measures]] = {
            "words": lambda: tasks.losses(model, material.words),
            "shakespeare": lambda: tasks.losses(model, material.shakespeare),
            "choices": lambda: tasks.choices(model, tokenizer, material.questions),
            "answers": lambda: tasks.answers(model, tokenizer, self.options.answers, 4 * self.options.batch_size),
        }
        return measured[cell.task.partition(" ")[0]]()

    def _adapted(self, cell: Cell) -> nn.Module:
        model, _ = smollm2.load_model(self.options.model)
        if cell.stage.startswith("injected"):
            methods.inject_outliers(model, float(cell.stage.split()[1]), cell.seed)
        return methods.adapted(model, cell.adapter, cell.seed)

    def _gradients(self, model: nn.Module, seed: int) -> list[Tensor]:
        methods.randomize_lora(model, seed)
        found = tasks.gradients(model, self.material.training(seed)[: tasks.GRADIENT_BATCHES])
        methods.clear_lora(model)
        return found

    def _float_gradients(self, seed: int) -> list[Tensor]:
        return self._gradients(self._adapted(Cell("float32", 32, "LoRA", seed, "before", "gradient")), seed)
