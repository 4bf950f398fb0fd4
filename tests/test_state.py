"""What stands in the place of a frozen weight: attached and restored, read, moved, copied, saved, and never edited."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quaff_fx import numerics
from quaff_fx.errors import QuaffError, WeightError
from quaff_fx.files.stored_tensor import StoredTensor
from quaff_fx.weights import FloatWeight, LoadedWeight, OutlierState, QuantizedWeight, owners
from quaff_fx.weights.int8_weight import Int8Weight
from tests.data import dequantized_rows, normal, planted_outliers, quaff_error_bound

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


# --- attach and restore ------------------------------------------------------------------------------------------


def test_a_float_weight_is_left_as_it_is() -> None:
    """A module none of whose weights is int8 is its own class, before and after."""
    module = frozen(nn.Linear(12, 8))
    weight, keys = module.weight, list(module.state_dict())
    owners.restore([(module, "weight")])
    assert owners.states_of(module) == {}
    assert owners.int8_places(module) == []
    assert type(module) is owners.base_class(module) is nn.Linear
    assert module.weight is weight
    assert list(module.state_dict()) == keys


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantized_weight_comes_back_dequantized_in_its_dtype(dtype: torch.dtype) -> None:
    module = frozen(nn.Linear(12, 8), dtype=dtype)
    original = module.weight.clone()
    quantized = quantize(module)
    assert "weight" not in module._parameters, "the float weight is gone"
    owners.restore([(module, "weight")])
    assert type(module) is nn.Linear
    assert isinstance(module._parameters["weight"], nn.Parameter)
    assert not module.weight.requires_grad
    assert module.weight.dtype == dtype
    torch.testing.assert_close(module.weight.detach(), reference_weight(quantized).to(dtype))
    kept = original[:, CHANNELS] if dtype.itemsize == 2 else original[:, CHANNELS].half().to(dtype)
    assert torch.equal(module.weight[:, CHANNELS], kept), "outlier columns are kept in 16 bits"


def test_a_transposed_weight_comes_back_in_its_own_layout() -> None:
    module = frozen(Conv1D(12, 8))
    quantized = quantize(module, in_dim=0)
    assert quantized.w_int8.shape == (8, 12)
    assert module.weight.shape == (12, 8)
    owners.restore([(module, "weight")])
    assert module.weight.shape == (12, 8)
    assert module.weight.is_contiguous()
    torch.testing.assert_close(module.weight.double(), reference_weight(quantized).t(), rtol=1e-6, atol=0)


def test_quantizing_the_restored_weight_again_gives_the_same_integers() -> None:
    """Rounding twice must not drift; the outlier columns may hold a row's largest value, so they are left out."""
    module = frozen(nn.Linear(12, 8))
    quantized = quantize(module)
    owners.restore([(module, "weight")])
    w_int8, w_scale = numerics.quantize_weight(module.weight)
    same_scale = torch.isclose(w_scale, quantized.w_scale, rtol=1e-6, atol=0)
    assert same_scale.any()
    assert torch.equal(w_int8[same_scale], quantized.w_int8[same_scale])


def test_two_weights_of_one_module_are_attached_and_restored_one_by_one() -> None:
    module = frozen(nn.Bilinear(4, 4, 4))
    module.weight = nn.Parameter(normal(6, 12, seed=0), requires_grad=False)
    module.other = nn.Parameter(normal(5, 12, seed=1), requires_grad=False)
    other = module.other
    weights = {
        "weight": QuantizedWeight(module.weight, 1, outlier_state(), 127, 1),
        "other": loaded(other),
    }
    owners.attach(module, weights)
    assert owners.states_of(module) == weights
    assert owners.int8_places(module) == [[(module, "other")], [(module, "weight")]]
    owners.restore([(module, "weight")])
    assert list(owners.states_of(module)) == ["other"]
    assert isinstance(module.other, Int8Weight)
    assert isinstance(module._parameters["weight"], nn.Parameter)
    owners.restore([(module, "other")])
    assert type(module) is nn.Bilinear
    assert owners.states_of(module) == {}
    assert torch.equal(module._parameters["other"], weights["other"].dequantized())
    assert (module.other - other).abs().max() <= 0.51 * weights["other"].w_scale.max()


