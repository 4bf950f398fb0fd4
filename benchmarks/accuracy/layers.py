"""The methods that Quaff is compared with, as layers in plain torch: what lies under an adapter, in another form.

All take 8-bit weights with a scale per out-feature and activations with a scale per token, and differ in what they do
to outlier channels before that. The gradient of all is an int8 product as well, as in quaff_fx.

Sizes: tokens T, in_features K, out_features N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import int8_product, per_token_int8

WEIGHT_MAX = 127
LLM_INT8_THRESHOLD = 6.0
SMOOTHING_STRENGTH = 0.5


class Int8Product(torch.autograd.Function):
    """y (T, N) of x (T, K) and an int8 weight (N, K); Q = `activation_max`, also of the gradient.

    y  = x_scale w_scale (x_int8 w_int8ᵀ), x_int8 = round(x / x_scale), x_scale = absmax of each token's row / Q
    dx = g_scale (g_int8 w_int8), g = dy ⊙ w_scale, quantized in the same way
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_int8: Tensor, w_scale: Tensor, activation_max: int) -> Tensor:
        ctx.save_for_backward(w_int8, w_scale)
        ctx.activation_max = activation_max
        x_int8, x_scale = per_token_int8(x, activation_max)
        return int8_product(x_int8, w_int8.t()) * (x_scale * w_scale)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        w_int8, w_scale = ctx.saved_tensors
        g_int8, g_scale = per_token_int8(grad_output * w_scale, ctx.activation_max)
        return int8_product(g_int8, w_int8) * g_scale, None, None, None


class Int8Linear(nn.Module):
    """Plain W8A8: x (..., K) → y (..., N), every channel alike."""

    def __init__(self, linear: nn.Linear, activation_max: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation_max = activation_max
        self.weight, self.bias = linear.weight, linear.bias
        self.store_int8(linear.weight)

    def store_int8(self, weight: Tensor) -> None:
        """Keeps the int8 form of a weight (N, K) for the products to come."""
        w_int8, w_scale = per_row_int8(weight.detach())
        self.register_buffer("w_int8", w_int8)
        self.register_buffer("w_scale", w_scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def multiply(self, x: Tensor) -> Tensor:
        """Returns x Wᵀ, (T, N), of x (T, K)."""
        return Int8Product.apply(x, self.w_int8, self.w_scale, self.activation_max)


class LLMInt8Linear(Int8Linear):
    """LLM.int8(): the channels in which any token of the batch reaches 6 are multiplied in float.

    Source: Dettmers et al., NeurIPS 2022. There the float part has 16 bits, and the gradient is float.
    """

    def multiply(self, x: Tensor) -> Tensor:
        values = x.detach()
        outliers = (values.abs() >= LLM_INT8_THRESHOLD).any(dim=0)
        # x without its outliers, but with the gradient of all of x: that of both parts together is dy W.
        in_int8 = Int8Product.apply(x - values * outliers, self.w_int8, self.w_scale, self.activation_max)
        return in_int8 + values[:, outliers] @ self.weight[:, outliers].t()


class SmoothQuantLinear(Int8Linear):
    """SmoothQuant: (x / s) (W ⊙ s)ᵀ in int8, s_i = absmax x_iᵅ / absmax W_i¹⁻ᵅ, α = 0.5.

    Source: Xiao et al., ICML 2023. There s is one for all linears that read the same activation, so that it folds into
    the norm before them, and o_proj and down_proj have none; here each linear has its own, which is more accurate.

    Args:
        x_absmax: (K,) of the calibration; None takes that of each batch and quantizes the weight anew in each forward.
    """

    def __init__(self, linear: nn.Linear, activation_max: int, x_absmax: Tensor | None) -> None:
        super().__init__(linear, activation_max)
        self.register_buffer("smoothing_scale", None)
        if x_absmax is not None:
            self._smooth(x_absmax)

    @property
    def is_static(self) -> bool:
        return self.smoothing_scale is not None

    def multiply(self, x: Tensor) -> Tensor:
        if self.is_static:
            return super().multiply(x / self.smoothing_scale)
        s = smoothing(x.detach().abs().amax(dim=0), self.weight.detach())
        return Int8Product.apply(x / s, *per_row_int8(self.weight.detach() * s), self.activation_max)

    def _smooth(self, x_absmax: Tensor) -> None:
        self.smoothing_scale = smoothing(x_absmax, self.weight.detach())
        self.store_int8(self.weight * self.smoothing_scale)


def smoothing(x_absmax: Tensor, weight: Tensor) -> Tensor:
    """Returns SmoothQuant's s, (K,), of absmax x_i and a weight (N, K); 1 where either is zero."""
    w_absmax = weight.abs().amax(dim=0)
    s = x_absmax**SMOOTHING_STRENGTH / w_absmax ** (1 - SMOOTHING_STRENGTH)
    return torch.where((x_absmax > 0) & (w_absmax > 0), s, 1.0)


def per_row_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a weight (N, K) as int8 in ±127 and the scale of each row, (N,)."""
    w_int8, w_scale = per_token_int8(weight, WEIGHT_MAX)
    return w_int8, w_scale.squeeze(1)


def int8_weight_values(linear: nn.Linear) -> nn.Linear:
    """Makes the weight what its int8 form stands for; products stay float. Returns the same layer."""
    w_int8, w_scale = per_row_int8(linear.weight.data)
    linear.weight.data = w_int8 * w_scale.unsqueeze(1)
    return linear


def nf4_weight_values(linear: nn.Linear) -> nn.Linear:
    """Makes the weight what QLoRA's NF4 with double quantization stands for; returns the same layer.

    Products are those of bitsandbytes' `Linear4bit`, which dequantizes as well, with float32 as its compute dtype.
    """
    from bitsandbytes import functional

    parts = functional.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=True)
    linear.weight.data = functional.dequantize_4bit(*parts).to(linear.weight.dtype)
    return linear
