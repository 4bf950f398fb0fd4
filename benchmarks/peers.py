"""The systems that `step.py` compares: each a function that makes a float32 model with LoRA adapters its own.

Every system gets the same adapted model and changes only what lies under the adapters, so all train the same parameters
from the same values. What cannot run here says why, and so stands in the table's footer instead of missing in silence.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import quaff_fx

OUTLIER_THRESHOLD = 100.0
OUTLIER_BUDGET = 0.01
MOMENTUM = 0.1
"""The three of Quaff's own code; the momentum weighs the old smoothing scale."""


@dataclass(frozen=True)
class System:
    """One way to train.

    Attributes:
        name: in the table.
        prepare: takes the adapted float32 model in training mode and returns the model to train.
        reason_missing: why this cannot run here, None if it can. A system is not prepared if there is a reason.
        calibrates: the first training step runs in float and is observed, the second is the first real one.
        is_float32: one of those that the others are compared with.
        activation_max: of the int8 products of `quaff_fx`, None for other systems.
    """

    name: str
    prepare: Callable[[nn.Module], nn.Module]
    reason_missing: Callable[[], str | None] = lambda: None
    calibrates: bool = False
    is_float32: bool = False
    activation_max: int | None = None


# --- floating point ----------------------------------------------------------------------------------------------


def eager(model: nn.Module) -> nn.Module:
    """Returns the model as it is."""
    return model


def compiled(model: nn.Module) -> nn.Module:
    """Compiles each repeated block in place: one graph for all of them."""
    for block in blocks(model):
        block.compile()
    return model


def compiled_whole(model: nn.Module) -> nn.Module:
    """Compiles the model as one graph, head and loss as well."""
    model.compile()
    return model


def bfloat16_compiled(model: nn.Module) -> nn.Module:
    """Everything in bfloat16, the adapters too: the fastest form, without casts between adapter and base."""
    return compiled(model.to(torch.bfloat16))


# --- bitsandbytes ------------------------------------------------------------------------------------------------


def reason_no_bitsandbytes() -> str | None:
    return None if importlib.util.find_spec("bitsandbytes") else "not installed (pip install bitsandbytes)"


