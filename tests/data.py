"""Activations with planted outlier channels, and float64 references written from the formulas in `docs/numerics.md`.

Nothing here calls the product code: what a test compares must have been computed twice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def planted_outliers(
    tokens: int, in_features: int, channels: list[int], factor: float, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns a normal activation (T, K) whose `channels` are `factor` times as large in every token."""
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed))
    x[:, channels] *= factor
    return x.to(dtype)


def normal(*shape: int, seed: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns a normal tensor that depends on nothing but the arguments."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def integers(*shape: int, seed: int, limit: int = 127) -> Tensor:
    """Returns uniform int8 values in ±limit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator, dtype=torch.int8)


def dequantized_rows(q: Tensor, scale: Tensor) -> Tensor:
    """Returns q * scale[:, None] in float64."""
    return q.double() * scale.double().unsqueeze(1)


def quaff_output(
    x_int8: Tensor, x_scale: Tensor, x_outlier: Tensor, w_int8: Tensor, w_scale: Tensor, w_outlier: Tensor
) -> Tensor:
    """Returns x_scale w_scale (x_int8 w_int8ᵀ) + x_outlier W_Oᵀ in float64; w_outlier is W_Oᵀ, (O, N)."""
    accumulator = (x_int8.long() @ w_int8.long().t()).double()
    scaled = accumulator * x_scale.double().unsqueeze(1) * w_scale.double()
    return scaled + x_outlier.double() @ w_outlier.double()


def quaff_error_bound(
    x: Tensor, channels: Tensor, s: Tensor, x_scale: Tensor, w_int8: Tensor, w_scale: Tensor
) -> Tensor:
    """Returns what |y - x Wᵀ| cannot exceed, (T, N) float64.

    With Ŵ = w_int8 w_scale and x̂ = x / s:  y - x Wᵀ = Σ (x_int8 x_scale - x̂) Ŵ + Σ x̂ (Ŵ - W), and rounding leaves
    at most half a scale in each bracket. One part in a thousand of it, and of the outlier product, goes to float32.
    """
    smoothing = torch.ones(x.shape[1], dtype=torch.float64)
    smoothing[channels] = s.double()
    x_hat = x.double() / smoothing
    activation_part = x_scale.double().unsqueeze(1) / 2 * dequantized_rows(w_int8, w_scale).abs().sum(dim=1)
    weight_part = x_hat.abs().sum(dim=1, keepdim=True) * w_scale.double() / 2
    float32_part = 1e-6 * x.double().abs() @ dequantized_rows(w_int8, w_scale).abs().t()
    return 1.001 * (activation_part + weight_part) + float32_part + 1e-30


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Returns the signal to quantization noise ratio in dB: 20 log10(‖reference‖ / ‖reference - approximation‖)."""
    reference, approximation = reference.double(), approximation.double()
    return float(20 * torch.log10(reference.detach().norm() / (reference - approximation).detach().norm()))
