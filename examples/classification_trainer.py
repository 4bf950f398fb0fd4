"""Fine-tunes a text classifier with LoRA and the Trainer of transformers: the topic of a question, weights in int8.

    python examples/classification_trainer.py                   # SmolLM2-135M, some minutes on two CPU cores
    python examples/classification_trainer.py --no-quaff        # the same in floating point
    python examples/classification_trainer.py --model my/model  # any model with a classification head in transformers

The questions are those of reasoning-gym. `--no-quaff` leaves out one line, the one with `quaff_fx.compile`.
"""

import argparse
import sys
from pathlib import Path

import reasoning_gym
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import quaff_fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of the checkout, which holds workloads/

from workloads.smollm2 import fetch_smollm2

TOPICS = ("family_relationships", "gsm_symbolic", "calendar_arithmetic", "knights_knaves")
HELD_OUT_QUESTIONS = 64
FIRST_TRAINING_SEED = 100_000  # question i of a data set with seed s is drawn with seed s + i

Row = dict[str, torch.Tensor]


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    set_seed(options.seed)
    path = str(fetch_smollm2()) if options.model == "smollm2" else options.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(TOPICS), dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    first = FIRST_TRAINING_SEED * (1 + options.seed)
    training = questions(tokenizer, options.steps * options.batch_size, options.max_tokens, seed=first)
    held_out = questions(tokenizer, HELD_OUT_QUESTIONS, options.max_tokens, seed=0)

    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"))
    if not options.no_quaff:
        model = quaff_fx.compile(model)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=options.steps // 10,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=options.seed,
        ),
        train_dataset=training,
        eval_dataset=held_out,
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
    trainer.save_model()
    print(f"Saved the adapter and the head to {options.output}")


def questions(tokenizer: PreTrainedTokenizerBase, count: int, max_tokens: int, seed: int) -> list[Row]:
    """Returns `count` questions, each with its topic as label, padded or cut to one length: one shape, one compile."""
    each = -(-count // len(TOPICS))
    drawn = [reasoning_gym.create_dataset(topic, size=each, seed=seed) for topic in TOPICS]
    rows = []
    for entries in zip(*drawn, strict=True):
        for label, entry in enumerate(entries):
            tokens = tokenizer(
                entry["question"], padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt"
            )
            row = {name: tokens[name][0] for name in ("input_ids", "attention_mask")}
            rows.append(row | {"labels": torch.tensor(label)})
    return rows[:count]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def parse_options(arguments: list[str]) -> argparse.Namespace:
    title, _, text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="smollm2", help="folder or model id; smollm2, the default, comes from a wheel of 93 MB")
    add("--steps", type=int, default=40, help="training steps (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="questions in a step (default: %(default)s)")
    add("--max-tokens", type=int, default=96, help="questions are padded or cut to this (default: %(default)s)")
    add("--learning-rate", type=float, default=5e-4, help="after warm-up (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, default=Path("classifier"), help="folder to save in (default: %(default)s)")
    add("--no-quaff", action="store_true", help="train in floating point")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
