"""What is known of torch's own modules: the switch of the fused encoder layer, and recurrent modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quaff_fx.hosts.torch import untraced_modules, without_mha_fastpath

get_fastpath = torch.backends.mha.get_fastpath_enabled


@pytest.fixture
def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 8)


def test_the_fused_layer_is_off_inside_and_on_again_after_an_error(encoder: nn.Module) -> None:
    def interrupted() -> None:
        with without_mha_fastpath(encoder):
            assert not get_fastpath()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert get_fastpath()


def test_the_last_of_several_models_turns_it_on_again(encoder: nn.Module) -> None:
    first, second = without_mha_fastpath(encoder), without_mha_fastpath(encoder)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not get_fastpath()
    second.__exit__(None, None, None)
    assert get_fastpath()


def test_who_has_turned_it_off_finds_it_off(encoder: nn.Module) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with without_mha_fastpath(encoder):
            pass
        assert not get_fastpath()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_model_without_attention_of_torch_leaves_it_alone() -> None:
    with without_mha_fastpath(nn.Linear(8, 8)):
        assert get_fastpath()


def test_recurrent_modules_are_named_unless_dynamo_may_trace_them() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.Linear(4, 4), "c": nn.Sequential(nn.GRU(4, 4))})
    assert untraced_modules(model) == ["a", "c.0"]
    with torch._dynamo.config.patch(allow_rnn=True):
        assert untraced_modules(model) == []
