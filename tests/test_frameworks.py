"""Training loops of others: Seq2SeqTrainer, TRL, Lightning. (`test_loops.py` has Trainer and Accelerate.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import quaff_fx
from tests.architectures import t5
from tests.models import float_llama, token_ids, with_lora
from tests.test_loops import assert_curve_follows

pytestmark = [pytest.mark.compile, pytest.mark.slow]

TWO_STEPS = {"progress": False, "calibration_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def shapes_are_static_at_first() -> None:
    torch._dynamo.pgo.reset_code_state()


def learner() -> nn.Module:
    """Weights five times as large as usual, so that an adapter of rank 4 learns something in some steps."""
    model = float_llama(initializer_range=0.1)
    model.enable_input_require_grads()
    return with_lora(model).train()


ARGUMENTS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "seed": 0,
}


def losses_of(trainer: object) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.compatibility("Training loops", "Seq2SeqTrainer (T5), predict_with_generate")
def test_seq2seq_trainer(tmp_path):
    def train(model: nn.Module, folder: Path) -> list[float]:
        rows = [
            {"input_ids": source, "labels": target}
            for source, target in zip(token_ids(), token_ids(tokens=12, seed=2), strict=True)
        ]
        trainer = Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(output_dir=str(folder), predict_with_generate=True, **ARGUMENTS),
            train_dataset=rows * 6,
        )
        trainer.train()
        questions = [{"input_ids": row["input_ids"]} for row in rows]
        predictions = trainer.predict(questions, max_new_tokens=5, min_new_tokens=5)
        assert predictions.predictions.shape[0] == 2
        return losses_of(trainer)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return t5().train()

    expected = train(build(), tmp_path / "float")
    model = quaff_fx.compile(build(), TWO_STEPS)
    assert_curve_follows(train(model, tmp_path / "quantized"), expected, bound=0.02)
    assert quaff_fx.explain(model).int8_share > 0.8


@pytest.mark.compatibility("Training loops", "TRL SFTTrainer")
def test_trl_sft_trainer(tmp_path):
    reason = "TRL is no dependency of the tests: pip install quaff_fx[frameworks]"
    trl = pytest.importorskip("trl", reason=reason)
    datasets = pytest.importorskip("datasets", reason=reason)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(number): number for number in range(80)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0")

    def train(model: nn.Module, folder: Path) -> list[float]:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(output_dir=str(folder), bf16=False, gradient_checkpointing=False, **ARGUMENTS),
            train_dataset=datasets.Dataset.from_dict({"input_ids": token_ids().tolist() * 6}),
            processing_class=tokenizer,
        )
        trainer.train()
        return losses_of(trainer)

    expected = train(learner(), tmp_path / "float")
    model = quaff_fx.compile(learner(), TWO_STEPS)
    assert_curve_follows(train(model, tmp_path / "quantized"), expected)
    assert quaff_fx.explain(model).int8_share > 0.8


@pytest.mark.compatibility("Training loops", "Lightning")
def test_lightning():
    lightning = pytest.importorskip(
        "pytorch_lightning", reason="Lightning is no dependency of the tests: pip install quaff_fx[frameworks]"
    )

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.losses: list[float] = []

        def training_step(self, ids, _):
            loss = self.model(input_ids=ids, labels=ids).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train(model: nn.Module) -> list[float]:
        module = Module(model)
        trainer = lightning.Trainer(
            max_steps=6,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
        )
        trainer.fit(module, torch.utils.data.DataLoader(token_ids().repeat(6, 1), batch_size=2))
        return module.losses

    expected = train(learner())
    model = quaff_fx.compile(learner(), TWO_STEPS)
    assert_curve_follows(train(model), expected)
    assert quaff_fx.explain(model).int8_share > 0.8
