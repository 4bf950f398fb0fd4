"""Int8 weights attached to their modules and taken off again, whole or not at all, and what a module refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from quaff_fx.errors import WeightError
from quaff_fx.weights import QuantizedWeight, owners
from quaff_fx.weights.int8_weight import Int8Weight
from tests.data import normal
from tests.weights.layers import (
    CHANNELS,
    DTYPES,
    Conv1D,
    frozen,
    loaded,
    outlier_state,
    quantize,
    quantized_linear,
    reference_weight,
)


def test_a_float_weight_is_left_as_it_is() -> None:
    """A module none of whose weights is int8 is its own class, before and after."""
    module = frozen(nn.Linear(12, 8))
    weight, keys = module.weight, list(module.state_dict())
    owners.restore([(module, "weight")])
    assert owners.states_of(module) == {}
    assert owners.int8_places(module) == []
    assert type(module) is owners.base_class(module) is nn.Linear
    assert module.weight is weight
    assert list(module.state_dict()) == keys


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantized_weight_comes_back_dequantized_in_its_dtype(dtype: torch.dtype) -> None:
    module = frozen(nn.Linear(12, 8), dtype=dtype)
    original = module.weight.clone()
    quantized = quantize(module)
    assert "weight" not in module._parameters, "the float weight is gone"
    owners.restore([(module, "weight")])
    assert type(module) is nn.Linear
    assert isinstance(module._parameters["weight"], nn.Parameter)
    assert not module.weight.requires_grad
    assert module.weight.dtype == dtype
    torch.testing.assert_close(module.weight.detach(), reference_weight(quantized).to(dtype))
    kept = original[:, CHANNELS] if dtype.itemsize == 2 else original[:, CHANNELS].half().to(dtype)
    assert torch.equal(module.weight[:, CHANNELS], kept), "outlier columns are kept in 16 bits"


def test_a_transposed_weight_comes_back_in_its_own_layout() -> None:
    module = frozen(Conv1D(12, 8))
    quantized = quantize(module, in_dim=0)
    assert quantized.w_int8.shape == (8, 12)
    assert module.weight.shape == (12, 8)
    owners.restore([(module, "weight")])
    assert module.weight.shape == (12, 8)
    assert module.weight.is_contiguous()
    torch.testing.assert_close(module.weight.double(), reference_weight(quantized).t(), rtol=1e-6, atol=0)


def test_two_weights_of_one_module_are_attached_and_restored_one_by_one() -> None:
    module = frozen(nn.Bilinear(4, 4, 4))
    module.weight = nn.Parameter(normal(6, 12, seed=0), requires_grad=False)
    module.other = nn.Parameter(normal(5, 12, seed=1), requires_grad=False)
    other = module.other
    weights = {
        "weight": QuantizedWeight(module.weight, 1, outlier_state(), 127, 1),
        "other": loaded(other),
    }
    owners.attach(module, weights)
    assert owners.states_of(module) == weights
    assert owners.int8_places(module) == [[(module, "other")], [(module, "weight")]]
    owners.restore([(module, "weight")])
    assert list(owners.states_of(module)) == ["other"]
    assert isinstance(module.other, Int8Weight)
    assert isinstance(module._parameters["weight"], nn.Parameter)
    owners.restore([(module, "other")])
    assert type(module) is nn.Bilinear
    assert owners.states_of(module) == {}
    assert torch.equal(module._parameters["other"], weights["other"].dequantized())
    assert (module.other - other).abs().max() <= 0.51 * weights["other"].w_scale.max()


def test_one_class_serves_all_modules_of_a_kind() -> None:
    first, second, conv = (frozen(m) for m in (nn.Linear(12, 8), nn.Linear(12, 20), Conv1D(12, 8)))
    quantize(first)
    quantize(second)
    quantize(conv, in_dim=0)
    assert type(first) is type(second)
    assert isinstance(first, nn.Linear)
    assert type(conv) is not type(first)
    assert isinstance(conv, Conv1D)
    as_int8 = frozen(nn.Linear(3, 4))
    owners.attach(as_int8, {"weight": loaded(as_int8.weight)})
    assert type(as_int8) is type(first), "how it became int8 is in the state, not in the class"
    assert {owners.base_class(m) for m in (first, second, as_int8)} == {nn.Linear}


class Interrupt(BaseException):
    """Ctrl-C, say."""


@pytest.mark.parametrize("moment", ["class", "state", "second state"])
def test_an_interrupted_attach_leaves_the_module_as_it_was(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    module = frozen(nn.Bilinear(4, 4, 4))
    module.weight = nn.Parameter(normal(6, 12, seed=0), requires_grad=False)
    module.other = nn.Parameter(normal(5, 12, seed=1), requires_grad=False)
    states = {name: loaded(getattr(module, name)) for name in ("weight", "other")}
    owners.attach(module, {"weight": states["weight"]})
    before = (type(module), dict(module._modules), dict(module._parameters))

    def interrupt(*_: object) -> None:
        raise Interrupt

    if moment == "class":
        monkeypatch.setattr(owners, "_set_class", interrupt)
    else:
        monkeypatch.setattr(states["weight" if moment == "state" else "other"], "train", interrupt)
    with pytest.raises(Interrupt):
        owners.attach(module, states)
    with pytest.raises(Interrupt):
        owners.attach(module, {"other": states["other"]} if moment != "state" else states, weight=module.bias)
    assert (type(module), module._modules, module._parameters) == before
    assert list(module._modules) == list(before[1])
    assert isinstance(module.weight, Int8Weight)
    assert module.other is before[2]["other"]


def test_modules_that_share_a_weight_share_it_again_once_it_is_float() -> None:
    first, second, other = (frozen(nn.Linear(12, 8)) for _ in range(3))
    second.weight = first.weight
    quantized = quantize(first)
    owners.attach(second, {"weight": quantized})
    quantize(other)
    model = nn.ModuleList([first, second, other, second])
    assert owners.int8_places(model) == [[(first, "weight"), (second, "weight")], [(other, "weight")]]
    owners.restore([(first, "weight"), (second, "weight")])
    assert first.weight is second.weight
    assert isinstance(first.weight, nn.Parameter)
    assert type(first) is type(second) is nn.Linear
    assert owners.int8_places(model) == [[(other, "weight")]]


def test_an_interrupted_restore_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules share a weight: the second call gives the second module what the first one has got already."""
    first, second = frozen(nn.Linear(12, 8)), frozen(nn.Linear(12, 8))
    places = [(first, "weight"), (second, "weight")]
    owners.attach(second, {"weight": quantize(first)})
    attach, attached = owners.attach, []

    def attach_once(module: nn.Module, *args: object, **weights: nn.Parameter) -> None:
        if attached:
            raise Interrupt
        attached.append(module)
        attach(module, *args, **weights)  # type: ignore[arg-type]

    monkeypatch.setattr(owners, "attach", attach_once)
    with pytest.raises(Interrupt):
        owners.restore(places)
    weight = first.weight
    assert type(first) is nn.Linear
    assert isinstance(second.weight, Int8Weight), "it can be called meanwhile"
    monkeypatch.setattr(owners, "attach", attach)
    owners.restore(places)
    assert first.weight is second.weight is weight
    owners.restore(places)
    assert first.weight is second.weight is weight, "nothing is left to do"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_restored_weight_can_be_trained_wherever_it_was_restored(mode: Callable[[], AbstractContextManager]) -> None:
    module = quantized_linear()
    with mode():
        owners.restore([(module, "weight")])
    assert not module.weight.is_inference()
    module.weight.requires_grad_(True)
    module(normal(3, 12, seed=1)).sum().backward()
    assert module.weight.grad is not None


