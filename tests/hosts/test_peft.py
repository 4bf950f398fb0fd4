"""What is known of PEFT: the methods that are replaced, and how wrapped modules are named."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper

from quaff_fx.errors import ConfigError
from quaff_fx.hosts.peft import guard_peft, model_name, stored_name


def later_check(self: Any, adapter_names: list[str]) -> None:
    """What another version of PEFT may have in the place of the method that is replaced."""


def later_update(self: Any, name: str) -> None:
    """The same."""


@pytest.mark.parametrize(
    ("owner", "name", "method", "found"),
    [
        (BaseTuner, "_check_merge_allowed", None, "no such method"),
        (ModulesToSaveWrapper, "update", later_update, r"parameters \(self, name\)"),
    ],
)
def test_another_peft_is_named(
    owner: type, name: str, method: Any, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, method)
    text = rf"peft {peft.__version__}: {owner.__name__}\.{name} has {found}, expected parameters \(self"
    with pytest.raises(ConfigError, match=text):
        guard_peft()


def test_more_parameters_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseTuner, "_check_merge_allowed", later_check)
    guard_peft()
    assert hasattr(BaseTuner._check_merge_allowed, "_quaff_guard")


def test_methods_are_replaced_once() -> None:
    guard_peft()
    before = BaseTuner._check_merge_allowed, ModulesToSaveWrapper.update
    guard_peft()
    assert (BaseTuner._check_merge_allowed, ModulesToSaveWrapper.update) == before


def test_names() -> None:
    assert model_name("base_model.model.layers.0.q_proj.base_layer") == "layers.0.q_proj"
    assert model_name("layers.0.q_proj") == "layers.0.q_proj"
    assert stored_name("score.original_module.weight") == "score.weight"
    assert stored_name("layers.0.q_proj.base_layer.weight") == "layers.0.q_proj.weight"
