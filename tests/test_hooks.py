"""Hooks run whenever they are put on or taken off, while calibrating and after, on blocks and in them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import quaff_fx
from quaff_fx import calls, hosts, notices
from quaff_fx.api import stages_of
from tests.blocks import QUIET, Net, batch, converted, step
from tests.models import float_llama, token_ids, with_lora

pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* has a hook and lies in a block:quaff_fx.QuaffWarning"),
]


@pytest.fixture(scope="module")
def int8() -> Net:
    """Converted and traced without any hook."""
    model = converted()
    step(model)
    return model


@pytest.fixture
def observed() -> Net:
    model = quaff_fx.compile(Net(), QUIET | {"calibration_steps": 99})
    step(model)
    return model


@pytest.fixture(params=["calibrating", "int8"])
def model(request, int8, observed) -> Net:
    return int8 if request.param == "int8" else observed


PLACES = {"block": lambda model: model.body.blocks[1], "inside": lambda model: model.body.blocks[1].down}
KINDS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda m, a, y: seen.append(m)),
    "forward with keywords": lambda module, seen: module.register_forward_hook(
        lambda m, a, k, y: seen.append(m), with_kwargs=True
    ),
    "always": lambda module, seen: module.register_forward_hook(lambda m, a, y: seen.append(m), always_call=True),
    "pre": lambda module, seen: module.register_forward_pre_hook(lambda m, a: seen.append(m)),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda m, i, o: seen.append(m)),
    "backward pre": lambda module, seen: module.register_full_backward_pre_hook(lambda m, o: seen.append(m)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_runs_from_when_it_is_put_on_until_it_is_taken_off(model, place, kind) -> None:
    seen: list[nn.Module] = []
    target = PLACES[place](model)
    before = step(model)
    handle = KINDS[kind](target, seen)
    step(model)
    step(model)
    handle.remove()
    assert seen == [target, target]
    assert step(model) == before
    assert seen == [target, target]


@pytest.mark.parametrize("place", PLACES)
def test_what_a_hook_returns_is_the_output(model, place) -> None:
    before = step(model)
    handle = PLACES[place](model).register_forward_hook(lambda m, a, y: y * 3)
    hooked = step(model)
    handle.remove()
    assert abs(hooked - before) > 1e-3
    with torch.no_grad():
        reference = Net().requires_grad_(False)
        PLACES[place](reference).register_forward_hook(lambda m, a, y: y * 3)
        expected = float(reference(batch()).square().mean())
    assert hooked == pytest.approx(expected, rel=2e-2)


def test_a_hook_that_was_there_from_the_start_stays_with_its_own_block() -> None:
    model, seen = Net(), []
    model.body.blocks[1].down.register_forward_hook(lambda m, a, y: seen.append(m))
    quaff_fx.calibrate(quaff_fx.compile(model, QUIET), [batch()])
    assert len(seen) == 1
    step(model)
    assert seen == [model.body.blocks[1].down] * 2


def test_a_global_hook_runs_for_every_module(int8) -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    step(int8)
    handle.remove()
    step(int8)
    assert [module for module in seen if isinstance(module, nn.Linear)] == [
        *(linear for block in int8.body.blocks for linear in (block.up, block.down)),
        int8.head,
    ]


def test_hooks_that_come_and_go_each_step_compile_nothing(int8) -> None:
    step(int8)
    graphs = len(quaff_fx.graphs(int8))
    for _ in range(6):
        handle = int8.body.blocks[0].down.register_forward_hook(lambda m, a, y: None)
        step(int8)
        handle.remove()
        step(int8)
    assert len(quaff_fx.graphs(int8)) == graphs


def test_a_hook_in_a_block_that_stays_is_told_once() -> None:
    model = converted()
    model.body.blocks[0].down.register_forward_hook(lambda m, a, y: None)
    with pytest.warns(quaff_fx.QuaffWarning, match=r"body.blocks.0.down: has a hook and lies in a block") as found:
        _ = [step(model) for _ in range(2 * notices.HOOKED_LIMIT)]
    assert sum("has a hook" in str(warning.message) for warning in found) == 1


def test_a_hook_on_a_block_costs_no_compiled_code() -> None:
    model = converted()
    model.body.blocks[0].register_forward_hook(lambda m, a, y: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", quaff_fx.QuaffWarning)
        for _ in range(notices.HOOKED_LIMIT + 1):
            step(model)
    assert calls.hooked_module(model.body.blocks[0]) is None
    assert len(quaff_fx.graphs(model)) > 0


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    model = with_lora(float_llama()).eval()
    quaff_fx.compile(model, QUIET)
    return quaff_fx.calibrate(model, [{"input_ids": token_ids(seed=seed)} for seed in (0, 1)])


def test_outputs_are_captured_whenever_they_are_asked_for(llama) -> None:
    ids, twin = token_ids(), with_lora(float_llama()).eval()
    with torch.no_grad():
        llama(input_ids=ids, labels=ids)
        twin.load_state_dict({k: v for k, v in llama.state_dict().items() if "lora" in k}, strict=False)
        for _ in range(2):
            found = llama(input_ids=ids, labels=ids, output_hidden_states=True).hidden_states
            expected = twin(input_ids=ids, output_hidden_states=True).hidden_states
            assert len(found) == len(expected) == 3
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)
            assert llama(input_ids=ids, labels=ids).hidden_states is None


def test_hooks_that_capture_nothing_leave_a_block_compiled_and_its_graph_whole(llama) -> None:
    ids = token_ids()
    with torch.no_grad():
        llama(input_ids=ids, labels=ids, output_hidden_states=True)
    blocks = stages_of(llama).blocks
    assert any(module._forward_hooks for block in blocks for module in block.modules() if module is not block)
    assert [calls.hooked_module(block) for block in blocks] == [None, None]
    torch._dynamo.reset()
    graphs = len(quaff_fx.graphs(llama))
    llama.train()
    llama(input_ids=ids, labels=ids).loss.backward()
    llama.eval()
    assert len(quaff_fx.graphs(llama)) - graphs <= 2


def test_dequantize_leaves_transformers_hooks_as_they_were(llama) -> None:
    model = quaff_fx.calibrate(quaff_fx.compile(with_lora(float_llama()), QUIET), [{"input_ids": token_ids()}])
    ids = token_ids()
    with torch.no_grad():
        model(input_ids=ids, labels=ids, output_hidden_states=True)
        model(input_ids=ids, labels=ids)
        quaff_fx.dequantize(model)
        assert len(model(input_ids=ids, output_hidden_states=True).hidden_states) == 3
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks
    assert not any(hasattr(hook, "_quaff_hidden") for hook in hooks)
    assert all(map(hosts.is_idle_hook, hooks))


def test_a_forward_that_is_put_on_a_module_inside_a_block_later_runs(int8) -> None:
    before = step(int8)
    linear, called = int8.body.blocks[1].down, []
    own = linear.forward
    linear.forward = lambda x: called.append(1) or own(x) * 3
    try:
        assert step(int8) != before
        assert called
    finally:
        del linear.forward
    assert step(int8) == before
