"""A model with int8 weights is known as such by whatever handle it is reached, and nothing of it is changed unseen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import quaff_fx
from quaff_fx.api import stages_of
from quaff_fx.errors import ConfigError, WeightError
from quaff_fx.weights import owners
from tests.blocks import EAGERLY, QUIET, Block, Net, batch, converted, step
from tests.models import float_llama, token_ids, with_lora

pytestmark = EAGERLY


def int8_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if owners.states_of(module)]


def is_plain(model: nn.Module) -> bool:
    """No class, attribute or parameter of the product is left."""
    return not any(
        "quaff" in f"{type(module).__module__}.{type(module).__name__}".lower()
        or any("_quaff" in n for n in vars(module))
        for module in model.modules()
    )


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def llama() -> nn.Module:
    model = quaff_fx.compile(with_lora(float_llama()), QUIET)
    return quaff_fx.calibrate(model, [{"input_ids": token_ids()}])


HANDLES = {
    "the model": lambda model: model,
    "the base model": lambda model: model.get_base_model(),
    "the tuner": lambda model: model.base_model,
    "the decoder": lambda model: model.get_base_model().model,
    "a wrapper": Wrapper,
    "a copy": copy.deepcopy,
    "a copy of the base": lambda model: copy.deepcopy(model.get_base_model()),
    "unpickled": lambda model: pickle.loads(pickle.dumps(model)),
    "unloaded": lambda model: model.unload(),
    "wrapped by an adapter again": lambda model: get_peft_model(
        model.unload(), LoraConfig(target_modules="all-linear")
    ),
}


@pytest.mark.parametrize("handle", HANDLES)
def test_every_handle_knows_and_gives_plain_modules_back(handle) -> None:
    reached = HANDLES[handle](llama())
    assert len(int8_modules(reached)) == 14
    assert quaff_fx.explain(reached).stage == "quantize"
    with pytest.raises(ConfigError, match="already compiled by quaff_fx"):
        quaff_fx.compile(reached, QUIET)
    quaff_fx.dequantize(reached)
    assert is_plain(reached)
    assert all(isinstance(module.weight, nn.Parameter) for module in reached.modules() if isinstance(module, nn.Linear))
    with pytest.raises(ConfigError, match="was not compiled"):
        quaff_fx.explain(reached)


def test_a_part_and_its_copy_are_made_float_too() -> None:
    model = converted()
    block = copy.deepcopy(model.body.blocks[0])
    assert len(int8_modules(block)) == 2
    x = batch()
    torch.testing.assert_close(block(x), model.body.blocks[0](x))
    with pytest.raises(ConfigError, match="already compiled"):
        quaff_fx.compile(block)
    quaff_fx.dequantize(block)
    assert is_plain(block)
    assert len(int8_modules(model)) == 4


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["0", "2"]),
        IA3Config(target_modules=["0", "2"], feedforward_modules=["0"]),
        LoHaConfig(target_modules=["0", "2"]),
        OFTConfig(target_modules=["0", "2"], oft_block_size=8),
    ],
    ids=lambda config: type(config).__name__,
)
def test_unload_gives_the_int8_base(config) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(8, 64)
    model = quaff_fx.calibrate(quaff_fx.compile(get_peft_model(net, config), QUIET), [x])
    with torch.no_grad(), model.disable_adapter():
        expected = model(x)
    base = model.unload()
    assert type(base) is nn.Sequential or type(base).__name__ == "Sequential"
    assert len(int8_modules(base)) == 2
    with torch.no_grad():
        torch.testing.assert_close(base(x), expected)


def test_another_tensor_in_the_place_of_an_int8_weight_is_refused() -> None:
    linear = converted().body.blocks[0].up
    for value in (nn.Parameter(torch.zeros(64, 32)), torch.zeros(64, 32), None, converted().body.blocks[0].up.weight):
        with pytest.raises(WeightError, match="weight of Linear: is int8, expected no other tensor"):
            linear.weight = value
    linear.weight = linear.weight
    linear.bias = nn.Parameter(torch.ones(64))
    assert torch.equal(linear.bias, torch.ones(64))


# --- one weight under several names ----------------------------------------------------------------------------------


class Alias(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = self.body.blocks
        self.last = self.body.blocks[-1]


def test_one_module_under_several_names_is_one_site() -> None:
    model = quaff_fx.calibrate(quaff_fx.compile(Alias(), QUIET), [batch(0)])
    rows = [row for row in quaff_fx.explain(model).rows if row.stage == "int8"]
    assert [row.name for row in rows] == [f"body.blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
    assert stages_of(model).blocks == list(model.body.blocks)


class Shared(Net):
    """The second block has the weights of the first, and is fed otherwise."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("up", "down"):
            getattr(self.body.blocks[1], name).weight = getattr(self.body.blocks[0], name).weight


