"""Which functions compute on a device."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator

import pytest
import torch

from quaff_fx.errors import QuaffWarning
from quaff_fx.kernels import cpu, cuda, dispatch, reference
from tests.cards import card
from tests.data import integers


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    functions = (dispatch.kernels_of, dispatch.warn_of, dispatch._warn_of_card)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def test_without_a_kernel_the_reference_computes_and_one_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "obstacle_to_kernel", lambda *_: cpu.Obstacle("no compiler here", "Install one."))
    device = torch.device("cpu")
    with pytest.warns(QuaffWarning, match=r"^compilation: no compiler here, expected .*\. Install one\.$"):
        kernels = dispatch.kernels_of(device)
    a, w = integers(3, 8, seed=0), integers(5, 8, seed=1)
    result = kernels.int8_linear(a, w, transpose_w=False, activation_max=127)
    assert torch.equal(result.double(), a.double() @ w.double().t())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.kernels_of(device).name == "plain torch (exact, slow)"
    assert not kernels.owns_epilogue


def test_a_cpu_has_its_own_kernel() -> None:
    if (reason := cpu.reason_unavailable()) is not None:
        pytest.skip(f"no compiled kernel: {reason}")
    kernels = dispatch.kernels_of(torch.device("cpu"))
    assert (kernels.int8_linear, kernels.quantize_activation) == (cpu.int8_linear, cpu.quantize_activation)
    assert kernels.owns_epilogue
    assert kernels.owns_rotation
    assert kernels.name == f"own kernel, {cpu.instruction_set()}"


@pytest.mark.parametrize("architecture", [None, 75])
def test_cuda_without_triton_multiplies_and_leaves_the_epilogue_to_inductor(architecture: int | None) -> None:
    """Without a card (tensors are fake then), and on Turing, whose int8 product Triton does not know."""
    with contextlib.nullcontext() if architecture is None else card(architecture):
        kernels = dispatch.kernels_of(torch.device("cuda", 0))
    assert kernels.int8_linear.keywords == {"int8_matmul": cuda.int8_matmul}  # type: ignore[attr-defined]
    assert not kernels.owns_epilogue
    assert not kernels.owns_rotation


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_without_triton_a_card_multiplies_slowly_and_one_warning_says_so(
    architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with card(architecture):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        text = rf"^CUDA device: Triton is not installed, expected it for an sm_{architecture}\. .*pip install triton$"
        with pytest.warns(QuaffWarning, match=text) as warned:
            kernels = [dispatch.kernels_of(torch.device("cuda", index)) for index in (0, 1)]
        monkeypatch.undo()
    assert len(warned) == 1, "not one for each card"
    assert {each.name for each in kernels} == {"torch._int_mm"}


def test_turing_without_triton_is_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with card(75):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert dispatch.kernels_of(torch.device("cuda", 0)).name == "torch._int_mm"
        monkeypatch.undo()


@pytest.mark.parametrize("architecture", [61, 70])
def test_cards_before_turing_take_the_contract_itself_and_one_warning_says_so(architecture: int) -> None:
    with (
        card(architecture),
        pytest.warns(QuaffWarning, match=rf"^CUDA device: is an sm_{architecture}, expected sm_75 "),
    ):
        kernels = dispatch.kernels_of(torch.device("cuda", 0))
    assert kernels.int8_linear is reference.int8_linear


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
def test_cuda_has_kernels_of_triton_that_inductor_launches(architecture: int) -> None:
    with card(architecture):
        kernels = dispatch.kernels_of(torch.device("cuda", 0))
    from quaff_fx.kernels.cuda import product, rows

    assert (kernels.int8_linear, kernels.quantize_activation) == (product.int8_linear, rows.quantize_activation)
    assert kernels.name == f"Triton, sm_{architecture}"
    assert kernels.owns_epilogue
    assert kernels.owns_quantizer
    assert kernels.launched_by_inductor
    assert kernels.outlier_operand(torch.bfloat16, 41) == (torch.bfloat16, 48)


def test_any_other_device_takes_the_contract_itself() -> None:
    kernels = dispatch.kernels_of(torch.device("meta"))
    assert kernels.int8_linear is reference.int8_linear


@pytest.mark.parametrize(
    ("bits", "device", "instructions", "expected"),
    [
        (8, "cpu", "avx2", 127),
        (7, "cuda", "avx2", 63),
        ("auto", "cpu", "avx2", 63),
        ("auto", "cpu", "avx512_vnni", 127),
        ("auto", "cpu", "generic", 127),
        ("auto", "cuda", "avx2", 127),
    ],
)
def test_activation_max_is_63_only_where_asked_or_where_8_bits_are_slow(
    bits: str | int, device: str, instructions: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "instruction_set", lambda *_: instructions)
    monkeypatch.setattr(cpu, "obstacle_to_kernel", lambda *_: None)
    assert dispatch.activation_max(bits, torch.device(device)) == expected