def test_one_class_serves_all_modules_of_a_kind() -> None:
    first, second, conv = (frozen(m) for m in (nn.Linear(12, 8), nn.Linear(12, 20), Conv1D(12, 8)))
    quantize(first)
    quantize(second)
    quantize(conv, in_dim=0)
    assert type(first) is type(second)
    assert isinstance(first, nn.Linear)
    assert type(conv) is not type(first)
    assert isinstance(conv, Conv1D)
    as_int8 = frozen(nn.Linear(3, 4))
    owners.attach(as_int8, {"weight": loaded(as_int8.weight)})
    assert type(as_int8) is type(first), "how it became int8 is in the state, not in the class"
    assert {owners.base_class(m) for m in (first, second, as_int8)} == {nn.Linear}


class Interrupt(BaseException):
    """Ctrl-C, say."""


@pytest.mark.parametrize("moment", ["class", "state", "second state"])
def test_an_interrupted_attach_leaves_the_module_as_it_was(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    module = frozen(nn.Bilinear(4, 4, 4))
    module.weight = nn.Parameter(normal(6, 12, seed=0), requires_grad=False)
    module.other = nn.Parameter(normal(5, 12, seed=1), requires_grad=False)
    states = {name: loaded(getattr(module, name)) for name in ("weight", "other")}
    owners.attach(module, {"weight": states["weight"]})
    before = (type(module), dict(module._modules), dict(module._parameters))

    def interrupt(*_: object) -> None:
        raise Interrupt

    if moment == "class":
        monkeypatch.setattr(owners, "_set_class", interrupt)
    else:
        monkeypatch.setattr(states["weight" if moment == "state" else "other"], "train", interrupt)
    with pytest.raises(Interrupt):
        owners.attach(module, states)
    with pytest.raises(Interrupt):
        owners.attach(module, {"other": states["other"]} if moment != "state" else states, weight=module.bias)
    assert (type(module), module._modules, module._parameters) == before
    assert list(module._modules) == list(before[1])
    assert isinstance(module.weight, Int8Weight)
    assert module.other is before[2]["other"]


def test_modules_that_share_a_weight_share_it_again_once_it_is_float() -> None:
    first, second, other = (frozen(nn.Linear(12, 8)) for _ in range(3))
    second.weight = first.weight
    quantized = quantize(first)
    owners.attach(second, {"weight": quantized})
    quantize(other)
    model = nn.ModuleList([first, second, other, second])
    assert owners.int8_places(model) == [[(first, "weight"), (second, "weight")], [(other, "weight")]]
    owners.restore([(first, "weight"), (second, "weight")])
    assert first.weight is second.weight
    assert isinstance(first.weight, nn.Parameter)
    assert type(first) is type(second) is nn.Linear
    assert owners.int8_places(model) == [[(other, "weight")]]


def test_an_interrupted_restore_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules share a weight: the second call gives the second module what the first one has got already."""
    first, second = frozen(nn.Linear(12, 8)), frozen(nn.Linear(12, 8))
    places = [(first, "weight"), (second, "weight")]
    owners.attach(second, {"weight": quantize(first)})
    attach, attached = owners.attach, []

    def attach_once(module: nn.Module, *args: object, **weights: nn.Parameter) -> None:
        if attached:
            raise Interrupt
        attached.append(module)
        attach(module, *args, **weights)  # type: ignore[arg-type]

    monkeypatch.setattr(owners, "attach", attach_once)
    with pytest.raises(Interrupt):
        owners.restore(places)
    weight = first.weight
    assert type(first) is nn.Linear
    assert isinstance(second.weight, Int8Weight), "it can be called meanwhile"
    monkeypatch.setattr(owners, "attach", attach)
    owners.restore(places)
    assert first.weight is second.weight is weight
    owners.restore(places)
    assert first.weight is second.weight is weight, "nothing is left to do"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_restored_weight_can_be_trained_wherever_it_was_restored(mode: Callable[[], AbstractContextManager]) -> None:
    module = quantized_linear()
    with mode():
        owners.restore([(module, "weight")])
    assert not module.weight.is_inference()
    module.weight.requires_grad_(True)
    module(normal(3, 12, seed=1)).sum().backward()
    assert module.weight.grad is not None


def test_a_float_copy_has_no_int8_weight_and_the_original_keeps_its_own() -> None:
    """PEFT copies modules to be saved: what it trains must be float."""
    first, second, plain = frozen(nn.Linear(12, 8)), frozen(nn.Linear(12, 8)), nn.Linear(8, 8)
    owners.attach(second, {"weight": quantize(first)})
    module = nn.ModuleList([first, second, plain, frozen(Conv1D(12, 8))])
    quantize(module[3], in_dim=0)
    copied = owners.float_copy(module)
    assert owners.int8_places(copied) == []
    assert [type(each) for each in copied] == [nn.Linear, nn.Linear, nn.Linear, Conv1D]
    assert copied[0].weight is copied[1].weight
    assert copied[2].weight is not plain.weight
    assert torch.equal(copied[0].weight, first._modules["quaff_weight"].dequantized())  # type: ignore[union-attr,operator]
    assert copied[3].weight.shape == (12, 8)
    assert len(owners.int8_places(module)) == 2
    assert isinstance(first.weight, Int8Weight)


def test_a_float_copy_of_a_module_that_is_int8_itself() -> None:
    copied = owners.float_copy(quantized_linear())
    assert type(copied) is nn.Linear
    assert isinstance(copied.weight, nn.Parameter)


def test_the_module_keeps_its_mode_and_passes_it_on() -> None:
    module = frozen(nn.Linear(12, 8)).eval()
    quantized = quantize(module)
    assert not quantized.training
    module.train()
    assert quantized.training


def test_weight_bytes_count_every_tensor() -> None:
    quantized = quantize(frozen(nn.Linear(12, 8)))
    assert quantized.weight_bytes() == 8 * 12 + 4 * 8 + 2 * 2 * 8 + 8 * 2 + 3 * 4 * 2


def test_nothing_of_a_quantized_weight_is_trainable() -> None:
    module = quantized_linear()
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_an_all_zero_weight_multiplies_to_the_bias() -> None:
    module = nn.Linear(12, 8).requires_grad_(False)
    module.weight.zero_()
    bias = module.bias.clone()
    quantize(module)
    assert torch.equal(module(normal(3, 12, seed=0)), bias.expand(3, 8))


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [127, 63])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,), ()])
def test_a_linear_runs_in_int8_and_agrees_with_float64(lead: tuple[int, ...], q: int) -> None:
    module = frozen(nn.Linear(12, 8))
    weight, bias = module.weight.clone(), module.bias.clone()
    quantized = quantize(module, q=q)
    x = planted_outliers(30, 12, CHANNELS, 40.0, seed=1)[: max(1, torch.Size(lead).numel())].reshape(-1)
    x = x[: torch.Size(lead).numel() * 12].reshape(*lead, 12)
    y = module(x)
    assert type(y) is Tensor
    assert y.shape == (*lead, 8)
    assert_within_bound(y - bias, x, weight, quantized)


def count_int8_products(run: Callable[[], object]) -> int:
    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Counter.count += func is torch.ops.quaff.linear.default
            return func(*args, **(kwargs or {}))

    with Counter():
        run()
    return Counter.count


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


def test_the_gradient_of_an_eager_linear_is_dy_w() -> None:
    module = quantized_linear()
    (quantized,) = owners.states_of(module).values()
    assert isinstance(quantized, QuantizedWeight)
    x, dy = normal(4, 12, seed=1).requires_grad_(), normal(4, 8, seed=2)
    module(x).backward(dy)
    assert x.grad is not None
    w_int8, w_scale = quantized.w_int8.double(), quantized.w_scale.double()
    g_scale = (dy.double() * w_scale).abs().amax(dim=1, keepdim=True) / 127
    exact = (dy.double() * w_scale) @ w_int8
    assert ((x.grad.double() - exact).abs() <= 1.001 * g_scale / 2 * w_int8.abs().sum(dim=0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_gives_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    module = quantized_linear(dtype)
    assert module(normal(3, 12, seed=0, dtype=dtype)).dtype == dtype


def test_while_traced_a_read_is_one_marker_with_all_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    module = quantized_linear()
    conv = frozen(Conv1D(12, 8))
    quantize(conv, in_dim=0)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert type(module.weight) is Tensor
    assert module.weight.shape == (8, 12)
    assert conv.weight.shape == (12, 8)
    as_int8 = frozen(Conv1D(12, 8))
    owners.attach(as_int8, {"weight": loaded(as_int8.weight, in_dim=0)})
    assert type(as_int8.weight) is Tensor
    assert as_int8.weight.shape == (12, 8)


def test_while_another_thread_compiles_eager_code_reads_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compiler.is_compiling()` is true in all threads while one compiles."""
    module = quantized_linear()
    as_int8 = frozen(Conv1D(12, 8))
    owners.attach(as_int8, {"weight": loaded(as_int8.weight, in_dim=0)})
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    assert isinstance(module.weight, Int8Weight)
    assert isinstance(as_int8.weight, Int8Weight)
    assert count_int8_products(lambda: module(normal(3, 12, seed=1))) == 1


# --- editing -----------------------------------------------------------------------------------------------------


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


def test_weight_error_is_a_quaff_error() -> None:
    assert issubclass(WeightError, QuaffError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_merge_line_raises_instead_of_being_lost(dtype: torch.dtype) -> None:
    """PEFT: ``base_layer.weight.data += delta_weight``."""
    base_layer = quantized_linear(dtype)
    with pytest.raises(WeightError):
        base_layer.weight.data += torch.zeros(8, 12)


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(8, 12)), torch.zeros(8, 12), None])
def test_replacing_the_weight_of_a_quantized_module_is_not_silent(value: Tensor | None) -> None:
    """The class reads `weight` through its state; an assignment that nobody reads would be lost."""
    module = quantized_linear()
    before = module.weight.data
    with pytest.raises(WeightError, match=r"^weight of Linear: is int8, expected no other tensor in its place\. Call "):
        module.weight = value
    assert torch.equal(module.weight.data, before)
    assert "weight" not in module._parameters | module.__dict__