def test_modules_that_share_a_weight_are_one_site() -> None:
    model, twin = quaff_fx.compile(Shared(), QUIET), Shared()
    for seed in range(2):
        step(model, seed)
    expected = step(twin, 2)
    assert step(model, 2) == pytest.approx(expected, rel=1e-2)
    first, second = (block.up._modules["quaff_weight"] for block in model.body.blocks)
    assert first is second
    assert len([row for row in quaff_fx.explain(model).rows if row.stage == "int8"]) == 2
    copied = copy.deepcopy(model)
    assert copied.body.blocks[0].up._modules["quaff_weight"] is copied.body.blocks[1].up._modules["quaff_weight"]
    quaff_fx.dequantize(model)
    assert model.body.blocks[0].up.weight is model.body.blocks[1].up.weight


def test_the_activations_of_all_that_share_a_weight_choose_its_channels() -> None:
    model = quaff_fx.compile(Shared(), QUIET | {"outlier_budget": 0.07})
    with torch.no_grad():
        model.body.blocks[0].down.bias[5] += 100  # an outlier of the second block alone
    quaff_fx.calibrate(model, [batch(0)])
    assert 5 in quaff_fx.explain(model).rows[0].outlier_channels


# --- frozen adapters --------------------------------------------------------------------------------------------------


def test_the_parameters_of_a_frozen_adapter_are_no_sites(tmp_path) -> None:
    config = LoraConfig(target_modules=["up", "down"], init_lora_weights=False)
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    model = quaff_fx.compile(PeftModel.from_pretrained(Net(), tmp_path), QUIET)
    quaff_fx.calibrate(model, [batch(0)])
    reasons = {row.weight: row.reason for row in quaff_fx.explain(model).rows}
    assert {reason for name, reason in reasons.items() if "lora" in name} == {"belongs to an adapter"}
    assert [row.stage for row in quaff_fx.explain(model).rows].count("int8") == 4


# --- weights that are to be trained, or are edited -------------------------------------------------------------------


def test_a_weight_that_is_unfrozen_while_calibrating_stays_float_and_trains() -> None:
    model = quaff_fx.compile(Net(), QUIET)
    step(model)
    weight = model.body.blocks[1].up.weight.requires_grad_(True)
    for seed in range(3):
        step(model, seed)
    assert model.body.blocks[1].up.weight is weight
    assert weight.grad is not None
    rows = {row.name: row for row in quaff_fx.explain(model).rows}
    assert rows["body.blocks.1.up"].reason == "weight is trainable"
    assert rows["body.blocks.1.down"].stage == "int8"


def test_a_part_of_an_int8_weight_that_is_to_be_trained_stops_the_next_forward() -> None:
    model = converted()
    for name, parameter in model.named_parameters():
        if name.endswith("w_scale"):
            parameter.requires_grad_(True)
    with pytest.raises(WeightError, match=r"body.blocks.0.up.weight: is int8 and is to be trained .*dequantize"):
        model(batch())
    for name, parameter in model.named_parameters():
        if name.endswith("w_scale"):
            parameter.requires_grad_(False)
    step(model)


@pytest.mark.parametrize("part", ["w_int8", "w_scale", "w_outlier"])
def test_an_edit_in_place_stops_the_next_forward(part) -> None:
    model = converted()
    weight = model.body.blocks[0].up._modules["quaff_weight"]._parameters[part]
    with torch.no_grad():
        weight.copy_(weight.clone())  # the same values again
    step(model)
    with torch.no_grad():
        weight.view(-1)[0] += 1
    with pytest.raises(WeightError, match=r"body.blocks.0.up.weight: is int8 and was edited in place"):
        model(batch())


