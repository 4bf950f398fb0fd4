"""How closely the quantized model follows float32 before any tuning: held-out loss and gradient of the adapters.

    python benchmarks/fidelity.py

For each way of treating outlier channels: the change of the mean loss over float32 (paired, with its standard error
over batches) and the cosine similarity of the gradient of all adapter parameters, per batch. Batches are held-out word
problems, the loss counts all tokens. The products run eagerly, which gives the numbers of the compiled model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import quaff_fx
from examples import smollm2, word_problems
from quaff_fx import calls
from quaff_fx.api import stages_of

PAPER = {"smoothing": "momentum"}
CONFIGS: dict[str, dict[str, object]] = {
    "plain per-token int8": {"outlier_budget": 0.0},
    "paper: √ scale, 100 × mean, 1 %": PAPER | {"outlier_rule": "mean_multiple", "outlier_budget": 0.01},
    "√ scale, largest 1 %": PAPER | {"outlier_budget": 0.01},
    "√ scale, largest 3 %": PAPER | {"outlier_budget": 0.03},
    "split, largest 1 %": {"outlier_budget": 0.01},
    "split, largest 3 % (default)": {},
    "split, largest 5 %": {"outlier_budget": 0.05},
    "split, largest 3 %, down_proj in float": {"exclude": ("lm_head", "down_proj")},
}


def adapted_model(name: str) -> tuple[nn.Module, object]:
    """The model with LoRA on all block linears, both factors random and small: every adapter has a gradient."""
    model, tokenizer = smollm2.load_model(name)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter *= 0.05
    return model.eval(), tokenizer


def losses_and_gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Loss per batch, and the gradient of all trainable parameters per batch as one vector."""
    losses, gradients = [], []
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, word_problems.IGNORED_LABEL)
        model.zero_grad()
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return torch.tensor(losses), gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="model id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--batches", type=int, default=8, help="held-out batches (default: 8)")
    parser.add_argument("--batch-size", type=int, default=2, help="problems per batch (default: 2)")
    parser.add_argument("--max-tokens", type=int, default=192, help="tokens per problem, padded (default: 192)")
    parser.add_argument("--calibration-batches", type=int, default=8, help="default: 8")
    options = parser.parse_args()

    model, tokenizer = adapted_model(options.model)
    sizes = (options.batch_size, options.max_tokens)
    held_out = word_problems.held_out_batches(tokenizer, options.batches, *sizes)
    calibration = word_problems.training_batches(tokenizer, options.calibration_batches, *sizes, seed=0)
    float_losses, float_gradients = losses_and_gradients(model, held_out)

    rows = []
    runs = [(name, config, bits) for name, config in CONFIGS.items() for bits in (8, 7)]
    for name, config, bits in tqdm(runs, desc="configs"):
        model, _ = adapted_model(options.model)
        quaff_fx.compile(model, {"progress": False, "activation_bits": bits} | config)
        quaff_fx.calibrate(
            model, [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in calibration]
        )
        for block in stages_of(model).blocks:
            calls.install(block, calls.call_eagerly)
        losses, gradients = losses_and_gradients(model, held_out)
        delta = losses - float_losses
        cosines = torch.stack(
            [torch.cosine_similarity(a, b, dim=0) for a, b in zip(gradients, float_gradients, strict=True)]
        )
        explanation = quaff_fx.explain(model)
        rows.append(
            (
                name,
                bits,
                f"{delta.mean():+.4f} ± {delta.std() / len(delta) ** 0.5:.4f}",
                f"{cosines.mean():.4f}",
                f"{cosines.min():.4f}",
                f"{explanation.bytes_after / explanation.bytes_before:.3f}",
            )
        )
    headers = ("method", "bits", "Δ loss over float32", "gradient cosine", "worst batch", "weight bytes / float32")
    print(f"float32 loss {float_losses.mean():.4f}, {len(held_out)} batches of {sizes[0]} × {sizes[1]} tokens")
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
