"""The way of a compiled model through its stages: observe for some training steps, convert, then quantized."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from quaff_fx import calls, convert, heads, hosts
from quaff_fx.backend import Graph, QuantizeBackend
from quaff_fx.config import QuaffConfig
from quaff_fx.convert import Plan
from quaff_fx.errors import CalibrationError, WeightError
from quaff_fx.forwards import Awaited, Forwards, is_in_backward
from quaff_fx.notices import Notices
from quaff_fx.observe import Observer, Statistics
from quaff_fx.sites import Site, callers_of
from quaff_fx.weights import QuantizedWeight, owners

ATTRIBUTE = "_quaff"
"""A compiled model, and all modules between it and its blocks, carry its `Stages` under this name."""


@dataclass(frozen=True)
class Calibration:
    """What the calibration steps have seen. Replaced as a whole, so that nothing can interrupt it half done.

    Attributes:
        steps: how many were counted. statistics: of each observed site, by weight name.
        multiply_adds: of each matrix that a linear multiplied by, over all steps, by weight name.
    """

    steps: int = 0
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    multiply_adds: Mapping[str, int] = field(default_factory=dict)


class Stages:
    """Counts the training steps of a compiled model and does between them what no graph may do.

    A *forward* is the outermost call, in a thread, of the model or of any module through which it reaches its blocks;
    or calls of the blocks alone, until one comes again. A *step* is a forward with gradients whose backward runs to its
    end, whatever the mode of the model. Until the backward of every forward of before has run, or can run no more,
    nothing is changed that a replay of it would read: only then smoothing scales are committed, and weights are
    converted by the next forward of any kind in the thread that trains.

    Attributes:
        model: the root. config: its config. sites: every weight matrix, with the reason of those left alone.
        blocks: the modules compiled in place; the root alone if it is compiled whole.
        callers: the root, and the modules through which it reaches its blocks.
        stage: ``"observe"`` or ``"quantize"``. calibration: what was observed. graphs: what was captured.
        mode_before_calibrate: the model's ``training`` before a call of `calibrate` that has not come to its end.
    """

    def __init__(self, model: nn.Module, config: QuaffConfig, sites: list[Site], blocks: list[nn.Module]) -> None:
        self.model = model
        self.config = config
        self.sites = sites
        self.blocks = blocks
        self.callers = callers_of(model, blocks)
        self.stage = "observe"
        self.calibration = Calibration()
        self.mode_before_calibrate: bool | None = None
        self._plan: tuple[Plan, Calibration] | None = None
        self._begin()

    def _begin(self) -> None:
        """Makes what belongs to this process and to this model alone, not to a copy."""
        self.graphs: list[Graph] = []
        self._forwards = Forwards()
        self._notices = Notices(self.model)
        self._compiled: Callable[..., Any] | None = None
        self._int8: list[tuple[str, QuantizedWeight]] = []
        self._bar: tqdm[Any] | None = None
        self._followers: weakref.WeakSet[Stages] = weakref.WeakSet()

    @property
    def steps(self) -> int:
        """Calibration steps done."""
        return self.calibration.steps

    @property
    def is_converting(self) -> bool:
        """Whether a conversion was interrupted, which `settle` goes on with."""
        return self._plan is not None

    def active_sites(self) -> list[Site]:
        """The sites that are observed or quantized."""
        return [site for site in self.sites if not site.reason]

    # --- calls ------------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # where `torch.compile` was put around the model
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call of the model, or of a module between it and its blocks."""
        if self._forwards.is_inside or is_in_backward():
            return calls.call_itself(module, args, kwargs)
        hosts.guard_peft()  # here too: PEFT may be imported after `compile`
        self._forwards.loose = None
        self.settle()
        is_training = self.model.training and torch.is_grad_enabled()
        kv_cache = hosts.without_kv_cache(self.model) if is_training or "labels" in kwargs else contextlib.nullcontext()
        with self._forwards.entered(), hosts.without_mha_fastpath(self.model), kv_cache:
            if not torch.is_grad_enabled() or not (self.stage == "observe" or self._is_committing):
                return calls.call_itself(module, args, kwargs)
            observer = self._observer()
            with observer or contextlib.nullcontext():
                result = calls.call_itself(module, args, kwargs)
            self._await_backward(result, observer)
            return result

    def run_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a block's forward: compiled, or eagerly where a graph would do other things than the block's code."""
        if not (self._forwards.is_inside or is_in_backward()):
            return self._run_loose(block, args, kwargs)
        # A cache is indexed by the layer, so each layer would compile graphs of its own. Eager products are int8 as
        # well (`Int8Weight`), and one token is bound by reading the weights.
        is_generating = not torch.is_grad_enabled() and hosts.has_kv_cache((*args, *kwargs.values()))
        if self._compiled is None or is_generating:
            return block.quaff_forward(*args, **kwargs)  # type: ignore[operator]
        if (hooked := calls.hooked_module(block)) is not None:
            self._notices.block_was_hooked(block, hooked)
            return block.quaff_forward(*args, **kwargs)  # type: ignore[operator]
        result = self._compiled(block, args, kwargs)
        if not self.graphs:
            self._notices.block_was_untraced(block)
        return result

    def _run_loose(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a block that is called on its own, by code that calls none of the modules around it."""
        has_grad = torch.is_grad_enabled()
        loose: _Loose | None = self._forwards.loose
        if loose is None or id(block) in loose.blocks or loose.has_grad != has_grad:
            self._forwards.loose = None
            self.settle()
            is_awaiting = has_grad and (self.stage == "observe" or self._is_committing)
            loose = _Loose(has_grad, is_awaiting, self._observer() if is_awaiting else None)
            self._forwards.loose = loose
        loose.blocks.add(id(block))
        with self._forwards.entered(), loose.observer or contextlib.nullcontext():
            result = self.run_block(block, args, kwargs)
        if loose.is_awaiting:
            awaited = loose.awaited() if loose.awaited is not None else None
            if awaited is not None:
                awaited.watch(result)
            elif (awaited := self._await_backward(result, loose.observer)) is not None:
                loose.awaited = weakref.ref(awaited)
        return result

    # --- observe ----------------------------------------------------------------------------------------------------

    def observe_now(self, forward: Callable[[], Any]) -> None:
        """Runs `forward`, which calls the model in whatever way, and counts it as a step at once.

        Raises:
            CalibrationError: an activation was not finite, or no weight was read; the step does not count.
        """
        observer = self._observer()
        assert observer is not None
        with self._forwards.entered(), hosts.without_mha_fastpath(self.model), observer:
            forward()
        self._check(observer)
        self._count(observer, show=False)

    def _observer(self) -> Observer | None:
        """Returns what watches one forward, None if nothing is observed any more."""
        if self.stage != "observe":
            return None
        if not self.steps:
            self._notices.recurrent_modules(self.blocks)
        self._leave_what_cannot_be_observed()
        convert.check_whole(self.active_sites())
        return Observer(self.sites, self._threshold())

    def _leave_what_cannot_be_observed(self) -> None:
        for site in self.active_sites():
            site.reason = site.weight.reason_not_observable()

    def _check(self, observer: Observer) -> None:
        """Raises `CalibrationError`, or warns, if a forward has not observed what it should."""
        observer.check_finite(self.steps + 1)
        if self.steps or any(seen.absmax is not None for seen in observer.seen.values()):
            return
        if not observer.seen:
            raise CalibrationError(
                "forward: read none of the frozen weights, expected all. The step does not count. Call the model that "
                "was given to compile, or check which modules its forward runs."
            )
        readers = sorted({reader for seen in observer.seen.values() for reader in seen.readers})
        self._notices.nothing_was_read(len(self.active_sites()), readers)

    def _await_backward(self, result: Any, observer: Observer | None) -> Awaited | None:
        """Counts a forward as a step when its backward has run; None if it can have none."""
        if observer is None:
            return self._forwards.await_backward(result, lambda: None)
        self._check(observer)
        awaited = self._forwards.await_backward(result, lambda: self._count(observer, show=True))
        self._notices.forward_was_observed(self.steps, self.config.calibration_steps, self._forwards.awaited)
        return awaited

    @torch.inference_mode(False)
    @torch.no_grad()
    def _count(self, observer: Observer, show: bool) -> None:
        """Folds what `observer` saw into the statistics, as one step."""
        if self.stage != "observe" or self.is_converting:  # converted before its backward
            return
        before = self.calibration
        statistics = {}
        for site in self.active_sites():
            name, seen = site.weight_name, observer.seen.get(site.weight_name)
            so_far = before.statistics.get(name) or Statistics.none(site)
            hits = convert.hit_count(site, seen, self.config) if seen is not None else 0
            statistics[name] = so_far.with_step(seen, hits, self._threshold())
        counts = (before.multiply_adds, observer.multiply_adds)
        names = sorted({name for count in counts for name in count})
        multiply_adds = {name: sum(count.get(name, 0) for count in counts) for name in names}
        self._notices.step_was_counted()
        if show:
            self._show_progress()
        self.calibration = Calibration(before.steps + 1, statistics, multiply_adds)

    def _threshold(self) -> float:
        return self.config.outlier_threshold if self.config.outlier_rule == "mean_multiple" else 0.0

    def _show_progress(self) -> None:
        """Shows that one more step is done."""
        total, done = self.config.calibration_steps, self.steps + 1
        if self._bar is None:
            name = "quaff_fx: calibrating"
            self._bar = tqdm(total=total, initial=self.steps, desc=name, disable=not self.config.progress, leave=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # --- between steps ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Does what is due before a forward: goes on with a conversion that was interrupted, or converts, or commits.

        Raises:
            WeightError: an int8 weight was edited, or is to be trained.
        """
        if self.is_converting:
            self.convert()
        elif self.stage == "observe":
            is_trainer = self._forwards.trainer in (None, threading.get_ident())
            if self.steps >= self.config.calibration_steps and is_trainer and not self._forwards.awaited:
                self.convert()
        if self.stage == "quantize":
            self._check_weights()
            if self._is_committing and torch.is_grad_enabled() and not self._forwards.awaited:
                self.commit()

    def convert(self, plan: Plan | None = None, calibration: Calibration | None = None) -> None:
        """Makes the observed weights int8 and compiles the blocks from now on. An interrupted one is gone on with.

        Args:
            plan: what becomes of each weight; None: what the statistics say.
            calibration: what counts as calibration afterwards; None: what was observed here.
        """
        self._close_bar()
        with self._forwards.alone(), torch.inference_mode(False), torch.no_grad():
            if self.stage != "observe" and not self.is_converting:  # another thread was faster
                return
            if self._plan is None:
                self._leave_what_cannot_be_observed()
                plan = plan or convert.choose(self.sites, self.calibration.statistics, self.config)
                self._plan = (plan, calibration or self.calibration)
            plan, self.calibration = self._plan
            convert.apply(plan, progress=self.config.progress)
            for follower in list(self._followers):
                follower._follow(plan)
            self.stage = "quantize"
            self.install()
            self._plan = None
        if self.config.progress:
            tqdm.write(f"quaff_fx: {len(self.active_sites())} weights are int8 now; compiling at the next step")

    def _follow(self, plan: Plan) -> None:
        """Converts a copy of a model as the model was: an average of its weights, or a reference, has to match it."""
        if self.stage == "observe" and self._forwards.trainer is None:
            self.convert(plan.for_sites(self.sites))

    @property
    def _is_committing(self) -> bool:
        """Whether there are smoothing scales that training changes."""
        return self.stage == "quantize" and self.config.smoothing == "momentum"

    def commit(self) -> None:
        """Commits the smoothing scales that the last training forward wrote."""
        for outliers in {id(weight.outliers): weight.outliers for _, weight in self._int8}.values():
            outliers.commit()

    def _check_weights(self) -> None:
        for name, weight in self._int8:
            if reason := weight.reason_unusable():
                raise WeightError(
                    f"{name}: is int8 and {reason}, expected a frozen weight that stays as it is. To train it, call "
                    "quaff_fx.dequantize(model), unfreeze it and compile again (or unfreeze it before compiling); an "
                    "average of weights must leave out what does not require a gradient."
                )

    # --- installation and copies ------------------------------------------------------------------------------------

    def install(self) -> None:
        """Installs the calls of the current stage in the model. Until the first time it is as it was."""
        hosts.guard_peft()
        self._compiled, self._int8 = None, []
        if self.stage == "quantize":
            self._compiled = calls.compiled_forward(QuantizeBackend(self.graphs, calls.RECOMPILE_LIMIT))
            weights = [(s.weight_name, owners.quantized_in(s.module).get(s.parameter)) for s in self.active_sites()]
            self._int8 = [(name, weight) for name, weight in weights if weight is not None]
            # With the paper's smoothing a loss in parts would see the activation in parts.
            if self.config.loss_without_logits and self.config.smoothing == "split":
                loss = calls.compiled_forward(QuantizeBackend(self.graphs, calls.RECOMPILE_LIMIT))
                heads.defer_logits(self.model, self.active_sites(), loss)
        for block in self.blocks:
            owners.set_block(block, True)
            block.__dict__[owners.RUN] = self.run_block
        for module in self.callers:
            calls.install(module, self.run)
            module.__dict__[ATTRIBUTE] = self

    def uninstall(self) -> None:
        """Gives the model back with plain float weights and its own calls; dequantized if it was converted."""
        self._close_bar()
        with self._forwards.alone():
            for places in [*(site.places for site in self.sites), *owners.int8_places(self.model)]:
                owners.restore(places)
            for block in self.blocks:
                block.__dict__.pop(owners.RUN, None)
                owners.set_block(block, False)
            hosts.show_hooks(self.model)
            for module in reversed(self.callers):  # the model last: until then this can be called again
                calls.uninstall(module)
                module.__dict__.pop(ATTRIBUTE, None)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled calls and graphs belong to this process; a copy or an unpickled model compiles its own.
        kept = (
            "model",
            "config",
            "sites",
            "blocks",
            "callers",
            "stage",
            "calibration",
            "mode_before_calibrate",
            "_plan",
        )
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._begin()
        self.install()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stages:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self._followers.add(copied)
        return copied


@dataclass
class _Loose:
    """A forward that consists of calls of blocks alone.

    Attributes:
        has_grad: whether it runs with gradients. is_awaiting: whether its backward matters. observer: what watches it.
        blocks: ids of those that have run. awaited: its backward, None before an output of it could have one.
    """

    has_grad: bool
    is_awaiting: bool
    observer: Observer | None
    blocks: set[int] = field(default_factory=set)
    awaited: weakref.ref[Awaited] | None = None
