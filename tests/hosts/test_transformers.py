"""What is known of transformers: Conv1D, the default of the KV cache, and hooks that capture outputs."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from quaff_fx.hosts.transformers import (
    has_kv_cache,
    hide_idle_hooks,
    is_conv1d,
    is_idle_hook,
    show_hooks,
    without_kv_cache,
)
from tests.models import float_llama, token_ids


def test_conv1d() -> None:
    assert is_conv1d(Conv1D(4, 8))
    assert not is_conv1d(nn.Linear(8, 4))


def test_a_cache_is_found_among_the_arguments() -> None:
    assert has_kv_cache((torch.ones(1), DynamicCache()))
    assert not has_kv_cache((torch.ones(1), None, {}))


def test_without_modules_of_transformers_nothing_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    conv1d, cache = Conv1D(4, 8), DynamicCache()
    for name in ("pytorch_utils", "cache_utils"):
        monkeypatch.delitem(sys.modules, f"transformers.{name}")
    assert not is_conv1d(conv1d)
    assert not has_kv_cache((cache,))


def test_the_cache_is_no_default_inside_and_one_again_after_an_error() -> None:
    model = float_llama()

    def interrupted() -> None:
        with without_kv_cache(model):
            assert model(input_ids=token_ids()).past_key_values is None
            assert model(input_ids=token_ids(), use_cache=True).past_key_values is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config.use_cache is True


def test_a_default_that_is_off_stays_off() -> None:
    model = float_llama(use_cache=False)
    with without_kv_cache(model):
        pass
    assert model.config.use_cache is False


def test_hooks_that_capture_are_idle_between_calls_and_hidden_only_while_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = float_llama().eval()
    model(input_ids=token_ids(), output_hidden_states=True)
    (layer,) = [module for module in model.model.layers if module._forward_hooks][:1]
    layer.register_forward_hook(lambda *_: None)
    hooks = list(layer._forward_hooks.values())
    assert [is_idle_hook(hook) for hook in hooks] == [True] * (len(hooks) - 1) + [False]
    hide_idle_hooks(layer)
    hidden = list(layer._forward_hooks.values())
    assert [hook is before for hook, before in zip(hidden, hooks, strict=True)] == [False] * (len(hooks) - 1) + [True]
    assert len(model(input_ids=token_ids(), output_hidden_states=True).hidden_states) == 3, "eagerly they capture"
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert hidden[0]("would fail with these arguments") is None
    show_hooks(model)
    assert list(layer._forward_hooks.values()) == hooks
