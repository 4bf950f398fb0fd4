"""`QuaffConfig`: everything a person can choose, checked once."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from quaff_fx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class QuaffConfig:
    """How a model is observed and quantized. All fields have working defaults.

    Attributes:
        calibration_steps: training steps that are observed before the weights become int8, at least 1.
        outlier_budget: largest share of a site's input channels that may be outlier channels, in [0, 0.25]; a
            number, or a mapping from patterns (``"down_proj"``) to numbers, where ``"*"`` stands for the rest.
        outlier_rule: ``"absmax_rank"`` counts, per step, the channels of largest absolute value;
            ``"mean_multiple"`` (the paper's code) counts values over ``outlier_threshold`` × the mean absolute value.
        outlier_threshold: the multiple of ``"mean_multiple"``; the paper's code uses 100.
        smoothing: what happens to outlier channels. ``"split"``: they leave the int8 product and are computed in float,
            the limit of a large smoothing scale. ``"momentum"``: Quaff as in the paper, they are divided by a smoothing
            scale that follows the activations. `docs/numerics.md` compares the two.
        momentum: of ``"momentum"``: weight of the **old** smoothing scale in s ← γ s + (1 - γ) β, in [0, 1]. The
            paper's code: 0.1; 1 keeps the scale of the calibration.
        activation_bits: 8 (integers in ±127), 7 (±63), or ``"auto"``: 7 only where the CPU's int8 product is slower
            or missing at 8 bits.
        rotation: largest block of the Hadamard rotation of activations and weights before they are rounded, a power of
            two; 1 is none. A site takes the largest that divides its in_features. None: 64 with ``smoothing="split"``;
            none with ``"momentum"``, since the paper has none.
        share_activations: sites that read the same activation (q, k and v) share one outlier set, smoothing scale and
            quantized activation. None: where it costs no accuracy, that is with ``smoothing="split"``.
        loss_without_logits: the cross entropy of logits that nobody reads is computed in parts of some tokens, so that
            they never exist as a whole. What reads them gets them, as ever; False computes them always, and so does
            ``smoothing="momentum"``.
        include: patterns of module names whose frozen weights are quantized.
        exclude: patterns of module names that are left alone: ``("lm_head",)`` keeps a head in float.
        scope: ``"blocks"`` compiles the repeated blocks (decoder layers) in place, one graph for all;
            ``"model"`` compiles the whole model. A model without repeated blocks is compiled whole.
        progress: show progress bars while calibrating and converting.

    A pattern is compared to the whole dotted name and to each of its tails, with ``*`` and ``?`` as in a shell:
    ``"down_proj"``, ``"layers.0.*"`` and ``"*.mlp.*"`` are patterns.

    Raises:
        ConfigError: a field has a wrong type or is out of range.
    """

    calibration_steps: int = 8
    outlier_budget: float | Mapping[str, float] = 0.01
    outlier_rule: Literal["absmax_rank", "mean_multiple"] = "absmax_rank"
    outlier_threshold: float = 100.0
    smoothing: Literal["split", "momentum"] = "split"
    momentum: float = 0.1
    activation_bits: Literal["auto", 7, 8] = "auto"
    rotation: int | None = None
    share_activations: bool | None = None
    loss_without_logits: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    scope: Literal["blocks", "model"] = "blocks"
    progress: bool = True

    def __new__(cls, **values: Any) -> QuaffConfig:
        """Refuses unknown field names with the near ones, before the dataclass would with a bare TypeError."""
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(
                    f"QuaffConfig: has no field {key!r}{_near(key, names)}, expected one of {', '.join(names)}. "
                    "Correct the name."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check_type("calibration_steps", self.calibration_steps, int)
        _check_range("calibration_steps", self.calibration_steps, 1, None)
        budgets = self.outlier_budget
        for pattern, budget in budgets.items() if isinstance(budgets, Mapping) else [("*", budgets)]:
            _check_type("outlier_budget", budget, int | float)
            _check_range(f"outlier_budget[{pattern!r}]", budget, 0.0, 0.25)
        _check_choice("outlier_rule", self.outlier_rule, ("absmax_rank", "mean_multiple"))
        _check_type("outlier_threshold", self.outlier_threshold, int | float)
        _check_range("outlier_threshold", self.outlier_threshold, 0.0, None)
        _check_type("momentum", self.momentum, int | float)
        _check_range("momentum", self.momentum, 0.0, 1.0)
        _check_choice("activation_bits", self.activation_bits, ("auto", 7, 8))
        _check_choice("smoothing", self.smoothing, ("split", "momentum"))
        if self.rotation is not None:
            _check_type("rotation", self.rotation, int)
            _check_choice("rotation", self.rotation, tuple(2**power for power in range(13)))
        if self.share_activations is not None:
            _check_type("share_activations", self.share_activations, bool)
        _check_type("loss_without_logits", self.loss_without_logits, bool)
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not isinstance(patterns, Iterable):
                raise ConfigError(f"{name}: is {patterns!r}, expected a tuple of patterns. Write ({patterns!r},).")
            for pattern in patterns:
                _check_type(name, pattern, str)
            object.__setattr__(self, name, tuple(patterns))
        _check_choice("scope", self.scope, ("blocks", "model"))
        _check_type("progress", self.progress, bool)

    def budget_of(self, name: str) -> float:
        """The outlier budget of the module called `name`: the first pattern that matches, ``"*"`` last."""
        if not isinstance(self.outlier_budget, Mapping):
            return float(self.outlier_budget)
        for pattern, budget in self.outlier_budget.items():
            if pattern != "*" and matches(name, pattern):
                return float(budget)
        return float(self.outlier_budget.get("*", QuaffConfig.outlier_budget))  # type: ignore[arg-type]

    @property
    def largest_rotation(self) -> int:
        """The largest block of the rotation: `rotation`, or what None stands for."""
        if self.rotation is not None:
            return self.rotation
        return 64 if self.smoothing == "split" else 1

    @property
    def is_sharing(self) -> bool:
        """Whether sites that read the same activation share its quantized form."""
        return self.smoothing == "split" if self.share_activations is None else self.share_activations

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raises `ConfigError` for a pattern that matches none of the module `names`; lists near names."""
        names = list(names)
        budgets = self.outlier_budget if isinstance(self.outlier_budget, Mapping) else ()
        for field_name, patterns in (
            ("include", self.include),
            ("exclude", [p for p in self.exclude if p != "lm_head"]),  # which people exclude whatever the model
            ("outlier_budget", budgets),
        ):
            for pattern in patterns:
                if pattern != "*" and not any(matches(name, pattern) for name in names):
                    raise ConfigError(
                        f"{field_name}: pattern {pattern!r} matches no layer{_near(pattern, names)}, expected one that "
                        "matches the name of a layer with a weight. Correct or remove it."
                    )


def matches(name: str, pattern: str) -> bool:
    """Tells whether the shell pattern matches the dotted `name` or one of its tails."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[i:]), pattern) for i in range(len(parts)))


def _near(word: str, names: Iterable[str]) -> str:
    tails = {".".join(name.split(".")[-depth:]) for name in names for depth in (1, 2)}
    near = difflib.get_close_matches(word, sorted(tails), n=3, cutoff=0.5)
    return f" (near: {', '.join(near)})" if near else ""


def _check_type(name: str, value: object, kind: Any) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{name}: is {value!r} of type {type(value).__name__}, expected {expected}. Change its type.")


def _check_range(name: str, value: float, low: float, high: float | None) -> None:
    if not (value >= low and (high is None or value <= high)):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{name}: is {value!r}, expected a number of {limit}. Choose one.")


def _check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ConfigError(f"{name}: is {value!r}, expected one of {', '.join(map(repr, choices))}. Choose one of them.")
