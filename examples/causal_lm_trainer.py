"""Fine-tunes a causal language model with LoRA and the Trainer of transformers: word problems, frozen weights in int8.

    python examples/causal_lm_trainer.py                   # SmolLM2-135M, some minutes on two CPU cores
    python examples/causal_lm_trainer.py --no-quaff        # the same in floating point
    python examples/causal_lm_trainer.py --model my/model  # any causal language model: a folder, or an id on a hub

`--no-quaff` leaves out one line, the one with `quaff_fx.compile`.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

import quaff_fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of the checkout, which holds workloads/

from workloads.smollm2 import load_model
from workloads.word_problems import Batch, held_out_batches, training_batches

HELD_OUT_BATCHES = 8


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    set_seed(options.seed)
    model, tokenizer = load_model(options.model)
    shape = (options.batch_size, options.max_tokens)
    training = rows(training_batches(tokenizer, options.steps, *shape, seed=options.seed))
    held_out = rows(held_out_batches(tokenizer, HELD_OUT_BATCHES, *shape))

    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
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
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 2),
            save_strategy="no",
            report_to=[],
            seed=options.seed,
        ),
        train_dataset=training,
        eval_dataset=held_out,
    )
    trainer.train()
    metrics = trainer.evaluate()
    metrics["eval_perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_state()
    trainer.save_model()
    print(f"Saved the adapter to {options.output}")


def rows(batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
    """Returns the single problems of batches: Trainer makes batches of its own."""
    return [dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True)]


def parse_options(arguments: list[str]) -> argparse.Namespace:
    title, _, text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="smollm2", help="folder or model id; smollm2, the default, comes from a wheel of 93 MB")
    add("--steps", type=int, default=40, help="training steps (default: %(default)s)")
    add("--batch-size", type=int, default=2, help="problems in a step (default: %(default)s)")
    add("--max-tokens", type=int, default=192, help="problems are padded to this, longer ones left out (192)")
    add("--learning-rate", type=float, default=5e-4, help="after warm-up (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, default=Path("adapter"), help="folder to save the adapter in (default: %(default)s)")
    add("--no-quaff", action="store_true", help="train in floating point")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
