"""The way of a compiled model through its stages: observe for some training steps, convert, then quantized."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quaff_fx import calls, convert, hosts, state
from quaff_fx.backend import CompiledGraph, QuantizeBackend
from quaff_fx.config import QuaffConfig
from quaff_fx.convert import Plan
from quaff_fx.errors import CalibrationError, QuaffWarning, WeightError
from quaff_fx.observe import Observer, Statistics
from quaff_fx.sites import Site, callers_of
from quaff_fx.state import QuantizedWeight, WeightState

ATTRIBUTE = "_quaff"
"""A compiled model, and every module through which a forward reaches its blocks, carries its `Stages` under this name."""

_UNHEARD_LIMIT = 16
"""So many forwards with gradients, one after the other, may go without a backward before a warning."""

_HOOKED_LIMIT = 8
"""So many forwards with gradients may run a block eagerly, because of a hook in it, before a warning."""


@dataclass(frozen=True)
class Calibration:
    """What the calibration steps have seen. Replaced as a whole, so that nothing can interrupt it half done.

    Attributes:
        steps: how many were counted. statistics: of each observed site, by weight name.
        multiply_adds: of each matrix that a linear multiplied by, over all steps, by weight name.
        readers: what else read a weight, by weight name.
    """

    steps: int = 0
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    multiply_adds: Mapping[str, int] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)


class _Awaited:
    """A forward whose backward has not run to its end. The graph of its outputs keeps it alive, and calls it.

    A backward that is interrupted was none: the forward may be backpropagated again, or thrown away.
    """

    def __init__(self, then: Callable[[], None]) -> None:
        self.then: Callable[[], None] | None = then
        self.backward = -1

    def __call__(self, _: Tensor) -> None:
        if self.backward != (backward := calls.current_backward()):  # not for each of its outputs
            self.backward = backward
            calls.after_backward(self._finish)

    def _finish(self) -> None:
        if self.then is not None:
            self.then()
            self.then = None


class _Here(threading.local):
    """What this thread is doing.

    Attributes:
        forward: alive while the thread is in a forward, also if what should end it was interrupted.
        loose: what watches the blocks that it calls on their own.
    """

    forward: weakref.ref[_Forward] | None = None
    loose: _Loose | None = None

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in a forward."""
        return self.forward is not None and self.forward() is not None


class _Forward:
    """One forward, while it runs."""


