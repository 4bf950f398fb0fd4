"""Tiny models and the steps that tests take with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCABULARY = 80
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def token_ids(batch: int = 2, tokens: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def float_llama(blocks: int = 2, **config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | {"num_hidden_layers": blocks} | config)))


def with_lora(model: nn.Module, **config) -> nn.Module:
    """Adds LoRA to every linear, with both factors random so that both get gradients."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | config
    return get_peft_model(model, LoraConfig(**options))


def tiny_llama(blocks: int = 2, **config) -> nn.Module:
    """The same weights for the same number of blocks, every time."""
    return with_lora(float_llama(blocks, **config)).train()


@dataclass
class Run:
    """A model and what its training steps gave."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def step(self, ids: Tensor, **kwargs) -> float:
        """One forward and backward, no update, so that every step of a run is comparable."""
        self.model.zero_grad()
        loss = self.model(input_ids=ids, labels=ids, **kwargs).loss
        loss.backward()
        self.losses.append(loss.item())
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        return loss.item()


def cosine(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Cosine similarity of two sets of gradients as one vector each."""
    assert left.keys() == right.keys()
    flat = [torch.cat([gradients[name].flatten() for name in left]) for gradients in (left, right)]
    return torch.cosine_similarity(*flat, dim=0).item()


def int8_products(graphs: tuple[str, ...]) -> list[int]:
    """How many int8 products each lowered graph holds."""
    return [graph.count("torch.ops.quaff.int8_linear.default(") for graph in graphs]


def chat_llama() -> LlamaForCausalLM:
    """A tiny random Llama for the words of a `trained_tokenizer`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=2, **sizes, **ends))


def trained_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer of 512 tokens with a chat template; it pads with its end-of-turn token."""
    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )
