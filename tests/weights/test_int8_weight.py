"""What eager code gets when it reads an int8 weight: products in int8, other reads dequantized, edits refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quaff_fx.errors import WeightError
from quaff_fx.weights import QuantizedWeight, owners
from quaff_fx.weights.int8_weight import Int8Weight
from tests.data import normal, planted_outliers
from tests.weights.layers import (
    CHANNELS,
    assert_within_bound,
    count_int8_products,
    outlier_state,
    quantized_linear,
    reference_weight,
)

LINEARS: dict[str, tuple[int, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "F.linear": (1, lambda x, w, b: F.linear(x, w, b)),
    "F.linear with keywords": (1, lambda x, w, b: F.linear(input=x, weight=w, bias=b)),
    "addmm": (0, lambda x, w, b: torch.addmm(b, x, w)),
    "matmul": (0, lambda x, w, b: torch.matmul(x, w) + b),
    "@": (0, lambda x, w, b: x @ w + b),
    "Tensor.matmul": (0, lambda x, w, b: x.matmul(w) + b),
    "mm": (0, lambda x, w, b: torch.mm(x, w) + b),
}


@pytest.mark.parametrize(("in_dim", "product"), LINEARS.values(), ids=LINEARS)
def test_every_form_of_a_linear_runs_in_int8(in_dim: int, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    matrix, x, bias = normal(8, 12, seed=2, std=0.1), planted_outliers(6, 12, CHANNELS, 40.0, seed=1), normal(8, seed=3)
    weight = matrix if in_dim == 1 else matrix.t().contiguous()
    quantized = QuantizedWeight(weight, in_dim, outlier_state(), 127, 1)
    results: list[Tensor] = []
    assert count_int8_products(lambda: results.append(product(x, quantized.read(), bias))) == 1
    assert_within_bound(results[0] - bias, x, matrix, quantized)


@pytest.mark.parametrize(
    ("in_dim", "product"),
    [
        (1, lambda x, w: x @ w.T),
        (1, lambda x, w: x @ w.t()),
        (1, lambda x, w: x.matmul(w.transpose(0, 1))),
        (0, lambda x, w: F.linear(x, w.t())),
        (0, lambda x, w: torch.addmm(torch.zeros(6, 8), x, w)),
        (0, lambda x, w: torch.addmm(torch.zeros(8), x, w, beta=0.5)),
        (1, lambda x, w: torch.einsum("tk,nk->tn", x, w)),
        (1, lambda x, w: (w @ x.t()).t()),
    ],
    ids=["x @ w.T", "x @ w.t()", "transpose", "linear of t", "addmm matrix", "addmm beta", "einsum", "left operand"],
)
def test_a_product_that_is_not_taken_as_a_linear_sees_the_dequantized_weight(
    in_dim: int, product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    matrix, x = normal(8, 12, seed=2), normal(6, 12, seed=3)
    quantized = QuantizedWeight(matrix if in_dim == 1 else matrix.t().contiguous(), in_dim, outlier_state(), 127, 1)
    result = product(x, quantized.read())
    expected = x.double() @ reference_weight(quantized).t()
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_product_over_the_out_features_is_not_mistaken_for_the_linear() -> None:
    """A square weight makes the mistake silent: x @ w of an `nn.Linear` weight is x W, not x Wᵀ."""
    matrix, x = normal(12, 12, seed=2), normal(6, 12, seed=3)
    quantized = QuantizedWeight(matrix, 1, outlier_state(), 127, 1)
    torch.testing.assert_close(
        (x @ quantized.read()).double(), x.double() @ reference_weight(quantized), rtol=1e-4, atol=1e-4
    )


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda w: w.clone(),
    "float": lambda w: w.float() * 1,
    "detach": lambda w: w.detach() * 1,
    "twice": lambda w: (w * 2) / 2,
    "t": lambda w: w.t().t() + 0,
    "index": lambda w: torch.stack([w[i] for i in range(8)]),
    "cat": lambda w: torch.cat([w[:3], w[3:]]),
    "norm": lambda w: w / w.norm() * w.norm(),
    "bfloat16": lambda w: w.to(torch.float64).to(torch.float32) + 0,
    "copied from": lambda w: torch.empty(8, 12).copy_(w) + 0,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_other_ops_see_the_dequantized_weight(read: Callable[[Tensor], Tensor]) -> None:
    module = quantized_linear()
    (quantized,) = owners.states_of(module).values()
    assert isinstance(quantized, QuantizedWeight)
    result = read(module.weight)
    torch.testing.assert_close(result.double(), reference_weight(quantized), rtol=1e-5, atol=1e-6)


def test_the_view_tells_its_shape_dtype_and_device_without_data() -> None:
    weight = quantized_linear(torch.bfloat16).weight
    assert isinstance(weight, Int8Weight)
    assert weight.shape == (8, 12)
    assert weight.ndim == 2
    assert weight.numel() == 96
    assert weight.dtype == torch.bfloat16
    assert weight.device == torch.device("cpu")
    assert not weight.requires_grad
    assert repr(weight) == "Int8Weight(shape=(8, 12), dtype=torch.bfloat16)"


def _add_to_data(w: Tensor) -> None:
    w.data += 1


def _set_data(w: Tensor) -> None:
    w.data = torch.zeros(8, 12)


def _set_data_of_data(w: Tensor) -> None:
    w.data.data = torch.zeros(8, 12)


def _add(w: Tensor) -> None:
    w += 1


def _set_row(w: Tensor) -> None:
    w[0] = 1.0


def _set_masked(w: Tensor) -> None:
    w[torch.ones(8, 12, dtype=torch.bool)] = 0.0


INITIALIZERS = (
    *("normal_", "uniform_", "zeros_", "ones_", "eye_", "trunc_normal_"),
    *("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_"),
)
EDITS: dict[str, Callable[[Tensor], object]] = {
    "data +=": _add_to_data,
    "data =": _set_data,
    "+=": _add,
    "copy_": lambda w: w.copy_(torch.zeros(8, 12)),
    "mul_": lambda w: w.mul_(2),
    "zero_": lambda w: w.zero_(),
    "row assignment": _set_row,
    "masked assignment": _set_masked,
    "index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.tensor(1.0)),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(8, 12, dtype=torch.bool), 0.0),
    "out=": lambda w: torch.add(torch.zeros(8, 12), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    **{
        f"init.{name}": lambda w, name=name: getattr(nn.init, name)(w)  # type: ignore[misc]
        for name in INITIALIZERS
    },
    "init.constant_": lambda w: nn.init.constant_(w, 1.0),
    "init.sparse_": lambda w: nn.init.sparse_(w, 0.5),
}
EDITS_THROUGH_VIEWS: dict[str, Callable[[Tensor], object]] = {
    "row in place": lambda w: w[0].zero_(),
    "transpose in place": lambda w: w.t().add_(1),
    "view in place": lambda w: w.view(-1).zero_(),
    "detached in place": lambda w: w.detach().zero_(),
    "data in place": lambda w: w.data.zero_(),
    "row of data": lambda w: w.data[0].zero_(),
    "view of a view in place": lambda w: w.t().t().view(2, 48)[0].zero_(),
    "data of data": _set_data_of_data,
    "init.orthogonal_": lambda w: nn.init.orthogonal_(w),
}


@pytest.mark.parametrize("edit", (EDITS | EDITS_THROUGH_VIEWS).values(), ids=EDITS | EDITS_THROUGH_VIEWS)
def test_every_way_of_editing_raises(edit: Callable[[Tensor], object]) -> None:
    module = quantized_linear()
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad(), pytest.raises(WeightError) as raised:
        edit(module.weight)
    text = str(raised.value)
    assert ": is int8 and rebuilt at each read, expected no code that edits it" in text
    assert "quaff_fx.dequantize(model)" in text
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_data_and_its_views_can_be_read() -> None:
    """An adapter that is added to an int8 layer may look at its weight: DoRA takes the norm, ``weight.data.norm()``."""
    module = quantized_linear()
    expected = module._modules["quaff_weight"].dequantized()
    assert torch.equal(module.weight.data, expected)
    assert torch.equal(module.weight.data.t()[3], expected[:, 3])
    assert torch.equal(module.weight.data.norm(dim=1), expected.norm(dim=1))
    copied = module.weight.data.clone()
    copied.add_(1)  # a copy is anyone's own
    assert type(copied) is Tensor
    assert torch.equal(module.weight.data, expected)


def test_the_result_of_a_product_can_be_edited_in_place() -> None:
    """AdaLoRA: ``result += ...`` on what the base layer returns."""
    module = quantized_linear()
    x = torch.randn(2, 3, 12, requires_grad=True)
    y = module(x)
    y += 1
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_merge_line_raises_instead_of_being_lost(dtype: torch.dtype) -> None:
    """PEFT: ``base_layer.weight.data += delta_weight``."""
    base_layer = quantized_linear(dtype)
    with pytest.raises(WeightError):
        base_layer.weight.data += torch.zeros(8, 12)