class Stages:
    """Counts the training steps of a compiled model and does between them what no graph may do.

    A *forward* is the outermost call, in a thread, of the model or of any module through which it reaches its blocks;
    or calls of the blocks alone, until one comes again. A *step* is a forward with gradients whose backward runs,
    whatever the mode of the model. Until the backward of every forward of before has run, or can run no more, nothing
    is changed that a replay of it would read: only then smoothing scales are committed and weights are converted, by
    the next forward of any kind in the thread that trains.

    Attributes:
        model: the root. config: its config. sites: every weight matrix, with the reason of those left alone.
        blocks: the modules compiled in place; the root alone if it is compiled whole.
        stage: ``"observe"`` or ``"quantize"``. calibration: what was observed. graphs: what was captured.
    """

    def __init__(self, model: nn.Module, config: QuaffConfig, sites: list[Site], blocks: list[nn.Module]) -> None:
        self.model = model
        self.config = config
        self.sites = sites
        self.blocks = blocks
        self.callers = callers_of(model, blocks)
        self.stage = "observe"
        self.calibration = Calibration()
        self._plan: Plan | None = None
        self._start_here()

    @property
    def steps(self) -> int:
        """Calibration steps done."""
        return self.calibration.steps

    def active_sites(self) -> list[Site]:
        """The sites that are observed or quantized."""
        return [site for site in self.sites if not site.reason]

    @property
    def is_converting(self) -> bool:
        """Whether a conversion was interrupted, which `settle` goes on with."""
        return self._plan is not None

    def weight_state(self, site: Site) -> WeightState | None:
        """The state of a site's weight, None if it is float."""
        return state.states_of(site.module).get(site.parameter)

    # --- calls ------------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # where `torch.compile` was put around the model
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call of the model, or of a module between it and its blocks."""
        if self._here.is_inside or calls.is_in_backward():
            return calls.call_itself(module, args, kwargs)
        hosts.guard_peft()  # here too: PEFT may be imported after `compile`
        self._here.loose = None
        self.settle()
        is_training = self.model.training and torch.is_grad_enabled()
        kv_cache = hosts.without_kv_cache(self.model) if is_training or "labels" in kwargs else contextlib.nullcontext()
        with self._entered(), hosts.without_mha_fastpath(self.model), kv_cache:
            if not torch.is_grad_enabled():
                return calls.call_itself(module, args, kwargs)
            if self.stage == "observe":
                observer = self._observer()
                with observer:
                    result = calls.call_itself(module, args, kwargs)
                self._check_step(observer)
                self._await_backward(result, lambda: self._count(observer, show=True))
                self._tell_if_unheard()
                return result
            result = calls.call_itself(module, args, kwargs)
            if self._is_committing():
                self._await_backward(result, lambda: None)
            return result

    def run_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a block's forward: compiled, or eagerly where a graph would do other things than the block's code."""
        if not (self._here.is_inside or calls.is_in_backward()):
            return self._run_loose(block, args, kwargs)
        if self.stage == "observe" or (hosts.has_kv_cache((*args, *kwargs.values())) and not torch.is_grad_enabled()):
            # A cache is indexed by the layer, so each layer would compile graphs of its own. Eager products are int8 as
            # well (`Int8Weight`), and one token is bound by reading the weights.
            return block.quaff_forward(*args, **kwargs)  # type: ignore[operator]
        if (hooked := calls.hooked_module(block)) is not None:
            self._tell_of_hook(block, hooked)
            return block.quaff_forward(*args, **kwargs)  # type: ignore[operator]
        assert self._compiled is not None
        result = self._compiled(block, args, kwargs)
        self._tell_if_untraced(block)
        return result

    def _run_loose(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a block that is called on its own, by code that calls none of the modules around it."""
        here, has_grad = self._here, torch.is_grad_enabled()
        if here.loose is None or id(block) in here.loose.blocks or here.loose.has_grad != has_grad:
            here.loose = None
            self.settle()
            here.loose = _Loose(self._observer(), has_grad)
        loose = here.loose
        loose.blocks.add(id(block))
        with self._entered():
            if not has_grad or (self.stage == "quantize" and not self._is_committing()):
                return self.run_block(block, args, kwargs)
            with loose.observer if self.stage == "observe" else contextlib.nullcontext():
                result = self.run_block(block, args, kwargs)
            if self.stage == "observe":
                loose.observer.check_finite(self.steps + 1)
            if loose.awaited is None or (awaited := loose.awaited()) is None:
                then = (lambda: self._count(loose.observer, show=True)) if self.stage == "observe" else (lambda: None)
                awaited = self._await_backward(result, then)
                loose.awaited = None if awaited is None else weakref.ref(awaited)
            else:
                _hook_outputs(result, awaited)
            return result

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        """While this thread runs a forward."""
        forward = _Forward()
        with self._gate.entered():
            try:
                self._here.forward = weakref.ref(forward)
                yield
            finally:
                self._here.forward = None

    # --- observe ----------------------------------------------------------------------------------------------------

    def observe_now(self, forward: Callable[[], Any]) -> None:
        """Runs `forward`, which calls the model in whatever way, and counts it as a step at once.

        Raises:
            CalibrationError: an activation was not finite, or no weight was read; the step does not count.
        """
        observer = self._observer()
        with self._entered(), hosts.without_mha_fastpath(self.model), observer:
            forward()
        self._check_step(observer)
        self._count(observer, show=False)

    def _observer(self) -> Observer:
        """Returns what watches one forward."""
        if self.stage == "observe":
            self._leave_what_cannot_be_observed()
            convert.check_whole(self.active_sites())
        return Observer(self.sites, self._threshold())

    def _leave_what_cannot_be_observed(self) -> None:
        for site in self.active_sites():
            site.reason = convert.reason_not_observable(site)

    def _check_step(self, observer: Observer) -> None:
        """Raises `CalibrationError`, or warns, if a forward has not observed what it should."""
        observer.check_finite(self.steps + 1)
        if not self.steps and not self._has_traced:
            self._has_traced = True
            for block in self.blocks:
                if skipped := hosts.untraced_modules(block):
                    self._warn_of_untraced(block, skipped)
                    break
        if self.steps or self._has_warned_of_step or any(seen.absmax is not None for seen in observer.seen.values()):
            return
        if not observer.seen:
            raise CalibrationError(
                "forward: read none of the frozen weights, expected all. The step does not count. Call the model that "
                "was given to compile, or check which modules its forward runs."
            )
        self._has_warned_of_step = True
        readers = sorted({reader for seen in observer.seen.values() for reader in seen.readers})
        warnings.warn(
            f"model: no linear reads any of its {len(self.active_sites())} frozen weights (read by {', '.join(readers)}), "
            "expected some. What stays so is left in float, with its reason in quaff_fx.explain(model).",
            QuaffWarning,
            stacklevel=4,
        )

    def _await_backward(self, result: Any, then: Callable[[], None]) -> _Awaited | None:
        """Calls `then` when the backward of `result` begins; None if there can be none."""
        awaited = _Awaited(then)
        if not _hook_outputs(result, awaited):
            return None
        self._trainer = threading.get_ident()
        self._awaited = [reference for reference in self._awaited if _is_awaited(reference)]
        self._awaited.append(weakref.ref(awaited))
        return awaited

    def _is_awaiting(self) -> bool:
        return any(map(_is_awaited, self._awaited))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _count(self, observer: Observer, show: bool) -> None:
        """Folds what `observer` saw into the statistics, as one step."""
        if self.stage != "observe" or self._plan is not None:  # converted before its backward
            return
        before = self.calibration
        statistics, readers = {}, dict(before.readers)
        for site in self.active_sites():
            name, seen = site.weight_name, observer.seen.get(site.weight_name)
            so_far = before.statistics.get(name) or Statistics.none(site)
            hits = convert.hit_count(site, seen, self.config) if seen is not None else 0
            statistics[name] = so_far.with_step(seen, hits, self._threshold())
            if seen is not None and seen.readers:
                readers[name] = next(iter(seen.readers))
        names = before.multiply_adds.keys() | observer.multiply_adds.keys()
        multiply_adds = {
            name: before.multiply_adds.get(name, 0) + observer.multiply_adds.get(name, 0) for name in sorted(names)
        }
        self._unheard = 0
        if show:
            self._show_progress()
        self.calibration = Calibration(before.steps + 1, statistics, multiply_adds, readers)

    def _tell_if_unheard(self) -> None:
        """Warns, once, when forwards with gradients go on without a backward: then nothing ever becomes int8."""
        self._unheard += 1
        if self._unheard == max(_UNHEARD_LIMIT, 2 * self.config.calibration_steps):
            held = sum(map(_is_awaited, self._awaited))
            warnings.warn(
                f"model: ran {self._unheard} forwards with gradients and none of their backwards was seen, expected "
                f"training steps: its weights stay in float until {self.config.calibration_steps} steps are counted "
                f"({self.steps} are) and no output of an earlier forward is kept with its graph ({held} are). Put an "
                "evaluation under torch.no_grad(), or call quaff_fx.calibrate(model, batches).",
                QuaffWarning,
                stacklevel=4,
            )

    # --- between steps ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Does what is due before a forward: goes on with a conversion that was interrupted, or converts, or commits.

        Raises:
            WeightError: an int8 weight was edited, or is to be trained.
        """
        if self._plan is not None:
            self.convert()
        elif self.stage == "observe":
            is_trainer = self._trainer in (None, threading.get_ident())
            if self.steps >= self.config.calibration_steps and is_trainer and not self._is_awaiting():
                self.convert()
        if self.stage == "quantize":
            self._check_weights()
            if self._is_committing() and torch.is_grad_enabled() and not self._is_awaiting():
                self.commit()

    def convert(self, plan: Plan | None = None) -> None:
        """Makes the observed weights int8 and compiles the blocks from now on. An interrupted one is gone on with.

        Args:
            plan: what becomes of each weight; None: what the statistics say.
        """
        self._close_bar()
        with self._gate.alone(), torch.inference_mode(False), torch.no_grad():
            if self.stage != "observe" and self._plan is None:  # another thread was faster
                return
            if self._plan is None:
                self._leave_what_cannot_be_observed()
                self._plan = plan or convert.choose(self.sites, self.calibration.statistics, self.config)
            convert.apply(self._plan, progress=self.config.progress)
            for follower in list(self._followers):
                follower._follow(self._plan)
            self.stage = "quantize"
            self.install()
            self._plan = None
        if self.config.progress:
            tqdm.write(f"quaff_fx: {len(self.active_sites())} weights are int8 now; compiling at the next step")

    def _follow(self, plan: Plan) -> None:
        """Converts a copy of a model as the model was: an average of its weights, or a reference, has to match it."""
        if self.stage == "observe" and self._awaited == [] and self._trainer is None:
            self.convert(plan.for_sites(self.sites))

    def commit(self) -> None:
        """Commits the smoothing scales that the last training forward wrote."""
        for outliers in {id(weight.outliers): weight.outliers for _, weight in self._int8}.values():
            outliers.commit()

    def _is_committing(self) -> bool:
        """Whether there are smoothing scales that training changes."""
        return self.stage == "quantize" and self.config.smoothing == "momentum"

    def _check_weights(self) -> None:
        for name, weight in self._int8:
            if reason := weight.reason_unusable():
                raise WeightError(
                    f"{name}: is int8 and {reason}, expected a frozen weight that stays as it is. To train "
                    "it, call quaff_fx.dequantize(model), unfreeze it and compile again (or unfreeze it before "
                    "quaff_fx.compile); an average of weights must leave out what does not require a gradient."
                )

    # --- installation -----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Installs the calls of the current stage in the model. Until the first time it is as it was."""
        hosts.guard_peft()
        self._compiled, self._int8 = None, []
        if self.stage == "quantize":
            self._compiled = calls.compiled_forward(QuantizeBackend(self.graphs, calls.RECOMPILE_LIMIT))
            weights = [(site.weight_name, self.weight_state(site)) for site in self.active_sites()]
            self._int8 = [(name, weight) for name, weight in weights if isinstance(weight, QuantizedWeight)]
        for block in self.blocks:
            state.set_block(block, True)
            block.__dict__[state.RUN] = self.run_block
        for module in self.callers:
            calls.install(module, self.run)
            module.__dict__[ATTRIBUTE] = self

    def uninstall(self) -> None:
        """Gives the model back with plain float weights and its own calls; dequantized if it was converted."""
        self._close_bar()
        with self._gate.alone():
            for site in self.sites:
                state.restore(site.places)
            for places in state.int8_places(self.model):  # copies of its modules
                state.restore(places)
            for block in self.blocks:
                block.__dict__.pop(state.RUN, None)
                state.set_block(block, False)
            hosts.show_hooks(self.model)
            for module in reversed(self.callers):  # the model last: until then it can be called again
                calls.uninstall(module)
                module.__dict__.pop(ATTRIBUTE, None)

    def _threshold(self) -> float:
        return self.config.outlier_threshold if self.config.outlier_rule == "mean_multiple" else 0.0

    # --- telling ----------------------------------------------------------------------------------------------------

    def _name_of(self, module: nn.Module) -> str:
        return next((name for name, other in self.model.named_modules() if other is module), type(module).__name__)

    def _tell_of_hook(self, block: nn.Module, hooked: nn.Module) -> None:
        if not (torch.is_grad_enabled() and not calls.is_in_backward()):
            return
        self._hooked += 1
        if self._hooked == _HOOKED_LIMIT * len(self.blocks):
            warnings.warn(
                f"{self._name_of(hooked)}: has a hook and lies in a block, expected none while training: the block runs "
                "eagerly, right and in int8, but slower, so that the hook is called. Hooks on the blocks themselves "
                "cost nothing.",
                QuaffWarning,
                stacklevel=3,
            )

    def _tell_if_untraced(self, block: nn.Module) -> None:
        """Warns, once, if the first compiled call of a block was not traced at all."""
        if not self.graphs and not self._has_traced:
            self._has_traced = True
            self._warn_of_untraced(block, hosts.untraced_modules(block))

    def _warn_of_untraced(self, block: nn.Module, skipped: list[str]) -> None:
        name = self._name_of(block) or "model"
        why, what = "was not traced by torch.compile", "Move what cannot be traced out of the module"
        if skipped:
            why = f"calls {', '.join(skipped)}, a recurrent module of torch, which torch.compile does not trace"
            what = "Set torch._dynamo.config.allow_rnn = True before training, or move it out of the module"
        warnings.warn(
            f"{name}: {why}, expected a graph. What is around it runs eagerly, in int8, but slower. {what}; "
            "TORCH_LOGS=graph_breaks tells more.",
            QuaffWarning,
            stacklevel=4,
        )

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

    # --- copies -----------------------------------------------------------------------------------------------------

    def _start_here(self) -> None:
        """Makes what belongs to this process and to this model alone."""
        self.graphs: list[CompiledGraph] = []
        self._compiled: Callable[..., Any] | None = None
        self._int8: list[tuple[str, QuantizedWeight]] = []
        self._bar: tqdm[Any] | None = None
        self._gate = calls.Gate()
        self._here = _Here()
        self._trainer: int | None = None
        self._awaited: list[weakref.ref[_Awaited]] = []
        self._followers: weakref.WeakSet[Stages] = weakref.WeakSet()
        self._unheard = self._hooked = 0
        self._has_warned_of_step = self._has_traced = False

    def __getstate__(self) -> dict[str, Any]:
        # Compiled calls and graphs belong to this process; a copy or an unpickled model compiles its own.
        kept = ("model", "config", "sites", "blocks", "callers", "stage", "calibration", "_plan")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._start_here()
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
        observer: what watches it. has_grad: whether it runs with gradients. blocks: ids of those that have run.
        awaited: its backward, None before an output of it could have one.
    """

    observer: Observer
    has_grad: bool
    blocks: set[int] = field(default_factory=set)
    awaited: weakref.ref[_Awaited] | None = None


def _is_awaited(reference: weakref.ref[_Awaited]) -> bool:
    awaited = reference()
    return awaited is not None and awaited.then is not None


def _hook_outputs(result: Any, awaited: _Awaited) -> bool:
    """Makes the backward through any tensor of `result` call `awaited`; False if none has a backward."""
    outputs = [tensor for tensor in _tensors_in(result) if tensor.requires_grad and tensor.grad_fn is not None]
    for tensor in outputs:
        tensor.register_hook(awaited)
    return bool(outputs)


def _tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yields the tensors in an output of a model: in mappings, sequences and objects with fields."""
    if isinstance(value, Tensor):
        yield value
    elif depth < 8:
        if isinstance(value, Mapping):
            inner: Any = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = value
        elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            inner = [] if isinstance(value, (nn.Module, type)) else vars(value).values()
        else:
            inner = []
        for item in inner:
            yield from _tensors_in(item, depth + 1)
