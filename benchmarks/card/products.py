"""The products and the row quantizer alone: what `quaff::int8_linear` reaches beside cuBLAS and `torch._int_mm`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import quaff_fx  # noqa: F401 -- its ops
from benchmarks.card import device as cards

SIZES = (
    (4096, 4096, 14336),
    (4096, 14336, 4096),
    (4096, 4096, 4096),
    (4096, 4096, 1024),
    (2048, 4096, 14336),
    (8192, 4096, 14336),
    (4096, 3072, 8192),
    (4096, 8192, 28672),
)
"""(T, K, N): Llama-8B's four, the first with fewer and with more tokens, Phi-3's widest, Llama-70B's widest."""

ROWS = ((4096, 4096), (4096, 14336), (4096, 28672))
"""(T, K) of activations that are quantized."""

LOW_RANK = 64
"""Outlier columns and adapter in the epilogue; the block of the rotation as well."""


def stages(device: str, repeats: int, is_tiny: bool = False) -> Iterator[dict[str, Any]]:
    """Imports; then measures, an answer for each row."""
    yield {}
    card = torch.device(device)
    yield {**cards.description(card), "more": True}
    torch.manual_seed(0)
    for tokens, k, n in ((32, 64, 128),) if is_tiny else SIZES:
        for name, call in product_calls(tokens, k, n, card).items():
            operations = 2 * tokens * k * n
            yield {**_row(f"{k} × {n}", tokens, name, call, card, repeats, "TOPS", operations / 1e9), "more": True}
    for tokens, k in ((32, 64),) if is_tiny else ROWS:
        x = torch.randn(tokens, k, dtype=torch.bfloat16, device=card)
        moved = tokens * k * 3  # two bytes in, one out
        yield {
            **_row(str(k), tokens, "quantize and rotate", quantizer_call(x), card, repeats, "GB/s", moved / 1e6),
            "more": True,
        }
    yield {"end": True}


def _row(
    size: str,
    tokens: int,
    name: str,
    call: Callable[[], object],
    card: torch.device,
    repeats: int,
    unit: str,
    per: float,
) -> dict[str, Any]:
    """A measured row; what a kernel raises is its reason. `per`: of what a call does, so that per / ms is the rate."""
    row: dict[str, Any] = {"size": size, "tokens": tokens, "what": name, "unit": unit, "how": "CUDA graph"}
    try:
        try:
            ms = cards.milliseconds_as_graph(call, card, repeats)
        except RuntimeError as error:
            row["how"] = f"launched one by one, no graph: {_line(error)}"
            ms = cards.milliseconds(call, card, repeats)
    except Exception as error:  # one shape that a kernel refuses leaves the others
        return {**row, "reason": f"{type(error).__name__}: {_line(error)}"}
    return {**row, "ms": ms, "rate": per / ms}


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def product_calls(tokens: int, k: int, n: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Returns forward (T, K) → (T, N) and backward (T, N) → (T, K) in every way, on operands of their own."""
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    w_bfloat16 = w.to(torch.bfloat16)
    calls: dict[str, Callable[[], Tensor]] = {}
    for direction, reduction, columns, right in (("forward", k, n, w.t()), ("backward", n, k, w)):
        is_backward = direction == "backward"
        a = torch.randint(-127, 128, (tokens, reduction), dtype=torch.int8, device=device)
        right_bfloat16 = w_bfloat16 if is_backward else w_bfloat16.t()
        calls[f"{direction}, bfloat16"] = partial(torch.mm, a.to(torch.bfloat16), right_bfloat16)
        calls[f"{direction}, _int_mm, bare int32"] = partial(torch._int_mm, a, right)
        calls[f"{direction}, quaff::int8_linear"] = partial(
            torch.ops.quaff.int8_linear,
            a,
            w,
            is_backward,
            torch.rand(tokens, device=device),
            None if is_backward else torch.rand(n, device=device),
            torch.randn(tokens, LOW_RANK, device=device, dtype=torch.bfloat16),
            torch.randn(LOW_RANK, columns, device=device, dtype=torch.bfloat16),
            None,
            torch.bfloat16,
            127,
            LOW_RANK if is_backward else 1,
        )
    return calls


def quantizer_call(x: Tensor) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Quantizes x with one outlier channel in a hundred, as the default config has them."""
    count = max(1, x.shape[1] // 100)
    channels = torch.randperm(x.shape[1], device=x.device)[:count].sort().values
    smoothing = torch.full((count,), torch.inf, device=x.device)
    return partial(torch.ops.quaff.quantize_rows, x, channels, smoothing, 127, LOW_RANK)