def test_the_weight_of_another_module_is_refused_too() -> None:
    first, second = quantized_linear(), quantized_linear()
    with pytest.raises(WeightError):
        first.weight = second.weight


def test_what_was_read_may_be_assigned_back() -> None:
    """PEFT does so when it unloads an adapter."""
    module = quantized_linear()
    (quantized,) = owners.states_of(module).values()
    module.weight = module.weight
    assert list(owners.states_of(module).values()) == [quantized]
    assert "weight" not in module._parameters


def test_other_attributes_are_assigned_as_the_class_of_the_module_does() -> None:
    class Counting(nn.Linear):
        def __setattr__(self, name: str, value: object) -> None:
            if name != "assigned":
                self.__dict__.setdefault("assigned", []).append(name)
            super().__setattr__(name, value)

    module = frozen(Counting(12, 8))
    quantize(module)
    assigned = module.assigned
    del assigned[:]
    module.bias = nn.Parameter(torch.ones(8))
    module.scale = 3
    module.inner = nn.Linear(1, 1)
    assert assigned == ["bias", "scale", "inner"]
    assert module._parameters["bias"].requires_grad
    assert module.scale == 3
    assert module._modules["inner"] is module.inner


def edit_in_place(quantized: QuantizedWeight) -> None:
    quantized.w_int8.copy_(quantized.w_int8.roll(1, 0) + 1)