def test_a_float_copy_has_no_int8_weight_and_the_original_keeps_its_own() -> None:
    """PEFT copies modules to be saved: what it trains must be float."""
    first, second, plain = frozen(nn.Linear(12, 8)), frozen(nn.Linear(12, 8)), nn.Linear(8, 8)
    owners.attach(second, {"weight": quantize(first)})
    module = nn.ModuleList([first, second, plain, frozen(Conv1D(12, 8))])
    quantize(module[3], in_dim=0)
    copied = owners.float_copy(module)
    assert owners.int8_places(copied) == []
    assert [type(each) for each in copied] == [nn.Linear, nn.Linear, nn.Linear, Conv1D]
    assert copied[0].weight is copied[1].weight
    assert copied[2].weight is not plain.weight
    assert torch.equal(copied[0].weight, first._modules["quaff_weight"].dequantized())  # type: ignore[union-attr,operator]
    assert copied[3].weight.shape == (12, 8)
    assert len(owners.int8_places(module)) == 2
    assert isinstance(first.weight, Int8Weight)


def test_a_float_copy_of_a_module_that_is_int8_itself() -> None:
    copied = owners.float_copy(quantized_linear())
    assert type(copied) is nn.Linear
    assert isinstance(copied.weight, nn.Parameter)


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(8, 12)), torch.zeros(8, 12), None])
def test_replacing_the_weight_of_a_quantized_module_is_not_silent(value: Tensor | None) -> None:
    """The class reads `weight` through its state; an assignment that nobody reads would be lost."""
    module = quantized_linear()
    before = module.weight.data
    with pytest.raises(WeightError, match=r"^weight of Linear: is int8, expected no other tensor in its place\. Call "):
        module.weight = value
    assert torch.equal(module.weight.data, before)
    assert "weight" not in module._parameters | module.__dict__


