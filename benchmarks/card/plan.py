"""What is measured: the systems by name, the shapes of models, and which systems run at which shape.

Nothing here needs torch, so the program that starts all others is up at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass, replace

FLOAT32_EAGER = "float32, eager"
FLOAT32_COMPILED = "float32, compiled"
TF32_COMPILED = "TF32, compiled"
BFLOAT16_EAGER = "bfloat16, eager"
BFLOAT16_COMPILED = "bfloat16, compiled"
LLM_INT8 = ("bitsandbytes LLM.int8", "bitsandbytes LLM.int8, compiled")
NF4 = ("bitsandbytes NF4", "bitsandbytes NF4, compiled")
TORCHAO_INT8 = "torchao int8 mixed precision"
TORCHAO_FLOAT8 = "torchao float8"
QUAFF = "quaff_fx, 8 bits"
QUAFF_TF32 = "quaff_fx, 8 bits, TF32"


@dataclass(frozen=True)
class Shape:
    """Some blocks of a Llama of this shape, and a batch.

    Attributes:
        dtype: of the model: "bfloat16" or "float32". tokens: of a step, in sequences of at most 2048.
        gib: at most this much of the card's memory a system takes while it prepares, its CUDA context included; a
            rough figure, by which as many systems prepare at once as fit.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    tokens: int
    dtype: str
    gib: float

    @property
    def batch(self) -> tuple[int, int]:
        """Sequences and their length."""
        return max(1, self.tokens // 2048), min(self.tokens, 2048)

    def tiny(self) -> Shape:
        """The same with sizes for a walk through the code on a CPU."""
        return replace(self, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, tokens=32, gib=0.5)


LLAMA_8B = Shape("Llama-8B, 4096 tokens", 4096, 14336, 4, 32, 8, 4096, "bfloat16", 5.5)
LLAMA_8B_LONG = replace(LLAMA_8B, name="Llama-8B, 8192 tokens", tokens=8192, gib=8.5)
LLAMA_70B = Shape("Llama-70B, 4096 tokens", 8192, 28672, 2, 64, 8, 4096, "bfloat16", 10)
PHI_3 = Shape("Phi-3, 4096 tokens", 3072, 8192, 4, 32, 32, 4096, "bfloat16", 4)
PHI_3_FLOAT32 = Shape("Phi-3, 2048 tokens, float32", 3072, 8192, 4, 32, 32, 2048, "float32", 5)
LLAMA_1B = Shape("Llama-1B, 4096 tokens", 2048, 8192, 4, 32, 8, 4096, "bfloat16", 3)
SHAPES = {
    "8b": LLAMA_8B,
    "8b-long": LLAMA_8B_LONG,
    "phi3": PHI_3,
    "phi3-float32": PHI_3_FLOAT32,
    "70b": LLAMA_70B,
    "1b": LLAMA_1B,
}
"""By the words of the command line."""


@dataclass(frozen=True)
class Pair:
    """A system at a shape; it trains in a process of its own.

    Attributes:
        is_cold: it compiles first and alone with its like, with empty caches, so that its time to compile counts.
        has_profile: its GPU time is shown by part.
    """

    shape: Shape
    system: str
    is_cold: bool = False
    has_profile: bool = False

    @property
    def name(self) -> str:
        return f"{self.system}, {self.shape.name}"


PAIRS = (
    Pair(LLAMA_8B, QUAFF, is_cold=True, has_profile=True),
    Pair(LLAMA_8B, BFLOAT16_COMPILED, is_cold=True, has_profile=True),
    *(Pair(shape, system) for shape in (LLAMA_8B_LONG, PHI_3) for system in (QUAFF, BFLOAT16_COMPILED)),
    *(Pair(PHI_3_FLOAT32, system) for system in (QUAFF, FLOAT32_EAGER, QUAFF_TF32, TF32_COMPILED, FLOAT32_COMPILED)),
    *(Pair(LLAMA_8B, system) for system in (*NF4, TORCHAO_INT8, TORCHAO_FLOAT8, *LLM_INT8, BFLOAT16_EAGER)),
    *(Pair(shape, system) for shape in (LLAMA_70B, LLAMA_1B) for system in (QUAFF, BFLOAT16_COMPILED)),
)
"""In the order in which they are measured: what matters most comes first, should the time run out."""


def reason_missing(system: str) -> str | None:
    """Why a system cannot run here, as far as that shows without importing it."""
    package = system.split()[0]
    if package in ("bitsandbytes", "torchao") and importlib.util.find_spec(package) is None:
        return f"not installed (pip install {package})"
    return None


def selected(shapes: Collection[str], is_dry: bool) -> list[Pair]:
    """Returns the pairs at these shapes, named as in `SHAPES`; tiny ones for a dry run."""
    wanted = [SHAPES[word] for word in shapes]
    pairs = [pair for pair in PAIRS if pair.shape in wanted]
    return [replace(pair, shape=pair.shape.tiny()) for pair in pairs] if is_dry else pairs


CHECKS = (
    "kernels in use",
    "int8 product",
    "int8 product with scales",
    "int8 product with epilogue",
    "row quantizer",
    "float32",
    "bfloat16",
    "float16",
    "autocast, bfloat16",
    "autocast, float16",
    "7 bits",
    "no rotation",
    "momentum, as in the paper",
    "Conv1D",
    "checkpointing",
    "GradScaler",
    "Trainer",
    "calibrate and dequantize",
    "save and load",
    "generate",
    "move between devices",
    "no recompiles",
)
"""Those of `checks.py`, by name."""
