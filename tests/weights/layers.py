"""Layers whose frozen weight is made int8, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quaff_fx import numerics
from quaff_fx.files.stored_tensor import StoredTensor
from quaff_fx.weights import LoadedWeight, OutlierState, QuantizedWeight, owners
from tests.data import dequantized_rows, normal, quaff_error_bound

CHANNELS = [5, 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is (in, out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


def outlier_state(momentum: float = 0.1) -> OutlierState:
    s = torch.tensor([8.0, 3.0])
    return OutlierState(torch.tensor(CHANNELS), torch.tensor([0.3, 0.2]), s, momentum)


def frozen(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.data = normal(*parameter.shape, seed=seed + len(name), std=0.1, dtype=dtype)
    return module.requires_grad_(False)


def quantize(module: nn.Module, in_dim: int = 1, outliers: OutlierState | None = None, q: int = 127) -> QuantizedWeight:
    quantized = QuantizedWeight(module.weight, in_dim, outliers or outlier_state(), q, 1)  # type: ignore[arg-type]
    owners.attach(module, {"weight": quantized})
    return quantized


def loaded(weight: Tensor, in_dim: int = 1) -> LoadedWeight:
    """A weight that was loaded as int8, from a file that is not there any more."""
    source = StoredTensor("gone.safetensors", "weight", tuple(weight.shape), weight.dtype, 0, 0)
    parts = numerics.quantize_weight(weight.detach() if in_dim == 1 else weight.detach().t())
    return LoadedWeight(*parts, in_dim, 1, weight.dtype, source)


def quantized_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = frozen(nn.Linear(12, 8), dtype=dtype)
    quantize(module)
    assert isinstance(module, nn.Linear)
    return module


def reference_weight(quantized: QuantizedWeight) -> Tensor:
    """w_int8 w_scale with the outlier columns in place, (N, K) float64."""
    weight = dequantized_rows(quantized.w_int8, quantized.w_scale)
    weight[:, quantized.outliers.outlier_channels] = quantized.w_outlier.double().t()
    return weight


def assert_within_bound(y: Tensor, x: Tensor, weight: Tensor, quantized: QuantizedWeight) -> None:
    """y = x Wᵀ within what rounding allows; `weight` is (N, K) as it was before."""
    x, y = x.reshape(-1, x.shape[-1]).detach(), y.reshape(-1, y.shape[-1]).detach()
    s, channels = quantized.outliers.smoothing_scale, quantized.outliers.outlier_channels
    smoothing = torch.ones(x.shape[1], dtype=torch.float64)
    smoothing[channels] = s.double()
    x_scale = (x.double() / smoothing).abs().amax(dim=1) / quantized.activation_max
    bound = quaff_error_bound(x, channels, s, x_scale, quantized.w_int8, quantized.w_scale)
    assert ((y.double() - x.double() @ weight.double().t()).abs() <= bound).all()


def count_int8_products(run: Callable[[], object]) -> int:
    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Counter.count += func is torch.ops.quaff.linear.default
            return func(*args, **(kwargs or {}))

    with Counter():
        run()
    return Counter.count