VALUES = {
    "w_int8": edit_in_place,
    "w_scale": lambda quantized: quantized.w_scale.mul_(0.5),
    "w_outlier": lambda quantized: quantized.w_outlier.mul_(0.5),
    "foreach": lambda quantized: torch._foreach_mul_([quantized.w_scale, quantized.w_outlier], 0.999),
    "sign of one value": lambda quantized: quantized.w_outlier[0, :1].neg_(),
}


@pytest.mark.parametrize("edit", VALUES.values(), ids=VALUES)
def test_an_edit_of_the_parts_makes_the_weight_unusable(edit: Callable[[QuantizedWeight], object]) -> None:
    """An average of weights edits all parameters alike."""
    (quantized,) = owners.states_of(quantized_linear()).values()
    assert isinstance(quantized, QuantizedWeight)
    assert quantized.reason_unusable() == ""
    with torch.no_grad():
        edit(quantized)
    assert quantized.reason_unusable() == "was edited in place"
    assert quantized.reason_unusable() == "was edited in place", "asking changes nothing"
    assert copy.deepcopy(quantized).reason_unusable() == "was edited in place"
    quantized.remember_values()
    assert quantized.reason_unusable() == ""


@pytest.mark.parametrize("part", ["w_scale", "w_outlier"])
def test_a_part_that_is_to_be_trained_makes_the_weight_unusable(part: str) -> None:
    (quantized,) = owners.states_of(quantized_linear()).values()
    assert isinstance(quantized, QuantizedWeight)
    getattr(quantized, part).requires_grad_(True)
    assert quantized.reason_unusable() == "is to be trained (requires_grad)"
    quantized.requires_grad_(False)
    assert quantized.reason_unusable() == ""


