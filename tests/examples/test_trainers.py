"""The programs with a Trainer, with and without their one line, on a tiny random model."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.examples.test_finetune import EXAMPLES

import causal_lm_trainer  # isort: skip  (test_finetune makes the folder importable)
import classification_trainer  # isort: skip

import quaff_fx

pytestmark = [pytest.mark.compile, pytest.mark.slow]

STEPS = 14  # eight calibrate


def losses(program: ModuleType, folder: Path, output: Path, *more: str) -> tuple[list[float], float]:
    options = {"model": folder, "output": output, "steps": STEPS, "max-tokens": 160, "learning-rate": 1e-2}
    torch._dynamo.pgo.reset_code_state()
    program.main([word for name, value in options.items() for word in (f"--{name}", str(value))] + list(more))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert (output / "adapter_model.safetensors").is_file()
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return [entry["loss"] for entry in history if "loss" in entry], evaluations[-1]


@pytest.mark.compatibility("Training loops")
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(causal_lm_trainer, id="examples/causal_lm_trainer.py"),
        pytest.param(classification_trainer, id="examples/classification_trainer.py"),
    ],
)
def test_losses_follow_the_program_without_the_line(program, folder, tmp_path):
    expected, expected_evaluation = losses(program, folder, tmp_path / "float", "--no-quaff")
    got, evaluation = losses(program, folder, tmp_path / "quantized")
    assert len(expected) == STEPS
    assert got[:8] == pytest.approx(expected[:8], rel=1e-4)
    assert got != expected
    assert got == pytest.approx(expected, rel=0.02)
    assert evaluation == pytest.approx(expected_evaluation, rel=0.02)


@pytest.mark.parametrize("name", ["causal_lm_trainer.py", "classification_trainer.py"])
def test_exactly_one_line_is_left_out(name):
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    body = source.split('"""', 2)[2]
    assert re.findall(r".*(?:no_quaff|quaff_fx).*", body) == [
        "import quaff_fx",
        "    if not options.no_quaff:",
        "        model = quaff_fx.compile(model)",
    ]
    assert callable(quaff_fx.compile)
