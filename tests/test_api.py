"""What a person calls, what they get wrong, and what they are told; the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import quaff_fx
from quaff_fx import calls
from quaff_fx.errors import CalibrationError, ConfigError
from tests.models import float_llama, tiny_llama, token_ids

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
        assert_refused(tiny_llama().double(), r"15 × weight is torch.float64")

    def test_unsupported_device(self):
        assert_refused(tiny_llama().to("meta"), r"15 × weight is on device meta")


class TestCalibrate:
    @pytest.mark.parametrize(
        "batch",
        [{"input_ids": token_ids()}, (token_ids(),), [token_ids()], token_ids()],
        ids=lambda b: type(b).__name__,
    )
    def test_batches_are_passed_as_what_they_are(self, batch):
        model, expected = (quaff_fx.compile(tiny_llama(), QUIET) for _ in range(2))
        assert quaff_fx.calibrate(model, [batch]) is model
        quaff_fx.calibrate(expected, [token_ids()], forward=lambda model, ids: model(input_ids=ids, labels=ids))
        assert quaff_fx.explain(model).rows == quaff_fx.explain(expected).rows
        assert model.training

    def test_an_error_in_a_batch_leaves_the_model_to_another_call(self):
        model = quaff_fx.compile(tiny_llama(), QUIET).eval()
        with pytest.raises(ValueError, match="input_ids"):
            quaff_fx.calibrate(model, [token_ids(), {"input_ids": None}])
        assert (quaff_fx.explain(model).stage, quaff_fx.explain(model).steps) == ("observe", 0)
        assert quaff_fx.calibrate(model, [token_ids()]) is model
        assert (quaff_fx.explain(model).stage, quaff_fx.explain(model).steps) == ("quantize", 1)
        assert not model.training

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

    def test_no_batches(self):
        model = quaff_fx.compile(tiny_llama(), QUIET)
        with pytest.raises(CalibrationError, match="batches: are empty"):
            quaff_fx.calibrate(model, [])

    def test_calibrating_twice(self):
        model = quaff_fx.compile(tiny_llama(), QUIET)
        quaff_fx.calibrate(model, [token_ids()])
        with pytest.raises(CalibrationError, match="its weights are int8 already"):
            quaff_fx.calibrate(model, [token_ids()])


class TestDequantize:
    def test_a_model_that_was_not_compiled_is_refused(self):
        with pytest.raises(ConfigError, match="was not compiled by quaff_fx, expected a compiled one"):
            quaff_fx.dequantize(tiny_llama())

    def test_before_the_conversion_the_weights_are_the_original_ones(self):
        model, before = tiny_llama(), tiny_llama()
        weights = dict(model.named_parameters())
        assert quaff_fx.dequantize(quaff_fx.compile(model, QUIET)) is model
        assert fingerprint(model) == fingerprint(before)
        assert all(weight is weights[name] for name, weight in model.named_parameters())
        quaff_fx.compile(model, QUIET)