HARMLESS: dict[str, Callable[[nn.Module], object]] = {
    "the same values": lambda m: [p.copy_(p.clone()) for p in m.parameters()],
    "load_state_dict": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}),
    "load_state_dict of another": lambda m: m.load_state_dict(quantized_linear().state_dict()),
    "load_state_dict, assign": lambda m: m.load_state_dict(quantized_linear().state_dict(), assign=True),
    "moved": lambda m: m.to(torch.bfloat16).double(),
    "smoothing scale": lambda m: m._modules["quaff_weight"].outliers.smoothing_scale.fill_(9),
    "bias": lambda m: m.bias.fill_(9),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_keeps_the_values_or_brings_whole_ones_is_no_edit(change: Callable[[nn.Module], object]) -> None:
    module = quantized_linear()
    (quantized,) = owners.states_of(module).values()
    assert isinstance(quantized, QuantizedWeight)
    with torch.no_grad():
        change(module)
    assert quantized.reason_unusable() == ""


def test_a_weight_that_was_quantized_in_inference_mode_is_usable() -> None:
    with torch.inference_mode():
        quantized = QuantizedWeight(normal(8, 12, seed=0), 1, outlier_state(), 127, 1)
        assert quantized.reason_unusable() == ""
    assert quantized.reason_unusable() == ""


