"""The way of a compiled model through its stages: observe for some training steps, convert, then quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from quaff_fx import calls, convert, state
from quaff_fx.backend import CompiledGraph, ObserveBackend, QuantizeBackend
from quaff_fx.config import QuaffConfig
from quaff_fx.convert import Plan
from quaff_fx.errors import CalibrationError
from quaff_fx.merging import guard_peft
from quaff_fx.sites import Site
from quaff_fx.state import LoadedWeight, ObservedWeight, OutlierState, QuantizedWeight, WeightState

ATTRIBUTE = "_quaff"
"""A compiled model carries its `Stages` under this name."""


class Stages:
    """Counts the training steps of a compiled model and does between them what no graph may do.

    A step is one forward of the root in training mode with gradients enabled. Before it, the smoothing scales that the
    last one wrote are committed; after it, while observing, its statistics are folded in. When enough steps were
    observed, the next one converts first.

    Attributes:
        model: the root. config: its config. sites: every weight matrix, with the reason of those left alone.
        blocks: the modules compiled in place; the root alone if it is compiled whole.
        stage: ``"observe"`` or ``"quantize"``. steps: observed steps. graphs: what was captured, per stage.
    """

    def __init__(self, model: nn.Module, config: QuaffConfig, sites: list[Site], blocks: list[nn.Module]) -> None:
        self.model = model
        self.config = config
        self.sites = sites
        self.blocks = blocks
        self.stage = "observe"
        self.steps = 0
        self.graphs: list[CompiledGraph] = []
        self._bar: tqdm[Any] | None = None
        self._is_observing = False
        for site in self.active_sites():
            loaded = self.weight_state(site)
            if isinstance(loaded, LoadedWeight):
                loaded.observe(self._threshold())
                continue
            weight = site.module._parameters[site.parameter]
            assert weight is not None
            observer = ObservedWeight(weight, self._threshold())
            state.attach(site.module, {**state.states_of(site.module), site.parameter: observer})
        self._install()

    def active_sites(self) -> list[Site]:
        """The sites that are observed or quantized."""
        return [site for site in self.sites if not site.reason]

    def run_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the root's forward, with what has to happen before and after a training step."""
        guard_peft()  # here too: PEFT may be imported after `compile`
        is_step = module.training and torch.is_grad_enabled()
        kv_cache = calls.without_kv_cache(module) if is_step or "labels" in kwargs else contextlib.nullcontext()
        with calls.without_mha_fastpath(module), kv_cache:
            return self._run_step(module, args, kwargs) if is_step else self._run(module, args, kwargs)

    def _run_step(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.stage == "observe" and self.steps >= self.config.calibration_steps:
            self.convert()
        if self.stage == "quantize":
            self.commit()
            return self._run(module, args, kwargs)
        return self.observe_step(lambda: self._run(module, args, kwargs))

    def observe_step(self, forward: Callable[[], Any], show: bool = True) -> Any:
        """Runs `forward` and folds what the observers saw into the statistics; `show` moves the progress bar.

        Raises:
            CalibrationError: an activation was not finite (the statistics stay as they were), or the forward reached
                none of the compiled modules (the model is given back as it was before `compile`).
        """
        convert.check_whole(self.active_sites())
        observers = {site.weight_name: convert.observed(site) for site in self.active_sites()}
        for observer in observers.values():
            observer.start_step()
        self._is_observing = True
        try:
            result = forward()
        finally:
            self._is_observing = False
        if not self.graphs:
            for site in self.active_sites():
                convert.stop_observing(site)
            self._uninstall_calls()
            raise CalibrationError(
                "forward: reached none of the compiled blocks, expected all. Nothing was changed. Call the model that "
                "was given to compile, or choose scope='model'; torch.compile must not be disabled, nor be put "
                "around the model again (as torch_compile=True of the Trainer does)."
            )
        finite = torch.stack([torch.isfinite(observer.step_absmax).all() for observer in observers.values()]).tolist()
        for name, is_finite in zip(observers, finite, strict=True):
            if not is_finite:
                raise CalibrationError(
                    f"{name}: its input has NaN or infinite values in calibration step {self.steps + 1}, expected "
                    "finite ones. Nothing was converted and the step does not count. Check the data and learning rate."
                )
        for site in self.active_sites():
            observer = observers[site.weight_name]
            observer.finish_step(convert.hit_count(site, self.config))
        self.steps += 1
        if show:
            self._show_progress()
        return result

    def convert(self, plan: Plan | None = None) -> None:
        """Makes the observed weights int8 and swaps the backend; the next call of each block compiles it anew.

        Args:
            plan: what becomes of each weight; None: what the statistics say.
        """
        self._close_bar()
        convert.apply(plan or convert.choose(self.sites, self.config), progress=self.config.progress)
        self.stage = "quantize"
        self._install()
        if self.config.progress:
            tqdm.write(f"quaff_fx: {len(self.active_sites())} weights are int8 now; compiling at the next step")

    def commit(self) -> None:
        """Commits the smoothing scales that the last training forward wrote."""
        for outliers in {id(o): o for o in self._outlier_states()}.values():
            outliers.commit()

    def uninstall(self) -> None:
        """Gives the model back with plain float weights and uncompiled calls; dequantized if it was converted."""
        self._close_bar()
        for site in self.sites:
            if self.weight_state(site) is not None:
                state.restore(site.module, site.parameter)
        self._uninstall_calls()

    def _uninstall_calls(self) -> None:
        for module in (self.model, *self.blocks):
            calls.uninstall(module)
        delattr(self.model, ATTRIBUTE)

    def weight_state(self, site: Site) -> WeightState | None:
        """The state of a site's weight, None if it was left alone."""
        return state.states_of(site.module).get(site.parameter)

    def _outlier_states(self) -> list[OutlierState]:
        states = [self.weight_state(site) for site in self.active_sites()]
        return [weight.outliers for weight in states if isinstance(weight, QuantizedWeight)]

    def _threshold(self) -> float:
        return self.config.outlier_threshold if self.config.outlier_rule == "mean_multiple" else 0.0

    def _install(self) -> None:
        """Installs the compiled calls of the current stage, each stage with graphs and a recompile limit of its own."""
        backend = (
            ObserveBackend(self._threshold(), self.graphs)
            if self.stage == "observe"
            else QuantizeBackend(self.graphs, calls.RECOMPILE_LIMIT)
        )
        guard_peft()
        compiled = calls.compiled_call(backend)
        if self.blocks == [self.model]:
            self._run = compiled
        else:
            self._run = calls.call_eagerly
            for block in self.blocks:
                calls.install(block, calls.unless_generating(compiled, lambda: self._is_observing))
        calls.install(self.model, self.run_root)

    def _show_progress(self) -> None:
        if self._bar is None:
            total = self.config.calibration_steps
            done = self.steps - 1
            self._bar = tqdm(
                total=total, initial=done, desc="quaff_fx: calibrating", disable=not self.config.progress, leave=False
            )
        self._bar.update()
        if self.steps >= self.config.calibration_steps:
            self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __getstate__(self) -> dict[str, Any]:
        # Compiled calls and graphs belong to this process; a copy or an unpickled model compiles its own.
        return {**self.__dict__, "graphs": [], "_run": None, "_bar": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._install()
