"""What a person gets wrong, and what they are told; the model is left as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import quaff_fx
from quaff_fx import calls
from quaff_fx.errors import CalibrationError, ConfigError, QuaffWarning
from tests.models import Run, float_llama, tiny_llama, token_ids

QUIET = {"progress": False, "calibration_steps": 1}


def fingerprint(model: nn.Module) -> list[tuple[str, type, bool]]:
    """Everything that compile would change."""
    return [(name, type(module), calls.is_compiled(module)) for name, module in model.named_modules()]


def assert_refused(model: nn.Module, match: str, error: type[Exception] = ConfigError, config=None) -> None:
    before = fingerprint(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}
    with pytest.raises(error, match=match):
        quaff_fx.compile(model, config)
    assert fingerprint(model) == before
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


class TestRefused:
    def test_no_module(self):
        with pytest.raises(ConfigError, match=r"model: is a function, expected a torch.nn.Module"):
            quaff_fx.compile(functional.relu)

    def test_no_matrix(self):
        assert_refused(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), "has no matrix that a linear could read")

    def test_everything_trainable(self):
        assert_refused(float_llama(), r"all 15 weight matrices are trainable.*nothing to gain")

    def test_everything_excluded(self):
        assert_refused(tiny_llama(), r"15 × excluded by the config", config={"exclude": ("layers.*", "lm_head")})

    def test_compiled_by_quaff_fx(self):
        model = quaff_fx.compile(tiny_llama(), QUIET)
        assert_refused(model, "already compiled by quaff_fx")

    def test_compiled_in_place_by_torch(self):
        model = tiny_llama()
        model.base_model.model.model.layers[0].compile()
        assert_refused(model, r"layers\.0: was already compiled by torch\.compile")

    def test_compiled_by_torch(self):
        assert_refused(torch.compile(tiny_llama()), r"was already compiled by torch\.compile")

    def test_unknown_field(self):
        assert_refused(
            tiny_llama(), r"has no field 'calibration_step' \(near: calibration_steps", config={"calibration_step": 3}
        )

    def test_config_of_another_type(self):
        assert_refused(tiny_llama(), "config: is a int, expected a QuaffConfig", config=3)

    def test_pattern_that_matches_nothing(self):
        assert_refused(
            tiny_llama(), r"exclude: pattern 'down_prj' matches no layer \(near: ", config={"exclude": ("down_prj",)}
        )

    def test_unsupported_dtype(self):
        assert_refused(tiny_llama().double(), r"14 × weight is torch.float64")

    def test_unsupported_device(self):
        assert_refused(tiny_llama().to("meta"), r"14 × weight is on device meta")

    def test_explain_of_a_plain_model(self):
        with pytest.raises(ConfigError, match="was not compiled by quaff_fx"):
            quaff_fx.explain(tiny_llama())


class TestWhileCalibrating:
    def test_nan_names_the_layer_and_converts_nothing(self):
        model = quaff_fx.compile(tiny_llama(), QUIET)
        layer = model.base_model.model.model.layers[1]
        good = layer.post_attention_layernorm.weight.data.clone()
        layer.post_attention_layernorm.weight.data[3] = torch.nan
        with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.gate_proj\.weight: its input has NaN"):
            Run(model).step(token_ids())
        assert quaff_fx.explain(model).steps == 0
        assert quaff_fx.explain(model).stage == "observe"
        layer.post_attention_layernorm.weight.data.copy_(good)
        Run(model).step(token_ids())
        assert quaff_fx.explain(model).steps == 1

    def test_forward_that_reads_no_frozen_weight(self):
        """It is no step, and as often as it is tried; the model stays compiled and can be given back."""

        class Bypass(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)).requires_grad_(False) for _ in range(2))
                self.head = nn.Linear(4, 4)
                self.is_bypassing = True

            def forward(self, x):
                for layer in [] if self.is_bypassing else self.layers:
                    x = layer(x)
                return self.head(x)

        model, x = Bypass(), torch.randn(2, 4)
        before = fingerprint(model)
        quaff_fx.compile(model, QUIET)
        compiled = fingerprint(model)
        for _ in range(2):
            with pytest.raises(CalibrationError, match="read none of the frozen weights, expected all"):
                model(x)
            assert fingerprint(model) == compiled
            assert quaff_fx.explain(model).steps == 0
        with pytest.raises(CalibrationError, match="read none of the frozen weights"):
            quaff_fx.calibrate(model, [x])
        with torch.no_grad():
            assert model(x).shape == (2, 4)
        model.is_bypassing = False
        model(x).sum().backward()
        assert quaff_fx.explain(model).steps == 1
        quaff_fx.dequantize(model)
        assert fingerprint(model) == before
        assert model(x).shape == (2, 4)

    def test_weights_that_no_linear_reads_stay_float(self):
        """Their values are read: that much is right, and nothing is gained. A warning says so, and who reads them."""

        class Norms(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 4).requires_grad_(False)
                self.gain = nn.Parameter(torch.ones(4))

            def forward(self, x):
                return x * self.gain * self.inner.weight.norm(dim=1)

        model, x = quaff_fx.compile(nn.ModuleList([Norms(), Norms()])[0], QUIET), torch.randn(2, 4)
        with pytest.warns(QuaffWarning, match=r"no linear reads any of its 1 frozen weights \(but norm does\)"):
            model(x).sum().backward()
        weight = model.inner.weight
        with warnings.catch_warnings():
            warnings.simplefilter("error", QuaffWarning)
            model(x).sum().backward()
            model(x).sum().backward()
        assert model.inner.weight is weight
        (row,) = quaff_fx.explain(model).rows
        assert (row.stage, row.reason) == ("float", "no linear reads it")

    def test_no_batches(self):
        model = quaff_fx.compile(tiny_llama(), QUIET)
        with pytest.raises(CalibrationError, match="batches: are empty"):
            quaff_fx.calibrate(model, [])

    def test_calibrating_twice(self):
        model = quaff_fx.compile(tiny_llama(), QUIET)
        quaff_fx.calibrate(model, [token_ids()])
        with pytest.raises(CalibrationError, match="its weights are int8 already"):
            quaff_fx.calibrate(model, [token_ids()])

    def test_optimizer_over_frozen_weights_is_warned_of_once(self):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        quaff_fx.compile(model, QUIET)
        with pytest.warns(
            QuaffWarning, match=r"13 more float weights.*optimizer \(.*AdamW.*\) was built over them"
        ) as caught:
            quaff_fx.calibrate(model, [token_ids()])
        assert len([warning for warning in caught if warning.category is QuaffWarning]) == 1
        del optimizer

    def test_optimizer_over_trainable_weights_is_fine(self):
        model = tiny_llama()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        quaff_fx.compile(model, QUIET)
        with warnings.catch_warnings():
            warnings.simplefilter("error", QuaffWarning)
            quaff_fx.calibrate(model, [token_ids()])
        assert len(optimizer.param_groups[0]["params"]) == 28