def test_a_copy_that_was_made_in_inference_mode_is_usable() -> None:
    module = quantized_linear()
    with torch.inference_mode():
        copied = copy.deepcopy(module)
    (quantized,) = owners.states_of(copied).values()
    assert isinstance(quantized, QuantizedWeight)
    assert quantized.w_int8.is_inference()
    assert quantized.reason_unusable() == ""
    x = normal(4, 12, seed=1)
    with torch.no_grad():
        assert torch.equal(copied(x), module(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("where", ["module", "parent"])
def test_a_float_weight_does_not_load_into_an_int8_module(strict: bool, where: str) -> None:
    """With ``strict=False`` torch would leave it out without a word."""
    module = quantized_linear()
    parent = nn.Sequential(module)
    before = copy.deepcopy(module.state_dict())
    match = r"weight: is a float weight for one that is int8, expected the int8 one\. Call quaff_fx\.dequantize"
    target, source = (module, nn.Linear(12, 8)) if where == "module" else (parent, nn.Sequential(nn.Linear(12, 8)))
    with pytest.raises(RuntimeError, match=match):
        target.load_state_dict(source.state_dict(), strict=strict)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("quaff_"))


# --- blocks ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block; its forward calls `super` and `__class__`, as code may."""

    def __init__(self) -> None:
        super().__init__()
        self.up = frozen(nn.Linear(12, 8))
        self.weight = nn.Parameter(normal(12, 12, seed=3), requires_grad=False)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """Doc of forward."""
        return self.up(x @ self.weight) * factor * isinstance(self, __class__)  # type: ignore[name-defined]


def test_a_block_looks_like_its_own_class() -> None:
    block = Block()
    owners.set_block(block, True)
    cls = type(block)
    assert cls is not Block
    assert isinstance(block, Block)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == ("Block", Block.__qualname__, Block.__module__)
    assert cls.__doc__ == Block.__doc__
    assert block.forward.__doc__ == "Doc of forward."
    assert inspect.signature(block.forward) == inspect.signature(Block().forward)
    assert owners.base_class(block) is Block
    other = Block()
    owners.set_block(other, True)
    assert type(other) is cls, "one class, or no two blocks would share a graph"
    owners.set_block(block, True)
    assert type(block) is cls
    owners.set_block(block, False)
    assert type(block) is Block


def test_a_block_runs_its_forward_through_what_it_was_given() -> None:
    block, x = Block(), normal(3, 12, seed=1)
    expected = block(x, factor=2.0)
    owners.set_block(block, True)
    assert torch.equal(block(x, factor=2.0), expected), "on its own without"
    seen: list[object] = []

    def run(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        seen.append((module, args, kwargs))
        return module.quaff_forward(*args, **kwargs)  # type: ignore[operator,no-any-return]

    block.__dict__[owners.RUN] = run
    hooked: list[nn.Module] = []
    with block.register_forward_hook(lambda module, *_: hooked.append(module)):
        assert torch.equal(block(x, factor=2.0), expected)
    assert torch.equal(block.forward(x, factor=2.0), expected), "also where the forward is called"
    assert seen == [(block, (x,), {"factor": 2.0})] * 2
    assert hooked == [block]


def test_a_block_that_owns_an_int8_weight() -> None:
    block, x = Block(), normal(3, 12, seed=1)
    expected = block(x)
    quantize(block, in_dim=0)
    assert type(block).__name__ == "QuaffBlock"
    owners.set_block(block, True)
    assert type(block).__name__ == "Block"
    assert isinstance(block.weight, Int8Weight)
    assert (block(x) - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(WeightError):
        block.weight = torch.zeros(12, 12)
    owners.set_block(block, False)
    assert type(block).__name__ == "QuaffBlock"
    assert isinstance(block.weight, Int8Weight)
    owners.set_block(block, True)
    owners.restore([(block, "weight")])
    assert type(block).__name__ == "Block"
    assert isinstance(block.weight, nn.Parameter)
    assert owners.base_class(block) is Block
    owners.set_block(block, False)
    assert type(block) is Block


# --- moving, copying, saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.type(torch.float16), torch.float16),
        (lambda m: m.to("cpu"), torch.float32),
    ],
    ids=["half", "bfloat16", "to bfloat16", "double", "type", "to cpu"],
)
@pytest.mark.parametrize("where", ["module", "parent"])
def test_float32_state_stays_float32_and_the_weight_follows(
    move: Callable[[nn.Module], nn.Module], dtype: torch.dtype, where: str
) -> None:
    module = quantized_linear()
    before = {name: value.clone() for name, value in module.state_dict().items() if name.startswith("quaff_")}
    assert len(before) == 7
    move(module if where == "module" else nn.Sequential(nn.Sequential(module)))
    after = {name: value for name, value in module.state_dict().items() if name.startswith("quaff_")}
    assert {name: value.dtype for name, value in after.items()} == {n: v.dtype for n, v in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert module.weight.dtype == dtype
    assert module.bias.dtype == dtype


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_scales_of_a_weight_that_was_loaded_stay_float32(move: Callable[[nn.Module], nn.Module]) -> None:
    module = frozen(nn.Linear(12, 8))
    owners.attach(module, {"weight": loaded(module.weight)})
    move(module)
    (weight,) = owners.states_of(module).values()
    assert isinstance(weight, LoadedWeight)
    assert (weight.w_int8.dtype, weight.w_scale.dtype) == (torch.int8, torch.float32)
    assert weight.dtype == module.weight.dtype == module.bias.dtype
    assert weight.loaded_dtype == torch.float32, "its columns are read again as they were"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_moved_module_still_multiplies(dtype: torch.dtype) -> None:
    module = quantized_linear()
    x = normal(4, 12, seed=1, dtype=dtype)
    expected = module(x.float())
    y = module.to(dtype)(x)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


def pickled(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


def saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES = pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickled, saved_and_loaded], ids=["deepcopy", "pickle", "save"]
)


@COPIES
def test_copies_are_equal_and_independent(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = quantized_linear()
    x = normal(4, 12, seed=1)
    other = copied(module)
    assert type(other) is type(module)
    assert other.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())
    assert torch.equal(other(x), module(x))
    before = module(x)
    for value in other.state_dict().values():
        value.zero_()
    assert torch.equal(module(x), before)


@COPIES
def test_a_module_that_was_loaded_as_int8_survives_a_copy(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = frozen(Conv1D(12, 8))
    owners.attach(module, {"weight": loaded(module.weight, in_dim=0)})
    (weight,), (other,) = (owners.states_of(each).values() for each in (module, copied(module)))
    assert isinstance(other, LoadedWeight)
    assert (other.in_dim, other.rotation, other.dtype, other.source) == (0, 1, torch.float32, weight.source)
    assert torch.equal(other.dequantized(), weight.dequantized())
    assert other.w_int8 is not weight.w_int8


@COPIES
@pytest.mark.parametrize("move", [lambda m: m, lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_shared_outlier_state_stays_shared(
    copied: Callable[[nn.Module], nn.Module], move: Callable[[nn.Module], nn.Module]
) -> None:
    outliers = outlier_state()
    model = nn.ModuleList([frozen(nn.Linear(12, 8)), frozen(nn.Linear(12, 20))])
    for module in model:
        quantize(module, outliers=outliers)
    model = copied(move(model))
    first, second = (owners.states_of(module)["weight"] for module in model)
    assert isinstance(first, QuantizedWeight)
    assert isinstance(second, QuantizedWeight)
    assert first.outliers is second.outliers
    assert first.outliers is not outliers
    first.outliers.next_smoothing_scale.fill_(9)
    second.outliers.commit()
    assert first.outliers.smoothing_scale.tolist() == [9, 9]


@COPIES
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_copy_of_a_block_runs_on_its_own(copied: Callable[[nn.Module], nn.Module], is_int8: bool) -> None:
    """What runs the block belongs to its model, and is in no copy of the block alone."""
    block, x = Block(), normal(3, 12, seed=1)
    if is_int8:
        quantize(block, in_dim=0)
        quantize(block.up)
    owners.set_block(block, True)
    expected = block(x)
    block.__dict__[owners.RUN] = pytest.fail
    other = copied(block)
    assert type(other) is type(block)
    assert owners.RUN not in other.__dict__
    assert block.__dict__[owners.RUN] is pytest.fail
    assert torch.equal(other(x), expected)
    assert len(owners.int8_places(other)) == 2 * is_int8
    owners.set_block(other, False)
    assert type(other).__name__ == ("QuaffBlock" if is_int8 else "Block")


def test_state_dict_round_trip_is_bit_for_bit() -> None:
    source, target = quantized_linear(), frozen(nn.Linear(12, 8), seed=50)
    quantize(target)
    saved = {name: value.clone() for name, value in source.state_dict().items()}
    assert sorted(saved) == [
        "bias",
        "quaff_weight.outliers.next_smoothing_scale",
        "quaff_weight.outliers.outlier_channels",
        "quaff_weight.outliers.outlier_w_absmax",
        "quaff_weight.outliers.smoothing_scale",
        "quaff_weight.w_int8",
        "quaff_weight.w_outlier",
        "quaff_weight.w_scale",
    ]
    target.load_state_dict(saved, strict=True)
    assert all(torch.equal(value, saved[name]) for name, value in target.state_dict().items())
    x = normal(4, 12, seed=1)
    assert torch.equal(target(x), source(x))


def test_a_quantized_state_dict_does_not_load_into_a_float_module_in_silence() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        nn.Linear(12, 8).load_state_dict(quantized_linear().state_dict())


def rotated_linear(rotation: int) -> nn.Linear:
    module = nn.Linear(12, 8).requires_grad_(False)
    owners.attach(module, {"weight": QuantizedWeight(module.weight, 1, outlier_state(), 127, rotation)})
    return module


def test_a_state_dict_of_features_rotated_far_apart_is_refused() -> None:
    source, target = rotated_linear(4), rotated_linear(4)
    before = copy.deepcopy(target.state_dict())
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer)
    del saved._metadata["quaff_weight"]["rotated"]
    with pytest.raises(RuntimeError, match="quaff_weight.w_int8: is of an earlier quaff_fx, which rotated features"):
        target.load_state_dict(saved)
    assert torch.equal(target.quaff_weight.w_int8, before["quaff_weight.w_int8"])
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer))
    assert torch.equal(target.quaff_weight.w_int8, source.quaff_weight.w_int8)
    plain = rotated_linear(1)
    saved = rotated_linear(1).state_dict()
    del saved._metadata["quaff_weight"]["rotated"]
    plain.load_state_dict(saved)
    assert torch.equal(plain.quaff_weight.w_int8, saved["quaff_weight.w_int8"])


# --- smoothing scale ---------------------------------------------------------------------------------------------


def test_the_next_smoothing_scale_counts_only_after_commit() -> None:
    outliers = outlier_state()
    outliers.next_smoothing_scale.copy_(torch.tensor([5.0, 6.0]))
    assert outliers.smoothing_scale.tolist() == [8, 3]
    outliers.commit()
    assert outliers.smoothing_scale.tolist() == [5, 6]
    outliers.next_smoothing_scale.zero_()
    assert outliers.smoothing_scale.tolist() == [5, 6], "committed is a copy"


# --- what every kind of weight answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("in_dim", [1, 0], ids=["nn.Linear", "Conv1D"])
def test_every_kind_of_weight_answers_in_the_layout_of_the_parameter(in_dim: int) -> None:
    parameter = nn.Parameter(normal(8, 12, seed=0), requires_grad=False)
    matrix = parameter if in_dim == 1 else parameter.t()
    plain = FloatWeight(parameter)
    outliers = OutlierState(torch.tensor([1, 4]), torch.ones(2), torch.full((2,), torch.inf), 1.0)
    from_float = plain.quantized(in_dim, outliers, 127, 1, None)
    source = loaded(parameter, in_dim)
    from_int8 = source.quantized(in_dim, outliers, 127, 1, plain.columns(outliers.outlier_channels, in_dim))
    for weight in (plain, source, from_float, from_int8):
        assert (weight.shape, weight.dtype, weight.device.type) == ((8, 12), torch.float32, "cpu")
        assert weight.is_made_from(parameter)
        assert not weight.is_made_from(2 * parameter)
    assert torch.equal(plain.columns(outliers.outlier_channels, in_dim), matrix[:, [1, 4]])
    assert torch.equal(from_float.w_int8, from_int8.w_int8)
    assert torch.equal(from_float.w_outlier, from_int8.w_outlier)
    forms = [[weight.form(is_observed) for is_observed in (True, False)] for weight in (plain, source, from_float)]
    assert forms == [["observed", "float"], ["observed (int8)", "int8 weight"], ["int8", "int8"]]
    assert FloatWeight(None).reason_not_observable() == "weight was replaced while it was observed"
    assert source.reason_not_observable() == plain.reason_not_observable() == ""