def test_the_weight_of_another_module_is_refused_too() -> None:
    first, second = quantized_linear(), quantized_linear()
    with pytest.raises(WeightError):
        first.weight = second.weight


def test_what_was_read_may_be_assigned_back() -> None:
    """PEFT does so when it unloads an adapter."""
    module = quantized_linear()
    (quantized,) = owners.states_of(module).values()
    module.weight = module.weight
    assert list(owners.states_of(module).values()) == [quantized]
    assert "weight" not in module._parameters


def test_other_attributes_are_assigned_as_the_class_of_the_module_does() -> None:
    class Counting(nn.Linear):
        def __setattr__(self, name: str, value: object) -> None:
            if name != "assigned":
                self.__dict__.setdefault("assigned", []).append(name)
            super().__setattr__(name, value)

    module = frozen(Counting(12, 8))
    quantize(module)
    assigned = module.assigned
    del assigned[:]
    module.bias = nn.Parameter(torch.ones(8))
    module.scale = 3
    module.inner = nn.Linear(1, 1)
    assert assigned == ["bias", "scale", "inner"]
    assert module._parameters["bias"].requires_grad
    assert module.scale == 3
    assert module._modules["inner"] is module.inner


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("where", ["module", "parent"])
def test_a_float_weight_does_not_load_into_an_int8_module(strict: bool, where: str) -> None:
    """With ``strict=False`` torch would leave it out without a word."""
    module = quantized_linear()
    parent = nn.Sequential(module)
    before = copy.deepcopy(module.state_dict())
    match = r"weight: is a float weight for one that is int8, expected the int8 one\. Call quaff_fx\.dequantize"
    target, source = (module, nn.Linear(12, 8)) if where == "module" else (parent, nn.Sequential(nn.Linear(12, 8)))
    with pytest.raises(RuntimeError, match=match):
        target.load_state_dict(source.state_dict(), strict=strict)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("quaff_"))


def test_a_quantized_state_dict_does_not_load_into_a_float_module_in_silence() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        nn.Linear(12, 8).load_state_dict(quantized_linear().state_dict())
