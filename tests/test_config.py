"""Defaults, the text of every error, and the patterns."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from quaff_fx.config import QuaffConfig, matches
from quaff_fx.errors import ConfigError

ERROR_FORM = re.compile(r"^(?P<subject>[\w\[\]'*. ]+): .+, expected .+\. [A-Z(].+\.$", re.DOTALL)
"""``<subject>: <what is>, expected <what should be>. <what to do>.``"""

NAMES = ["layers.0.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "lm_head"]


def error_of(**values: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        QuaffConfig(**values)
    text = str(raised.value)
    assert ERROR_FORM.match(text), text
    return text


def test_defaults_are_valid_and_documented() -> None:
    config = QuaffConfig()
    for field in dataclasses.fields(config):
        assert field.default is not dataclasses.MISSING, field.name
        assert re.search(rf"^ +[\w, ]*\b{field.name}\b[\w, ]*: ", str(QuaffConfig.__doc__), re.MULTILINE), field.name
    assert config.calibration_steps == 8
    assert config.outlier_rule == "absmax_rank"
    assert config.outlier_threshold == 100.0
    assert config.momentum == 0.1
    assert config.activation_bits == "auto"
    assert config.include == ("*",)
    assert config.exclude == ()
    assert config.scope == "blocks"


def test_the_default_budget_is_under_five_percent_of_the_channels() -> None:
    assert 0 < QuaffConfig().budget_of("anything") < 0.05


def test_is_frozen_and_takes_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuaffConfig().momentum = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        QuaffConfig(8)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "subject", "says"),
    [
        ({"calibration_steps": 0}, "calibration_steps", "is 0, expected a number of at least 1"),
        ({"calibration_steps": -3}, "calibration_steps", "is -3"),
        ({"calibration_steps": 2.0}, "calibration_steps", "of type float, expected int"),
        ({"calibration_steps": True}, "calibration_steps", "of type bool, expected int"),
        ({"calibration_steps": None}, "calibration_steps", "of type NoneType"),
        ({"outlier_budget": -0.01}, "outlier_budget", "between 0.0 and 0.25"),
        ({"outlier_budget": 0.3}, "outlier_budget", "is 0.3"),
        ({"outlier_budget": "all"}, "outlier_budget", "of type str"),
        ({"outlier_budget": float("nan")}, "outlier_budget", "is nan"),
        ({"outlier_budget": {"down_proj": 0.5}}, "outlier_budget['down_proj']", "is 0.5"),
        ({"outlier_budget": {"down_proj": None}}, "outlier_budget", "of type NoneType"),
        ({"outlier_rule": "paper"}, "outlier_rule", "is 'paper', expected one of 'absmax_rank', 'mean_multiple'"),
        ({"outlier_threshold": -1}, "outlier_threshold", "is -1"),
        ({"outlier_threshold": "100"}, "outlier_threshold", "of type str"),
        ({"momentum": -0.1}, "momentum", "is -0.1"),
        ({"momentum": 1.1}, "momentum", "is 1.1"),
        ({"momentum": "fast"}, "momentum", "of type str"),
        ({"momentum": float("nan")}, "momentum", "is nan"),
        ({"activation_bits": 4}, "activation_bits", "is 4, expected one of 'auto', 7, 8"),
        ({"activation_bits": True}, "activation_bits", "is True"),
        ({"share_activations": "yes"}, "share_activations", "of type str, expected bool"),
        ({"share_activations": 1}, "share_activations", "of type int, expected bool"),
        ({"include": "q_proj"}, "include", "is 'q_proj', expected a tuple of patterns. Write ('q_proj',)"),
        ({"exclude": "lm_head"}, "exclude", "is 'lm_head'"),
        ({"include": 3}, "include", "is 3, expected a tuple of patterns"),
        ({"exclude": (1,)}, "exclude", "is 1 of type int, expected str"),
        ({"scope": "layer"}, "scope", "is 'layer', expected one of 'blocks', 'model'"),
        ({"progress": 1}, "progress", "of type int, expected bool"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_its_value_and_what_to_do(
    values: dict[str, Any], subject: str, says: str
) -> None:
    text = error_of(**values)
    assert text.startswith(f"{subject}"), text
    assert says in text, text


def test_the_first_wrong_budget_of_a_mapping_is_named() -> None:
    assert error_of(outlier_budget={"q_proj": 0.01, "down_proj": 1.0}).startswith("outlier_budget['down_proj']: is 1.0")


@pytest.mark.parametrize("value", [None, 0.5, ["lm_head", 3]])
def test_unusable_patterns_are_refused_without_a_traceback_of_ours(value: Any) -> None:
    error_of(exclude=value)


def test_an_unhashable_choice_is_a_config_error() -> None:
    error_of(scope=["blocks"])


def test_an_unknown_field_names_its_near_ones() -> None:
    text = error_of(outlier_budgets=0.01)
    assert "QuaffConfig: has no field 'outlier_budgets' (near: outlier_budget" in text
    assert "calibration_steps" in text, "all fields are listed"


def test_an_unknown_field_without_near_names_claims_none() -> None:
    assert "near:" not in error_of(zzzzzz=1)


def test_patterns_may_be_lists_and_become_tuples() -> None:
    config = QuaffConfig(include=["q_proj", "k_proj"], exclude=[])
    assert config.include == ("q_proj", "k_proj")
    assert config.exclude == ()


def test_limits_are_valid_values() -> None:
    config = QuaffConfig(
        calibration_steps=1, outlier_budget=0.25, momentum=0, outlier_threshold=0, activation_bits=7, scope="model"
    )
    assert config.budget_of("x") == 0.25
    assert QuaffConfig(outlier_budget=0).budget_of("x") == 0.0


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.0.mlp.down_proj", "down_proj", True),
        ("model.layers.0.mlp.down_proj", "mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "mlp", False),
        ("model.layers.0.mlp.down_proj", "proj", False),
        ("model.layers.0.mlp.down_proj", "own_proj", False),
        ("model.layers.0.mlp.down_proj", "*_proj", True),
        ("model.layers.0.mlp.down_proj", "layers.0.*", True),
        ("model.layers.10.mlp.down_proj", "layers.1.*", False),
        ("model.layers.10.mlp.down_proj", "layers.?.*", False),
        ("model.layers.0.mlp.down_proj", "*.mlp.*", True),
        ("model.layers.0.mlp.down_proj", "DOWN_PROJ", False),
        ("lm_head", "lm_head", True),
        ("lm_head", "*", True),
        ("", "*", True),
    ],
)
def test_a_pattern_is_compared_to_the_name_and_each_of_its_tails(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_budget_of_a_mapping_takes_the_first_match_and_the_star_last() -> None:
    config = QuaffConfig(outlier_budget={"*": 0.02, "layers.0.*": 0.03, "down_proj": 0.04})
    assert config.budget_of("layers.0.mlp.down_proj") == 0.03
    assert config.budget_of("layers.1.mlp.down_proj") == 0.04
    assert config.budget_of("layers.1.self_attn.q_proj") == 0.02


def test_budget_of_a_mapping_without_a_star_falls_back_to_the_default() -> None:
    assert QuaffConfig(outlier_budget={"down_proj": 0.04}).budget_of("q_proj") == QuaffConfig().budget_of("q_proj")


def test_patterns_that_match_pass_the_check() -> None:
    QuaffConfig(include=("*_proj",), exclude=("q_proj",), outlier_budget={"down_proj": 0.1}).check_patterns(NAMES)
    QuaffConfig().check_patterns(["fc"])  # the default exclusion need not match anything


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"include": ("down_porj",)}, "include"),
        ({"exclude": ("down_porj",)}, "exclude"),
        ({"outlier_budget": {"down_porj": 0.1}}, "outlier_budget"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        QuaffConfig(**values).check_patterns(NAMES)
    text = str(raised.value)
    assert ERROR_FORM.match(text), text
    assert text.startswith(f"{field}: pattern 'down_porj' matches no layer (near: ")
    assert "down_proj" in text


def test_a_head_may_be_excluded_where_there_is_none_and_hides_no_wrong_pattern() -> None:
    QuaffConfig(exclude=("lm_head",)).check_patterns(["layers.0.up"])
    with pytest.raises(ConfigError, match="exclude: pattern 'nothing' matches no layer"):
        QuaffConfig(exclude=("lm_head", "nothing")).check_patterns(NAMES)
