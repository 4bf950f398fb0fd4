"""What 8 and 7 bits make of the gradient of logits, by how many of its values are kept apart.

    python -m benchmarks.head_gradient             # SmolLM2-135M, about a minute on two cores

The gradient of a cross entropy of real text goes through the head's weight in int8, as `quaff::linear_grad_input` does
it, and is compared to the product in float.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from quaff_fx import numerics
from quaff_fx.kernels import reference
from workloads import smollm2

DOCS = Path(__file__).resolve().parent.parent / "docs"
COUNTS = (0, 1, 8, 16, numerics.GRAD_OUTLIERS, 64)
BITS = {8: 127, 7: 63}


def text() -> str:
    """Prose at hand: the project's own pages."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))


@torch.no_grad()
def gradient_of_logits(name: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the summed loss of `tokens` tokens, (T, N), and the weight of the head, (N, K)."""
    model, tokenizer = smollm2.load_model(name)
    ids = tokenizer(text(), return_tensors="pt")["input_ids"][:, : tokens + 1]
    probabilities = model(input_ids=ids[:, :-1], use_cache=False).logits[0].float().softmax(dim=-1)
    labels = torch.nn.functional.one_hot(ids[0, 1:], probabilities.shape[1])
    return probabilities - labels, model.get_output_embeddings().weight.float()


def rows(grad: Tensor, weight: Tensor, counts: tuple[int, ...] = COUNTS) -> list[list[object]]:
    """Returns for each count and number of bits: cosine of the whole gradient, lowest of a token, relative error."""
    expected = grad @ weight
    rotation = numerics.rotation_block(weight.shape[1], 64)
    w_int8, w_scale = numerics.quantize_weight(weight, rotation)
    found: list[list[object]] = []
    for count in counts:
        row: list[object] = [count]
        for q in BITS.values():
            product = grad_input(grad, w_int8, w_scale, q, rotation, count)
            cosines = torch.cosine_similarity(product, expected, dim=1)
            whole = torch.cosine_similarity(product.flatten(), expected.flatten(), dim=0)
            row += [f"{whole:.5f}", f"{cosines.min():.4f}", f"{(product - expected).norm() / expected.norm():.4f}"]
        found.append(row)
    return found


def grad_input(grad: Tensor, w_int8: Tensor, w_scale: Tensor, q: int, rotation: int, count: int) -> Tensor:
    """The gradient of the head's activation, (T, K), in plain torch."""
    if count == 0:
        g_int8, g_scale = numerics.quantize_gradient(grad, w_scale, q)
        apart = torch.zeros(())
    else:
        g_int8, g_scale, index, rest = numerics.quantize_gradient_of_logits(grad, w_scale, q, count)
        apart = torch.einsum("tc,tck->tk", rest, w_int8[index].float())
    product = reference.int8_matmul(g_int8, w_int8, transpose_w=True) * g_scale.unsqueeze(1)
    return numerics.rotate(product + apart, rotation)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.head_gradient",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="folder or model id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, default=256, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        parser.error(f"argument --tokens: is {options.tokens}, expected at least 1.")
    disable_progress_bar()
    grad, weight = gradient_of_logits(options.model, options.tokens)
    names = [f"{what}, {bits} bits" for bits in BITS for what in ("cosine", "lowest of a token", "relative error")]
    print(tabulate(rows(grad, weight), headers=["kept apart", *names], tablefmt="github", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
