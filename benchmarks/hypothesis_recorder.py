"""What `hypothesis.py` records: the outlier channels that the first steps choose, and how they do in later ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.peers import OUTLIER_THRESHOLD, adapted_layers
from quaff_fx import numerics

RULES = ("absmax_rank", "mean_multiple")


@dataclass(frozen=True)
class Observation:
    """One row of the CSV; `hypothesis.py` says what it means.

    Attributes:
        channels: how many were chosen. hit_rate, previous_batch: NaN in a batch without outliers.
        noise: left without any channel moved out of the product. noise_chosen, noise_best: left without the chosen
            ones, and without those that this batch would choose.
        excess_chosen, excess_best: absmax over the median, summed over these channels.
    """

    seed: int
    step: int
    layer: int
    projections: str
    rule: str
    budget: float
    channels: int
    hit_rate: float
    previous_batch: float
    noise: float
    noise_chosen: float
    noise_best: float
    excess_chosen: float
    excess_best: float


@dataclass
class Batch:
    """What one batch shows of an input: absmax (K,) of its channels, and how many values of each are over 100 means."""

    absmax: Tensor
    large: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Batch:
        magnitude = x.abs()
        return cls(magnitude.amax(dim=0), (magnitude > OUTLIER_THRESHOLD * magnitude.mean()).sum(dim=0))

    def hits(self, rule: str, count: int) -> Tensor:
        return numerics.outlier_hits(self.absmax, count) if rule == "absmax_rank" else self.large

    def chosen(self, rule: str, count: int) -> Tensor:
        """Returns what this batch alone would choose."""
        return numerics.stable_outlier_channels(self.hits(rule, count), self.absmax, count)

    def outliers(self, rule: str, count: int) -> Tensor:
        """Returns the channels that are outliers in this batch, at most `count`."""
        chosen = self.chosen(rule, count)
        return chosen[self.hits(rule, count)[chosen] > 0]


@dataclass
class Input:
    """One activation that frozen linears read: what its calibration chose, and what was observed since."""

    seed: int
    layer: int
    projections: list[str]
    calibration: list[Batch] = field(default_factory=list)
    chosen: dict[tuple[str, float], Tensor] = field(default_factory=dict)
    last: Batch | None = None

    def choose(self, budgets: Iterable[float]) -> None:
        """Chooses the outlier channels for each rule and budget, as quaff_fx does at the end of its calibration."""
        absmax = torch.stack([batch.absmax for batch in self.calibration]).mean(dim=0)
        for rule in RULES:
            for budget in budgets:
                count = numerics.outlier_count(len(absmax), budget)
                hits = sum((batch.hits(rule, count).float() for batch in self.calibration), torch.zeros_like(absmax))
                self.chosen[rule, budget] = numerics.stable_outlier_channels(hits, absmax, count)

    def observe(self, x: Tensor, batch: Batch, step: int) -> Iterable[Observation]:
        """Yields how the chosen channels, and those of the last batch, do on x (T, K)."""
        assert self.last is not None
        excess = (batch.absmax - batch.absmax.median()).clamp(min=0)
        for (rule, budget), chosen in self.chosen.items():
            count = len(chosen)
            outliers, best = batch.outliers(rule, count), batch.chosen(rule, count)
            yield Observation(
                self.seed,
                step,
                self.layer,
                " ".join(self.projections),
                rule,
                budget,
                count,
                share_in(outliers, chosen),
                share_in(outliers, self.last.chosen(rule, count)),
                rounding_noise(x, chosen[:0]),
                rounding_noise(x, chosen),
                rounding_noise(x, best),
                excess[chosen].sum().item(),
                excess[best].sum().item(),
            )


def share_in(channels: Tensor, others: Tensor) -> float:
    """Returns the share of `channels` that is among the others; NaN without any."""
    return torch.isin(channels, others).double().mean().item()


def rounding_noise(x: Tensor, without: Tensor) -> float:
    """Returns the mean over tokens of max x_i² / |x|², i not in `without`; of x (T, K).

    To a constant, that is the rounding noise of per-token int8 over the signal when those channels leave the product.
    """
    energy = x.square()
    signal = energy.sum(dim=1)
    largest = energy.index_fill(1, without, 0).amax(dim=1)
    return (largest[signal > 0] / signal[signal > 0]).mean().item()


class Recorder:
    """Watches the inputs of all frozen linears under adapters, each once however many linears read it."""

    def __init__(self, model: nn.Module, seed: int, budgets: list[float], calibration_steps: int, every: int) -> None:
        self.seed, self.budgets, self.calibration_steps, self.every = seed, budgets, calibration_steps, every
        self.inputs: dict[nn.Module, Input] = {}
        self.observations: list[Observation] = []
        self.step = 0
        self.mask: Tensor | None = None
        self._previous: tuple[object, Input] | None = None
        names = {module: name for name, module in model.named_modules()}
        for layer in adapted_layers(model):
            base = layer.get_base_layer()
            base.register_forward_pre_hook(lambda module, x, name=names[layer]: self._see(module, name, x[0]))
        model.register_forward_pre_hook(self._start, with_kwargs=True)

    def finish_step(self, step: int) -> None:
        self.step = step + 1
        if self.step == self.calibration_steps:
            for seen in self.inputs.values():
                seen.choose(self.budgets)

    def _start(self, model: nn.Module, arguments: tuple[object, ...], batch: dict[str, Tensor]) -> None:
        self.mask = batch["attention_mask"].bool()
        self._previous = None

    @torch.no_grad()
    def _see(self, module: nn.Module, name: str, x: Tensor) -> None:
        previous, self._previous = self._previous, None
        if self.step == 0 and previous is not None and previous[0] is x:
            previous[1].projections.append(name.rpartition(".")[2])
            self._previous = previous
            return
        if self.step == 0:
            numbers = [int(part) for part in name.split(".") if part.isdecimal()]
            self.inputs[module] = Input(self.seed, numbers[0] if numbers else 0, [name.rpartition(".")[2]])
        if module not in self.inputs:
            return
        seen = self.inputs[module]
        self._previous = (x, seen)
        tokens = x.detach()[self.mask]
        batch = Batch.of(tokens)
        if self.step < self.calibration_steps:
            seen.calibration.append(batch)
        elif (self.step - self.calibration_steps) % self.every == 0:
            self.observations += seen.observe(tokens, batch, self.step)
        seen.last = batch
