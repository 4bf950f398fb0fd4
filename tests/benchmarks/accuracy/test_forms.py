"""The forms of Quaff's linear that the ablations compare, against the product and against each other."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.accuracy import forms
from benchmarks.accuracy.forms import DEFAULT, PAPER_FORM, Form, FormLinear
from quaff_fx import numerics
from quaff_fx.ops import STATIC_MOMENTUM
from quaff_fx.weights import OutlierState, QuantizedWeight
from tests.data import normal, planted_outliers, sqnr_db
from tests.models import float_llama, token_ids

CHANNELS = torch.tensor([3, 17])


def linear() -> nn.Linear:
    made = nn.Linear(64, 48)
    made.weight.data, made.bias.data = normal(48, 64, seed=3, std=0.05), normal(48, seed=8)
    return made.requires_grad_(False)


def outlying(seed: int = 2) -> Tensor:
    return planted_outliers(20, 64, CHANNELS.tolist(), factor=60, seed=seed)


def layer(form: Form, activation_max: int = 127, gram: Tensor | None = None) -> FormLinear:
    frozen = linear()
    x_absmax = outlying().abs().amax(dim=0)[CHANNELS]
    w_absmax = frozen.weight[:, CHANNELS].abs().amax(dim=0)
    return FormLinear(frozen, form, activation_max, CHANNELS, x_absmax, w_absmax, gram)


def output_and_grad(module: nn.Module) -> tuple[Tensor, Tensor]:
    x = outlying(seed=5).requires_grad_()
    y = module(x)
    y.backward(normal(*y.shape, seed=6))
    assert x.grad is not None
    return y.detach(), x.grad


class Product(nn.Module):
    """The linear of quaff_fx itself, with the outlier channels of `CHANNELS`."""

    def __init__(self, form: Form, activation_max: int) -> None:
        super().__init__()
        like, frozen = layer(form), linear()
        state = OutlierState(CHANNELS, like.w_absmax, like.smoothing_scale, STATIC_MOMENTUM)
        self.quantized = QuantizedWeight(frozen.weight, 1, state, activation_max, like.block)
        self.bias = frozen.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized.linear(x, self.bias)


@pytest.mark.parametrize("limit", [127, 63])
@pytest.mark.parametrize("form", [DEFAULT, replace(PAPER_FORM, momentum=1.0)])
def test_is_the_product(form: Form, limit: int) -> None:
    for found, expected in zip(output_and_grad(layer(form, limit)), output_and_grad(Product(form, limit)), strict=True):
        # W_O has 16 bits in the product.
        assert sqnr_db(expected, found) > 60


@pytest.mark.parametrize("name", [n for n, form in forms.FORMS.items() if form.rule == "absmax rank"])
def test_every_form_is_close_to_float(name: str) -> None:
    form = forms.FORMS[name]
    gram = outlying().t() @ outlying() if form.rounding == "error feedback" else None
    y, grad = output_and_grad(layer(form, gram=gram))
    expected_y, expected_grad = output_and_grad(linear())
    assert sqnr_db(expected_y, y) > 28
    assert sqnr_db(expected_grad, grad) > 30


class TestParts:
    def noise(self, form: Form) -> float:
        """Rounding noise of the output, in dB under the signal."""
        return -sqnr_db(output_and_grad(linear())[0], output_and_grad(layer(form, 63))[0])

    def test_a_larger_exponent_leaves_less_noise(self) -> None:
        noises = [self.noise(replace(PAPER_FORM, exponent=e, momentum=1.0)) for e in (0.25, 0.5, 1.0)]
        assert noises == sorted(noises, reverse=True)

    def test_one_correction_scale_is_worse_than_one_per_row(self) -> None:
        row, one, exact = (self.noise(replace(PAPER_FORM, correction=c)) for c in ("rows", "tensor", "float"))
        assert exact <= row <= one

    def test_float_backward_is_exact_for_the_int8_weight(self) -> None:
        form = replace(DEFAULT, backward="float")
        made = layer(form)
        grad = output_and_grad(made)[1]
        weight = numerics.rotate(made.w_int8 * made.w_scale.unsqueeze(1), made.block)
        torch.testing.assert_close(grad, normal(20, 48, seed=6) @ weight, rtol=1e-4, atol=1e-5)

    def test_momentum_follows_the_activation(self) -> None:
        made = layer(replace(PAPER_FORM, momentum=0.25))
        first = made.smoothing_scale
        x = 4 * outlying(seed=5)
        made(x)
        target = made.target(x.abs().amax(dim=0)[CHANNELS])
        torch.testing.assert_close(made.smoothing_scale, 0.25 * first + 0.75 * target)

    def test_int8_correction_needs_a_finite_scale(self) -> None:
        with pytest.raises(ValueError, match="expected float"):
            layer(replace(DEFAULT, correction="rows"))


class TestRounded:
    def test_groups_have_scales_of_their_own(self) -> None:
        x = torch.cat([normal(5, 8, seed=1), 1000 * normal(5, 8, seed=2)], dim=1)
        whole, grouped = forms.rounded(x, 127), forms.rounded(x, 127, group=8)
        assert sqnr_db(x[:, :8], grouped[:, :8]) > 40 > sqnr_db(x[:, :8], whole[:, :8])

    def test_an_asymmetric_range_serves_one_sided_values(self) -> None:
        x = normal(50, 64, seed=1).abs()
        assert sqnr_db(x, forms.rounded(x, 127, is_asymmetric=True)) > sqnr_db(x, forms.rounded(x, 127)) + 5
        assert forms.rounded(torch.zeros(2, 4), 127, is_asymmetric=True).abs().max() == 0

    def test_error_feedback_lowers_the_error_of_the_output(self) -> None:
        weight, mix = normal(48, 64, seed=3), normal(64, 64, seed=4)
        x = normal(400, 64, seed=5) @ (mix * torch.linspace(0, 1, 64))
        scale = weight.abs().amax(dim=1) / 127
        fed = forms.with_error_feedback(weight, scale, x.t() @ x) * scale.unsqueeze(1)
        nearest = torch.round(weight / scale.unsqueeze(1)) * scale.unsqueeze(1)
        assert sqnr_db(x @ weight.t(), x @ fed.t()) > sqnr_db(x @ weight.t(), x @ nearest.t()) + 3


class TestRules:
    def activation(self) -> forms.Activation:
        found = forms.Activation.unseen(64, DEFAULT)
        for seed in range(4):
            x = normal(50, 64, seed=seed)
            x[:, 3] *= 8  # in all tokens
            x[0, 17] = 2000  # in one token
            if seed == 0:
                x[1, 40] = 900  # in one batch
            found.observe(x)
        return found

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            ("absmax rank", [17, 3]),
            ("100 × mean", [17, 40]),
            ("mean absmax", [17, 40]),
            ("absmax less its deviation", [17, 3]),
            ("energy", [3, 17]),
        ],
    )
    def test_chooses(self, rule: str, expected: list[int]) -> None:
        assert forms.RULES[rule](self.activation(), 2).tolist() == expected

    def test_the_threshold_may_choose_fewer(self) -> None:
        assert len(forms.by_threshold(self.activation(), 5)) == 2

    def test_a_shared_budget_goes_where_the_energy_is(self) -> None:
        concentrated, even = forms.Activation.unseen(64, DEFAULT), forms.Activation.unseen(64, DEFAULT)
        for activation, x in ((concentrated, outlying()), (even, normal(20, 64, seed=1))):
            activation.readers.append("linear")
            activation.weights = 48
            activation.observe(x)
        assert forms.shared_out([even, concentrated], [2, 2]) == [2, 2]
        concentrated.energy[:4] += 1
        assert forms.shared_out([even, concentrated], [2, 2]) == [0, 4]


class TestModel:
    def adapted(self) -> nn.Module:
        torch.manual_seed(0)
        return get_peft_model(float_llama(), LoraConfig(r=2, target_modules="all-linear")).eval()

    def test_activations_are_seen_once_with_their_readers(self) -> None:
        model = self.adapted()
        found = forms.observed(DEFAULT, model, lambda: [model(token_ids(seed=seed)) for seed in range(2)])
        names = [tuple(name.rpartition(".")[2] for name in activation.readers) for activation in found]
        assert set(names) == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
        assert all(len(activation.absmax) == 2 for activation in found)
        assert all(math.isclose(activation.energy.sum(), 2, rel_tol=1e-4) for activation in found)

    @pytest.mark.parametrize(("exempt", "expected"), [(("down_proj",), {"down_proj"}), (3, None)])
    def test_exempt_linears(self, exempt: tuple[str, ...] | int, expected: set[str] | None) -> None:
        for exempt_as in ("float", "8 bits"):
            model = self.adapted()
            form = replace(DEFAULT, exempt=exempt, exempt_as=exempt_as)
            run = partial(model, token_ids())
            forms.quantized(form, model, 63, forms.observed(form, model, run), run)
            bases = {n: m.base_layer for n, m in model.named_modules() if hasattr(m, "base_layer")}
            apart = {name for name, base in bases.items() if isinstance(base, nn.Linear) or base.activation_max == 127}
            if expected is None:
                assert len(apart) == 3
            else:
                assert apart == {name for name in bases if name.rpartition(".")[2] in expected}