def test_a_state_dict_that_is_loaded_is_no_edit() -> None:
    model, other = converted(), converted()
    model.load_state_dict(other.state_dict())
    step(model)


@pytest.mark.parametrize("strict", [True, False])
def test_a_float_state_dict_is_refused_by_an_int8_model(strict) -> None:
    model, before = converted(), converted().state_dict()
    with pytest.raises(RuntimeError, match=r"body.blocks.0.up.weight: is a float weight for one that is int8"):
        model.load_state_dict(Net().state_dict(), strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "quaff" in name)


def test_a_float_state_dict_loads_while_calibrating() -> None:
    model, other = quaff_fx.compile(Net(), QUIET), Net()
    with torch.no_grad():
        other.body.blocks[0].up.weight.mul_(2)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.body.blocks[0].up.weight, other.body.blocks[0].up.weight)


# --- averages and copies ----------------------------------------------------------------------------------------------


def averages(model: nn.Module, average: nn.Module) -> None:
    with torch.no_grad():
        for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
            if theirs.requires_grad:
                ours.mul_(0.5).add_(theirs, alpha=0.5)


@pytest.mark.parametrize("is_early", [True, False], ids=["before the conversion", "after it"])
def test_an_average_of_what_is_trained(is_early) -> None:
    model = quaff_fx.compile(Net(), QUIET) if is_early else converted()
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(4):
        step(model, seed)
        optimizer.step()
        averages(model, average)
    assert len(int8_modules(average)) == 4
    with torch.no_grad():
        model(batch()), average(batch())
    assert not torch.equal(average.head.weight, model.head.weight)


@pytest.mark.parametrize("is_early", [True, False], ids=["before the conversion", "after it"])
def test_averaged_model_of_torch(is_early) -> None:
    model = quaff_fx.compile(Net(), QUIET) if is_early else converted()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for seed in range(4):
        step(model, seed)
        average.update_parameters(model)
    with torch.no_grad():
        torch.testing.assert_close(average(batch()), model(batch()))


def test_an_average_that_changes_int8_values_is_refused() -> None:
    model = converted()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for seed in range(2):
        step(model, seed)
        average.update_parameters(model)
    with pytest.raises(WeightError, match=r"was edited in place, .* must leave out what does not require a gradient"):
        average(batch())


def test_a_copy_that_trains_on_its_own_calibrates_on_its_own() -> None:
    model = quaff_fx.compile(Net(), QUIET)
    step(model)
    copied = copy.deepcopy(model)
    step(copied, 5)
    step(model, 1)
    step(model, 2)
    assert (stages_of(model).stage, stages_of(copied).stage) == ("quantize", "observe")


def test_a_copy_of_a_block_brings_no_model_along() -> None:
    model = converted()
    assert (
        len(pickle.dumps(model.body.blocks[0]))
        < 1.5 * sum(t.numel() * t.element_size() for t in model.body.blocks[0].state_dict().values()) + 20_000
    )
    assert type(model.body.blocks[0]).__name__ == Block.__name__
    assert isinstance(model.body.blocks[0], Block)


# --- modules that an adapter saves ------------------------------------------------------------------------------------


def test_modules_to_save_of_an_int8_module_are_trained_in_float() -> None:
    model = get_peft_model(Net(), LoraConfig(target_modules=["up"]))
    quaff_fx.calibrate(quaff_fx.compile(model, QUIET), [batch(0)])
    model.add_adapter("other", LoraConfig(target_modules=["up"], modules_to_save=["down"]))
    model.set_adapter("other")
    model(batch()).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save.other.weight" in name for name in trained)
    assert all(p.grad is not None for p in trained.values())
    wrapper = model.base_model.model.body.blocks[0].down
    dequantized = owners.float_copy(wrapper.original_module).weight
    assert torch.equal(wrapper.modules_to_save["other"].weight, dequantized)