def bitsandbytes_int8(model: nn.Module) -> nn.Module:
    """LLM.int8() with its default threshold. On a CPU it trains by dequantizing each weight to float (0.50)."""
    import bitsandbytes as bnb

    def quantized(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(*sizes(linear), has_fp16_weights=False, threshold=6.0)
        # It quantizes what moves from the CPU, nothing that lies on a card already.
        new.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        new.bias = linear.bias
        return new.to(linear.weight.device)  # quantizes

    return with_base_layers(model, quantized)


def bitsandbytes_nf4(model: nn.Module) -> nn.Module:
    """QLoRA's NF4 with double quantization, computing in the model's dtype."""
    import bitsandbytes as bnb

    def quantized(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            *sizes(linear), quant_type="nf4", compress_statistics=True, compute_dtype=linear.weight.dtype
        )
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = linear.bias
        return new.to(linear.weight.device)  # quantizes

    return with_base_layers(model, quantized)


# --- torchao -----------------------------------------------------------------------------------------------------


def reason_no_torchao() -> str | None:
    return None if importlib.util.find_spec("torchao") else "not installed (pip install torchao)"


def torchao_quantized(config: Callable[[nn.Linear], object], model: nn.Module) -> nn.Module:
    """Quantizes the base layers with a torchao config, then compiles the blocks, as torchao advises."""
    from torchao.quantization import quantize_

    def quantized(linear: nn.Linear) -> nn.Module:
        holder = nn.Sequential(linear)  # quantize_ replaces children
        quantize_(holder, config(linear))
        return holder[0].requires_grad_(False)

    return compiled(with_base_layers(model, quantized))


def int8_dynamic(_: nn.Linear) -> object:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def int8_weight_only(_: nn.Linear) -> object:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int8_mixed_precision(_: nn.Linear) -> object:
    """Float weights, quantized in every step, forward and backward products in int8: torchao's way to train."""
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig

    # Without the module swap, torchao 0.18 computes in float and says nothing: its override of `linear` is not reached.
    return Int8MixedPrecisionTrainingConfig(module_swap=True)


def nf4(linear: nn.Linear) -> object:
    from torchao.prototype._nf4tensor_api import NF4WeightOnlyConfig

    config = NF4WeightOnlyConfig()
    # It takes whole blocks of block scales only, and 576 × 576 weights have 20.25 of the default 256.
    config.scaler_block_size = math.gcd(config.scaler_block_size, linear.weight.numel() // config.block_size)
    return config


def reason_no_gradient(config: Callable[[nn.Linear], object]) -> str | None:
    """Why an adapter on top of such a layer cannot train: tries a small one."""
    if reason := reason_no_torchao():
        return reason
    from torchao.quantization import quantize_

    holder = nn.Sequential(nn.Linear(64, 64, bias=False)).requires_grad_(False)
    x = torch.ones(32, 64, requires_grad=True)
    try:
        quantize_(holder, config(holder[0]))
        y = holder(x)
        if y.requires_grad:
            y.sum().backward()
    except (RuntimeError, NotImplementedError, ImportError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if x.grad is None:
        return "for inference: no gradient comes through its linear, so only the last block's adapters would train"
    return None


# --- the paper's algorithm as a module swap ------------------------------------------------------------------------


def quaff_eager(model: nn.Module) -> nn.Module:
    """Quaff without a compiler: each base layer becomes a `QuaffLinear`, calibrated by the first step."""
    return with_base_layers(model, QuaffLinear)


class QuaffLinear(nn.Module):
    """Quaff's linear layer in plain torch: x (..., K) → y (..., N).

    The first forward runs in float, chooses the outlier channels O and makes the weight int8. From then on

        s_t = γ s_(t-1) + (1 - γ) max(1, sqrt(absmax x_i / absmax W_i)) for i in O, 1 elsewhere
        x̂ = x / s;  x_int8 = round(x̂ / x_scale), x_scale = absmax of each token's row / Q
        y = x_scale w_scale (x_int8 w_int8ᵀ) + x̂_O ((s_O - 1) W_O)ᵀ + b
        dx = dy_scale w_scale (dy_int8 w_int8)

    with one w_scale for the whole weight and Q = `activation_max`. Source: Quaff, equations 2 to 8 and the paper's code
    (γ = 0.1, W_O in float, at most 1 % of the channels, a multiple of 4). Two differences: with `fills_budget` it is
    always filled, by hits and then by absmax, so that the time does not depend on whether random weights happen to have
    outliers; and the backward product is int8 too, which is faster than dequantizing the weight.
    """

    def __init__(self, linear: nn.Linear, activation_max: int = 127, fills_budget: bool = True) -> None:
        super().__init__()
        self.activation_max, self.fills_budget = activation_max, fills_budget
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight: nn.Parameter | None = linear.weight
        self.bias = linear.bias
        for name in ("w_int8", "w_scale", "w_outlier", "w_outlier_absmax", "outlier_channels", "smoothing_scale"):
            self.register_buffer(name, None)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        if self.weight is not None:
            y = F.linear(x, self.weight, self.bias)
            self._convert(tokens.detach())
            return y
        with torch.no_grad():
            target = self._smoothing_target(tokens)
            self.smoothing_scale = MOMENTUM * self.smoothing_scale + (1 - MOMENTUM) * target
        y = _QuaffProduct.apply(
            tokens,
            self.w_int8,
            self.w_scale,
            self.w_outlier,
            self.outlier_channels,
            self.smoothing_scale,
            self.activation_max,
        ).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def _convert(self, x: Tensor) -> None:
        assert self.weight is not None
        magnitude = x.abs()
        absmax = magnitude.amax(dim=0)
        hits = (magnitude > OUTLIER_THRESHOLD * magnitude.mean()).sum(dim=0)
        count = min(self.in_features, max(4, int(self.in_features * OUTLIER_BUDGET) // 4 * 4))
        if not self.fills_budget:
            count = min(count, int((hits > 0).sum()))
        by_absmax = absmax.argsort(descending=True, stable=True)
        self.outlier_channels = by_absmax[hits[by_absmax].argsort(descending=True, stable=True)][:count].clone()
        self.w_outlier = self.weight[:, self.outlier_channels].t().contiguous()
        self.w_outlier_absmax = self.w_outlier.abs().amax(dim=1)
        self.w_scale = self.weight.abs().amax() / 127
        self.w_int8 = (self.weight / self.w_scale).round_().to(torch.int8)
        self.smoothing_scale = self._smoothing_target(x)
        self.weight = None

    def _smoothing_target(self, x: Tensor) -> Tensor:
        return (x[:, self.outlier_channels].abs().amax(dim=0) / self.w_outlier_absmax).sqrt().clamp(min=1)


class _QuaffProduct(torch.autograd.Function):
    """Both directions of `QuaffLinear`; for a fixed s the gradient is dy W, whatever s is, and needs no x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_int8: Tensor,
        w_scale: Tensor,
        w_outlier: Tensor,
        channels: Tensor,
        smoothing: Tensor,
        activation_max: int,
    ) -> Tensor:
        ctx.save_for_backward(w_int8, w_scale)
        ctx.activation_max = activation_max
        smoothed = x.clone()
        smoothed[:, channels] /= smoothing
        x_int8, x_scale = per_token_int8(smoothed, activation_max)
        y = int8_product(x_int8, w_int8.t()) * (x_scale * w_scale)
        y.addmm_(smoothed[:, channels], (smoothing - 1).unsqueeze(1) * w_outlier)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        w_int8, w_scale = ctx.saved_tensors
        g_int8, g_scale = per_token_int8(grad_output, ctx.activation_max)
        return int8_product(g_int8, w_int8) * (g_scale * w_scale), None, None, None, None, None, None


def per_token_int8(x: Tensor, limit: int = 127) -> tuple[Tensor, Tensor]:
    """Returns x (T, C) as int8 in ±limit and the scale of each row, (T, 1); a row of zeros has scale 0."""
    x_scale = x.abs().amax(dim=1, keepdim=True) / limit
    return (x / x_scale.clamp(min=torch.finfo(x.dtype).tiny)).round_().to(torch.int8), x_scale


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a (T, K) times b (K, C), both int8, as float32; in float where `torch._int_mm` is a plain loop."""
    if a.device.type == "cuda" or has_fast_int_mm():
        return torch._int_mm(a, b).float()
    return a.float() @ b.float()


def has_fast_int_mm() -> bool:
    """Whether oneDNN has an int8 product on this CPU; without VNNI `torch._int_mm` is a plain loop."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported())


# --- quaff_fx ------------------------------------------------------------------------------------------------------


def quaff_fx_compiled(bits: int, dtype: torch.dtype, model: nn.Module, **config: Any) -> nn.Module:
    """The default config but for the bits; one calibration step, so that it does as many real steps as the others."""
    config = {"activation_bits": bits, "calibration_steps": 1, "progress": False} | config
    return quaff_fx.compile(model.to(dtype), config)


PAPER = {"smoothing": "momentum", "outlier_rule": "mean_multiple", "outlier_budget": OUTLIER_BUDGET}
"""What the paper does, in the config of quaff_fx: no rotation, a smoothing scale that follows the activations."""


SYSTEMS = (
    System("float32, eager", eager, is_float32=True),
    System("float32, compiled", compiled, is_float32=True),
    System("float32, compiled whole", compiled_whole, is_float32=True),
    System("bfloat16, compiled", bfloat16_compiled),
    System("bitsandbytes LLM.int8", bitsandbytes_int8, reason_no_bitsandbytes),
    System("bitsandbytes NF4", bitsandbytes_nf4, reason_no_bitsandbytes),
    System("torchao int8 dynamic", partial(torchao_quantized, int8_dynamic), partial(reason_no_gradient, int8_dynamic)),
    System(
        "torchao int8 mixed precision",
        partial(torchao_quantized, int8_mixed_precision),
        partial(reason_no_gradient, int8_mixed_precision),
    ),
    System(
        "torchao int8 weight only",
        partial(torchao_quantized, int8_weight_only),
        partial(reason_no_gradient, int8_weight_only),
    ),
    System("torchao NF4", partial(torchao_quantized, nf4), partial(reason_no_gradient, nf4)),
    System("Quaff, eager modules", quaff_eager, calibrates=True),
    System("quaff_fx, 8 bits", partial(quaff_fx_compiled, 8, torch.float32), calibrates=True, activation_max=127),
    System("quaff_fx, 7 bits", partial(quaff_fx_compiled, 7, torch.float32), calibrates=True, activation_max=63),
    System(
        "quaff_fx, 8 bits, as in the paper",
        partial(quaff_fx_compiled, 8, torch.float32, **PAPER),
        calibrates=True,
        activation_max=127,
    ),
    System(
        "quaff_fx, 8 bits, bfloat16 model",
        partial(quaff_fx_compiled, 8, torch.bfloat16),
        calibrates=True,
        activation_max=127,
    ),
)


# --- the model's parts -----------------------------------------------------------------------------------------------


def adapted_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """Returns the layers of PEFT that hold a frozen linear and its adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def with_base_layers(model: nn.Module, quantized: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Replaces what lies under each adapter, one by one, so that only one weight is held in both forms."""
    for layer in adapted_layers(model):
        layer.base_layer = quantized(layer.base_layer)
    return model


def blocks(model: nn.Module) -> nn.ModuleList:
    """Returns the repeated blocks of the model: its longest module list."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def sizes(linear: nn.Linear) -> tuple[int, int, bool]:
    """Returns what the constructor of a linear layer takes."""
    return linear.in_features, linear.out_features, linear.bias is not None


def frozen_bytes(model: nn.Module) -> int:
    """Returns the bytes of what lies under the adapters: weights, and all scales that came in their place.

    As `examples.measurements.frozen_weight_bytes`, but it looks into the tensor subclasses of torchao, whose `nbytes`
    is that of the float weight, and at the scales that bitsandbytes keeps beside its parameters.
    """
    storages: dict[int, int] = {}

    def add(tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()

    for layer in adapted_layers(model):
        base = layer.get_base_layer()
        for tensor in (*base.parameters(), *base.buffers()):
            add(tensor)
            if (nf4_state := getattr(tensor, "quant_state", None)) is not None:
                for part in nf4_state.as_dict().values():
                    if isinstance(part, Tensor):
                        add(part)
        # The scales of LLM.int8, which its first forward moves from the weight to the layer.
        for holder in (base.weight, getattr(base, "state", None)):
            if isinstance(scale := getattr(holder, "SCB", None), Tensor):
                add(scale)
    return sum(storages.values())
