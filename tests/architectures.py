"""One tiny random model of each architecture that is tested, with what can be trained, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from tests.models import VOCABULARY, token_ids, with_lora

Batch = dict[str, Tensor]

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}

OUTSIDE = "outside the repeated blocks (scope='blocks')"
THREE_DIMENSIONS = "weight has 3 dimensions, a linear's has 2"
IN_ATTENTION = "inside nn.MultiheadAttention, which is traced as one operation"


@dataclass(frozen=True)
class Architecture:
    """How to make a model and a batch, and what is to become of its frozen weights.

    Attributes:
        build: returns the model with its trainable parameters, the same weights every time.
        batch: returns keywords for a forward that gives a loss.
        int8_share: of all linear multiply-adds, adapters included. left_alone: why frozen weights stay in float.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    int8_share: float
    left_alone: frozenset[str] = frozenset()

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().train()


def floats(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal_batch() -> Batch:
    return {"input_ids": token_ids(), "labels": token_ids()}


def classification_batch() -> Batch:
    return {"input_ids": token_ids(), "labels": torch.tensor([0, 2])}


def image_batch() -> Batch:
    return {"pixel_values": floats(2, 3, 16, 16), "labels": torch.tensor([0, 2])}


def translation_batch() -> Batch:
    return {"input_ids": token_ids(), "labels": token_ids(tokens=12, seed=2)}


def speech_batch() -> Batch:
    return {"input_features": floats(2, 8, 40), "labels": token_ids(tokens=12)}


def lora(model: nn.Module, **options: object) -> nn.Module:
    """With LoRA, and a first block whose input needs a gradient like that of the others, so that they share a graph."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return with_lora(model, **options)


def decoder(name: str, config: str = "", **changes: object) -> nn.Module:
    settings = getattr(transformers, f"{config or name}Config")(**(DECODER | changes))
    return getattr(transformers, f"{name}ForCausalLM")(settings)


def moe() -> nn.Module:
    model = decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    return lora(model, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def gpt2() -> nn.Module:
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return lora(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **no_dropout)), fan_in_fan_out=True)


def opt() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "ffn_dim": 96, "word_embed_proj_dim": 48, "dropout": 0.0}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return lora(transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, **layers)))


def classifier(name: str, **changes: object) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**(ENCODER | {"vocab_size": VOCABULARY} | changes))
    return lora(getattr(transformers, f"{name}ForSequenceClassification")(config), task_type="SEQ_CLS")


def vit() -> nn.Module:
    config = transformers.ViTConfig(**ENCODER, image_size=16, patch_size=4)
    model = transformers.ViTForImageClassification(config)
    return lora(model, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"])


def t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return lora(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ends, dropout_rate=0.0)))


def whisper() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 48, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "dropout": 0.0}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    lengths = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return lora(
        transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **layers, **lengths, **ids))
    )


class WithLoss(nn.Module):
    """A plain model in the form of those of transformers: its keywords and a loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, labels: Tensor, **inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=functional.mse_loss(self.inner(**inputs), labels))


def torch_transformer() -> nn.Module:
    model = WithLoss(nn.Transformer(48, 4, 2, 2, 96, dropout=0.0, batch_first=True))
    return lora(model, target_modules=["linear1", "linear2"])


def torch_transformer_batch() -> Batch:
    src, tgt = floats(2, 10, 48).requires_grad_(), floats(2, 6, 48, seed=2).requires_grad_()
    return {"src": src, "tgt": tgt, "labels": floats(2, 6, 48, seed=3)}


class Mlp(nn.Module):
    """Two frozen linears, no repeated blocks, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 64).requires_grad_(False)
        self.second = nn.Linear(64, 48).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(64))
        self.head = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)) * self.gain)))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(48, 48).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(48))

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(x) * self.gain))


class Tied(nn.Module):
    """The output weight is that of the embedding, and two more linears share one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 48)
        self.own = nn.Linear(48, 48)
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.second.weight = self.first.weight
        self.head = nn.Linear(48, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(48))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * self.gain
        return self.head(self.second(torch.tanh(self.first(torch.tanh(self.own(x))))))


def plain(model: type[nn.Module], int8_share: float, *shape: int, out: int = 48, **more: object) -> Architecture:
    def batch() -> Batch:
        return {"x": floats(*shape), "labels": floats(*shape[:-1], out, seed=2)}

    return Architecture(lambda: WithLoss(model()), batch, int8_share, **more)


def tied_batch() -> Batch:
    return {"ids": token_ids(), "labels": floats(2, 24, VOCABULARY)}


HEAD = frozenset({OUTSIDE})
ARCHITECTURES = {
    "Llama": Architecture(lambda: lora(decoder("Llama")), causal_batch, 0.806, HEAD),
    "Phi-3": Architecture(lambda: lora(decoder("Phi3")), causal_batch, 0.824, HEAD),
    "OPT": Architecture(opt, causal_batch, 0.8, frozenset({"tied to model.decoder.embed_tokens.weight"})),
    "GPT-2 (Conv1D)": Architecture(gpt2, causal_batch, 0.847, frozenset({"tied to transformer.wte.weight"})),
    "Mistral": Architecture(lambda: lora(decoder("Mistral")), causal_batch, 0.806, HEAD),
    "Qwen3": Architecture(lambda: lora(decoder("Qwen3")), causal_batch, 0.806, HEAD),
    "Gemma 3": Architecture(
        lambda: lora(decoder("Gemma3", "Gemma3Text", query_pre_attn_scalar=12, sliding_window=16)),
        causal_batch,
        0.806,
        frozenset({"tied to model.embed_tokens.weight"}),
    ),
    "Qwen3-MoE": Architecture(moe, causal_batch, 0.187, HEAD | {THREE_DIMENSIONS}),
    "BERT": Architecture(lambda: classifier("Bert"), classification_batch, 0.870, frozenset({OUTSIDE})),
    "RoBERTa": Architecture(
        lambda: classifier("Roberta", max_position_embeddings=66), classification_batch, 0.871, frozenset({OUTSIDE})
    ),
    "T5": Architecture(t5, translation_batch, 0.849, frozenset({"tied to shared.weight"})),
    "ViT": Architecture(
        vit, image_batch, 0.812, frozenset({OUTSIDE, THREE_DIMENSIONS, "weight has 4 dimensions, a linear's has 2"})
    ),
    "Whisper": Architecture(
        whisper, speech_batch, 0.775, frozenset({THREE_DIMENSIONS, "tied to model.decoder.embed_tokens.weight"})
    ),
    "nn.Transformer": Architecture(torch_transformer, torch_transformer_batch, 0.381, frozenset({IN_ATTENTION})),
    "MLP without blocks": plain(Mlp, 0.941, 12, 48, out=8),
    "a linear called twice": plain(CalledTwice, 1.0, 12, 48),
    "tied weights": Architecture(
        lambda: WithLoss(Tied()),
        tied_batch,
        0.643,
        frozenset({"tied to inner.embedding.weight"}),
    ),
    "inputs of 2 dimensions": plain(Mlp, 0.941, 12, 48, out=8),
    "inputs of 3 dimensions": plain(Mlp, 0.941, 2, 6, 48, out=8),
    "inputs of 4 dimensions": plain(Mlp, 0.941, 2, 2, 3, 48, out=8),
}
