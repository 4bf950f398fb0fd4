"""Watching eager code: every use of a frozen weight is seen, nothing is changed."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from quaff_fx import numerics
from quaff_fx.config import QuaffConfig
from quaff_fx.errors import CalibrationError
from quaff_fx.files.stored_tensor import StoredTensor
from quaff_fx.observe import Observer, Seen, Statistics
from quaff_fx.ops import IN_DIM_CONFLICT, IN_DIM_UNSEEN
from quaff_fx.sites import Site, find_sites
from quaff_fx.weights import LoadedWeight, owners
from quaff_fx.weights.int8_weight import Int8Weight
from tests.data import normal
from tests.models import tiny_llama, token_ids

NAME = "layer.weight"
X = normal(3, 4, seed=0)
BIAS = normal(4, seed=1)

Use = Callable[[Tensor, Tensor], Any]


def layer_of(weight: Tensor, reason: str = "") -> Site:
    """The site of a module that owns nothing but a frozen `weight`."""
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    return Site("layer", "weight", module, tuple(weight.shape), weight.dtype, reason)


def sites_of(model: nn.Module) -> list[Site]:
    """Every matrix of a model as a site, active if it has two dimensions."""
    return [
        Site(name, parameter, module, tuple(weight.shape), weight.dtype, "" if weight.ndim == 2 else "no matrix")
        for name, module in model.named_modules()
        for parameter, weight in module._parameters.items()
        if weight is not None and weight.ndim > 1
    ]


def watch(use: Use, x: Tensor = X, *, site: Site | None = None, threshold: float = 0.0) -> Observer:
    """Returns what watched ``use(x, w)`` of a 4 × 4 weight w, or of that of `site`."""
    site = site or layer_of(normal(4, 4, seed=2))
    observer = Observer([site], threshold)
    with observer:
        use(x, getattr(site.module, site.parameter))
    return observer


def seen_by(use: Use, x: Tensor = X) -> Seen:
    return watch(use, x).seen[NAME]


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is (in, out)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(weight.shape[1]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)


# --- linears -------------------------------------------------------------------------------------------------------

OVER_1: dict[str, Use] = {
    "F.linear": lambda x, w: F.linear(x, w),
    "F.linear with a bias": lambda x, w: F.linear(x, w, BIAS),
    "F.linear with keywords": lambda x, w: F.linear(input=x, weight=w, bias=BIAS),
    "@ w.T": lambda x, w: x @ w.T,
    "@ w.mT": lambda x, w: x @ w.mT,
    "@ w.t()": lambda x, w: x @ w.t(),
    "torch.t": lambda x, w: torch.mm(x, torch.t(w)),
    "transpose": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "transpose from the end": lambda x, w: x.matmul(w.transpose(-1, -2)),
    "torch.transpose": lambda x, w: x.mm(torch.transpose(w, 1, 0)),
    "swapaxes": lambda x, w: x @ w.swapaxes(0, 1),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "permute of a tuple": lambda x, w: x @ w.permute((-1, -2)),
    "torch.permute": lambda x, w: x @ torch.permute(w, (1, 0)),
    "addmm of w.t()": lambda x, w: torch.addmm(BIAS, x, w.t()),
    "three transposes": lambda x, w: x @ w.t().T.transpose(0, 1),
    "two transposes": lambda x, w: F.linear(x, w.t().t()),
    "to float64": lambda x, w: F.linear(x.double(), w.to(torch.float64)),
    "to with a keyword": lambda x, w: F.linear(x.double(), w.to(dtype=torch.float64)),
    "the dtype of x": lambda x, w: F.linear(x.double(), w.to(x.double())),
    "type_as": lambda x, w: F.linear(x.double(), w.type_as(x.double())),
    "half": lambda x, w: F.linear(x.half(), w.half()),
    "bfloat16": lambda x, w: F.linear(x.bfloat16(), w.bfloat16()),
    "float": lambda x, w: F.linear(x, w.float()),
    "detach": lambda x, w: F.linear(x, w.detach()),
    "data": lambda x, w: F.linear(x, w.data),
    "a cast of a transpose of data": lambda x, w: x.double() @ w.data.t().to(torch.float64),
    "x like the weight": lambda x, w: F.linear(x.to(w), w),
    "x of the type of the weight": lambda x, w: F.linear(x.type_as(w), w),
    "a trainable function": lambda x, w: _OwnLinear.apply(x.requires_grad_(), w),
}
OVER_0: dict[str, Use] = {
    "@ w": lambda x, w: x @ w,
    "torch.matmul": lambda x, w: torch.matmul(x, w),
    "torch.mm": lambda x, w: torch.mm(x, w),
    "x.matmul": lambda x, w: x.matmul(w),
    "x.mm": lambda x, w: x.mm(w),
    "addmm": lambda x, w: torch.addmm(BIAS, x, w),
    "b.addmm": lambda x, w: BIAS.addmm(x, w),
    "F.linear of w.t()": lambda x, w: F.linear(x, w.t(), BIAS),
    "F.linear of three transposes": lambda x, w: F.linear(x, w.t().t().t(), BIAS),
}


class _OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy @ ctx.saved_tensors[0], None


@pytest.mark.parametrize(
    ("use", "in_dim"),
    [*((use, 1) for use in OVER_1.values()), *((use, 0) for use in OVER_0.values())],
    ids=[*OVER_1, *OVER_0],
)
def test_every_form_of_a_linear_is_observed_and_changed_by_nothing(use: Use, in_dim: int) -> None:
    site = layer_of(normal(4, 4, seed=2))
    expected = use(X.clone(), site.module.weight)
    results: list[Tensor] = []
    dtypes: list[torch.dtype] = []

    def kept(x: Tensor, w: Tensor) -> None:
        results.append(use(x, w))
        dtypes.append(results[0].dtype)

    observer = watch(kept, X.clone(), site=site)
    seen = observer.seen[NAME]
    assert torch.equal(results[0], expected)
    assert results[0].dtype == expected.dtype
    assert type(results[0]) is Tensor
    assert (seen.in_dim, seen.readers, seen.count) == (in_dim, {}, None)
    assert seen.absmax is not None
    assert seen.absmax.dtype == torch.float32
    assert torch.equal(seen.absmax, X.to(expected.dtype).abs().amax(dim=0).float())
    assert observer.multiply_adds == {NAME: 3 * 4 * 4}


@pytest.mark.parametrize("in_dim", [0, 1])
def test_the_channels_are_those_of_the_dimension_that_is_summed_over(in_dim: int) -> None:
    site = layer_of(normal(6, 2, seed=0) if in_dim == 0 else normal(2, 6, seed=0))
    x = normal(5, 3, 6, seed=1)
    observer = watch(lambda x, w: x @ w if in_dim == 0 else F.linear(x, w), x, site=site)
    assert torch.equal(observer.seen[NAME].absmax, x.abs().amax(dim=(0, 1)))
    assert observer.seen[NAME].in_dim == in_dim
    assert observer.multiply_adds == {NAME: 15 * 6 * 2}


def test_one_token_without_a_batch() -> None:
    observer = watch(lambda x, w: F.linear(x[0], w))
    assert torch.equal(observer.seen[NAME].absmax, X[0].abs())
    assert observer.multiply_adds == {NAME: 16}


def test_modules_of_linears() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "conv1d": Conv1D(normal(4, 6, seed=3))}).requires_grad_(False)
    observer = Observer(sites_of(model), 0.0)
    with observer:
        y = model["linear"](X)
        model["conv1d"](y)
    assert {name: seen.in_dim for name, seen in observer.seen.items()} == {"linear.weight": 1, "conv1d.weight": 0}
    assert torch.equal(observer.seen["conv1d.weight"].absmax, y.abs().amax(dim=0))


def test_several_uses_in_a_step_keep_the_largest_and_a_replay_changes_nothing() -> None:
    first, second = normal(2, 3, 4, seed=0), normal(2, 3, 4, seed=1)

    def use(_: Tensor, w: Tensor) -> None:
        for x in (first, second, first):
            F.linear(x, w)

    both = torch.cat([first, second]).reshape(-1, 4)
    assert torch.equal(seen_by(use).absmax, both.abs().amax(dim=0))


def test_an_empty_batch_is_a_use_of_zeros() -> None:
    observer = watch(lambda x, w: F.linear(x[:0], w), threshold=2.0)
    seen = observer.seen[NAME]
    assert torch.equal(seen.absmax, torch.zeros(4))
    assert (seen.in_dim, seen.count) == (1, None)
    assert observer.multiply_adds == {NAME: 0}
    observer.check_finite(1)
    assert torch.equal(seen_by(lambda x, w: (F.linear(x, w), F.linear(x[:0], w))).absmax, X.abs().amax(dim=0))


def test_both_directions_are_a_conflict_and_stay_one() -> None:
    for use in (lambda x, w: F.linear(x @ w, w), lambda x, w: (F.linear(x, w), x @ w, F.linear(x, w))):
        seen = seen_by(use)
        assert (seen.in_dim, seen.absmax) == (IN_DIM_CONFLICT, None)


def test_a_weight_that_nothing_uses_is_not_seen() -> None:
    observer = watch(lambda x, w: x @ x.t())
    assert (observer.seen, dict(observer.multiply_adds)) == ({}, {})


# --- readers and other uses ----------------------------------------------------------------------------------------

READERS: dict[str, Use] = {
    "norm": lambda x, w: w.norm(p=2, dim=1),
    "linalg_norm": lambda x, w: torch.linalg.norm(w + BIAS, dim=1) + torch.linalg.norm(w, dim=1),
    "linalg_vector_norm": lambda x, w: torch.linalg.vector_norm(w.t(), dim=0),
    "add": lambda x, w: (w.to(torch.float64) + 1).norm(),
    "sum": lambda x, w: w.data.sum(),
    "mul": lambda x, w: 2 * w,
    "sub": lambda x, w: 1 - w,
    "div": lambda x, w: 2 / w,
    "pow": lambda x, w: w**2,
    "abs": lambda x, w: abs(w),
    "neg": lambda x, w: -w,
    "isnan": lambda x, w: torch.isnan(w).any(),
    "normalize": lambda x, w: F.normalize(w, dim=1),
}


@pytest.mark.parametrize(("name", "read"), READERS.items(), ids=READERS)
@pytest.mark.parametrize("is_first", [False, True], ids=["linear first", "reader first"])
def test_what_reads_the_values_is_named_and_is_no_conflict(name: str, read: Use, is_first: bool) -> None:
    seen = seen_by(lambda x, w: (read(x, w), F.linear(x, w)) if is_first else (F.linear(x, w), read(x, w)))
    assert seen.in_dim == 1
    assert torch.equal(seen.absmax, X.abs().amax(dim=0))
    assert seen.readers.pop(name) == "reads its values"
    assert set(seen.readers.values()) <= {"reads its values"}


def test_a_weight_that_is_only_read_is_seen_without_a_linear() -> None:
    seen = seen_by(lambda x, w: w.sum())
    assert (seen.in_dim, seen.absmax) == (IN_DIM_UNSEEN, None)


OTHER_USES: dict[str, tuple[Use, str]] = {
    "embedding": (lambda x, w: F.embedding(torch.tensor([1, 3]), w), "embedding"),
    "convolution": (lambda x, w: F.conv1d(torch.ones(1, 4, 9), w.unsqueeze(-1)), "unsqueeze"),
    "left operand": (lambda x, w: w @ x.t(), "matmul"),
    "transposed left operand": (lambda x, w: w.t() @ x.t(), "matmul"),
    "x of a linear": (lambda x, w: F.linear(w, x), "linear"),
    "both operands": (lambda x, w: F.linear(w, w), "linear"),
    "bias": (lambda x, w: torch.addmm(w, torch.ones(4, 4), torch.ones(4, 4)), "addmm"),
    "addmm with alpha": (lambda x, w: torch.addmm(BIAS, x, w, alpha=2), "addmm"),
    "addmm with beta": (lambda x, w: torch.addmm(BIAS, x, w, beta=0.5), "addmm"),
    "addmm of a matrix": (lambda x, w: torch.addmm(x, x, w), "addmm"),
    "mm into something": (lambda x, w: torch.mm(x, w, out=torch.empty(3, 4)), "mm"),
    "einsum": (lambda x, w: torch.einsum("tk,nk->tn", x, w), "einsum"),
    "bmm": (lambda x, w: torch.bmm(x[None], w[None]), "getitem"),
    "reshaped": (lambda x, w: x @ w.reshape(4, 4), "reshape"),
    "permuted to the same": (lambda x, w: x @ w.permute(0, 1), "permute"),
    "contiguous": (lambda x, w: x @ w.contiguous(), "contiguous"),
    "a row": (lambda x, w: w[0], "getitem"),
    "rows": (lambda x, w: [row.sum() for row in w], "unbind"),
    "stacked": (lambda x, w: torch.stack([w, w]), "stack"),
    "in a tuple": (lambda x, w: torch.cat((w, w)), "cat"),
    "chunks": (lambda x, w: w.chunk(2), "chunk"),
    "integers": (lambda x, w: w.to(torch.int32), "to"),
    "dropout": (lambda x, w: F.dropout(w), "dropout"),
    "by its op": (lambda x, w: torch.ops.aten.linear.default(x, w), "linear.default"),
    "a list of numbers": (lambda x, w: w.tolist(), "tolist"),
    "its memory": (lambda x, w: w.data_ptr(), "data_ptr"),
    "its memory as an array": (lambda x, w: w.numpy(), "numpy"),
    "its storage": (lambda x, w: w.untyped_storage(), "untyped_storage"),
    "copied from": (lambda x, w: torch.empty(4, 4).copy_(w), "copy_"),
    "add_": (lambda x, w: w.add_(1), "add_"),
    "+=": (lambda x, w: w.__iadd__(1), "add_"),
    "edit of the transpose": (lambda x, w: w.t().zero_(), "zero_"),
    "edit of data": (lambda x, w: w.data.mul_(2), "mul_"),
    "edit of what is detached": (lambda x, w: w.detach().fill_(0), "fill_"),
    "a row is set": (lambda x, w: w.__setitem__(0, 1.0), "setitem"),
    "a row of data is set": (lambda x, w: w.data.__setitem__(0, 1.0), "setitem"),
    "data is set": (lambda x, w: setattr(w, "data", torch.zeros(4, 4)), "set_data"),
    "out": (lambda x, w: torch.add(torch.ones(4, 4), 1, out=w), "add"),
}


@pytest.mark.parametrize(("use", "name"), OTHER_USES.values(), ids=OTHER_USES)
@pytest.mark.parametrize("is_first", [False, True], ids=["linear first", "other first"])
def test_any_other_use_keeps_the_weight_in_float_and_is_named(use: Use, name: str, is_first: bool) -> None:
    seen = seen_by(lambda x, w: (use(x, w), F.linear(x, w)) if is_first else (F.linear(x, w), use(x, w)))
    assert (seen.in_dim, seen.absmax) == (IN_DIM_CONFLICT, None)
    assert seen.readers[name] == "uses it in another way"


def test_what_looks_only_at_shape_and_dtype_is_no_use() -> None:
    def use(x: Tensor, w: Tensor) -> Tensor:
        w.shape, w.size(), w.size(0), w.stride(), w.dim(), w.ndim, w.numel(), len(w)
        w.dtype, w.device, w.layout, w.is_cuda, w.is_contiguous(), w.is_floating_point(), w.element_size()
        w.requires_grad, w.requires_grad_(False), w.grad, w.grad_fn, w.is_leaf, repr(w), w._version, hash(w)
        torch.zeros_like(w), torch.empty_like(w), torch.full_like(w, 2.0), torch.randn_like(w)
        w.new_zeros(3), w.new_tensor([1.0]), w.new_empty(2)
        torch.zeros(16).view_as(w), torch.zeros(16).reshape_as(w), torch.zeros(4).expand_as(w)
        torch.result_type(x, w), torch.is_tensor(w)
        return F.linear(x, w)

    seen = seen_by(use)
    assert (seen.in_dim, seen.readers) == (1, {})
    assert torch.equal(seen.absmax, X.abs().amax(dim=0))


def test_what_takes_the_dtype_of_a_weight_is_not_taken_for_the_weight() -> None:
    observer = watch(lambda x, w: (F.linear(x, x.type_as(w)), F.linear(x, x.to(w).t()[:, :].t())))
    assert observer.seen == {}


def test_a_weight_tied_to_a_table_is_in_use_by_both() -> None:
    table, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    head.requires_grad_(False)
    site = Site("head", "weight", head, (6, 4), torch.float32, places=[(head, "weight"), (table, "weight")])
    observer = Observer([site], 0.0)
    with observer:
        head(table(torch.tensor([1, 2])))
    assert observer.seen["head.weight"].in_dim == IN_DIM_CONFLICT
    assert observer.seen["head.weight"].readers == {"embedding": "uses it in another way"}


def test_a_weight_that_several_modules_share_is_one() -> None:
    first, second = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
    second.weight = first.weight
    observer = Observer(sites_of(first), 0.0)
    with observer:
        first(X)
        second(2 * X)
    assert torch.equal(observer.seen["weight"].absmax, 2 * X.abs().amax(dim=0))
    assert observer.multiply_adds == {"weight": 96}


def test_another_tensor_in_the_place_of_the_weight_is_not_the_weight() -> None:
    """Nor is one that got the id of a weight that is gone."""
    site = layer_of(normal(4, 4, seed=2))
    observer = Observer([site], 0.0)
    old = site.module.weight
    site.module.weight = nn.Parameter(normal(4, 4, seed=3), requires_grad=False)
    with observer:
        F.linear(X, site.module.weight)
        F.linear(X, old)
    assert observer.seen == {}


# --- values that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_told_with_the_weight_and_the_step(poison: float) -> None:
    x = X.clone()
    x[1, 2] = poison
    observer = watch(lambda x, w: (F.linear(x, w), F.linear(X, w)), x)
    message = r"^layer\.weight: its input has NaN or infinite values in calibration step 7, expected finite ones\."
    with pytest.raises(CalibrationError, match=message):
        observer.check_finite(7)


def test_finite_values_and_no_linear_at_all_are_fine() -> None:
    uses: list[Use] = [lambda x, w: F.linear(x, w), lambda x, w: None, lambda x, w: w.sum(), lambda x, w: w @ x.t()]
    for use in uses:
        watch(use).check_finite(1)


# --- counting ------------------------------------------------------------------------------------------------------


def test_values_over_the_threshold_are_counted_and_a_replay_counts_once() -> None:
    x = torch.ones(10, 4)
    x[:3, 2] = 50  # the mean is 4.675
    observer = watch(lambda x, w: (F.linear(x, w), F.linear(x, w)), x, threshold=5.0)
    assert torch.equal(observer.seen[NAME].count, torch.tensor([0.0, 0.0, 3.0, 0.0]))


def test_the_mean_is_that_of_all_tokens_in_float32() -> None:
    """A bfloat16 sum of so many ones would end at 256."""
    x = torch.ones(2, 5000, 4, dtype=torch.bfloat16)
    x[0, 0, 1] = 3
    site = layer_of(normal(4, 4, seed=2, dtype=torch.bfloat16))
    observer = watch(lambda x, w: F.linear(x, w), x, site=site, threshold=2.9)
    assert observer.seen[NAME].count.tolist() == [0, 1, 0, 0]


def test_statistics_add_up_hits_and_sums_over_steps() -> None:
    site = layer_of(normal(6, 4, seed=2))
    statistics = Statistics.none(site)
    assert statistics.hits.tolist() == statistics.absmax_sum.tolist() == [0] * 6
    assert (statistics.in_dim, statistics.steps) == (IN_DIM_UNSEEN, 0)
    for absmax in ([1.0, 9.0, 2.0, 8.0], [7.0, 9.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]):
        before = statistics
        statistics = before.with_step(Seen(torch.tensor(absmax), in_dim=1), 2, 0.0)
        assert statistics is not before
    assert statistics.hits.tolist() == [1, 2, 0, 1, 0, 0], "the two largest of a step, never a zero"
    assert statistics.absmax_sum.tolist() == [8, 18, 3, 8, 0, 0]
    assert (statistics.in_dim, statistics.steps) == (1, 3)
    assert before.steps == 2, "steps do not edit what was before: an interrupted one is none"
    assert before.absmax_sum.tolist() == [8, 18, 3, 8, 0, 0]


def test_statistics_with_a_threshold_add_up_counts() -> None:
    statistics = Statistics.none(layer_of(normal(4, 4, seed=2)))
    count = torch.tensor([0.0, 3.0, 0.0, 1.0])
    for seen in (Seen(torch.ones(4), count, 0), Seen(torch.ones(4), count, 0), Seen(torch.zeros(4), None, 0)):
        statistics = statistics.with_step(seen, 2, 5.0)
    assert statistics.hits.tolist() == [0, 6, 0, 2]
    assert statistics.absmax_sum.tolist() == [2, 2, 2, 2]
    assert (statistics.in_dim, statistics.steps) == (0, 3)


@pytest.mark.parametrize(
    ("steps", "in_dim"),
    [
        ([None, None], IN_DIM_UNSEEN),
        ([None, 1], 1),
        ([1, None], 1),
        ([0, 0], 0),
        ([1, IN_DIM_UNSEEN], 1),
        ([0, 1], IN_DIM_CONFLICT),
        ([1, IN_DIM_CONFLICT], IN_DIM_CONFLICT),
        ([IN_DIM_CONFLICT, 1], IN_DIM_CONFLICT),
        ([IN_DIM_CONFLICT, None], IN_DIM_CONFLICT),
    ],
)
def test_statistics_join_the_directions_of_steps(steps: list[int | None], in_dim: int) -> None:
    statistics = Statistics.none(layer_of(normal(4, 4, seed=2)))
    for step in steps:
        absmax = torch.ones(4) if step in (0, 1) else None
        statistics = statistics.with_step(None if step is None else Seen(absmax, in_dim=step), 1, 0.0)
    assert (statistics.in_dim, statistics.steps) == (in_dim, 2)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(3, 4, 6, seed=0), requires_grad=False)


THREE_X = normal(3, 2, 4, seed=1)
# Each multiplies 6 tokens by a matrix (4, 6), 2 by each of three experts, or all 6 by each of them.
EXPERTS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "one by one": (lambda w: [x @ w[i] for i, x in enumerate(THREE_X)], 6 * 24),
    "transposed": (lambda w: [F.linear(x, w[i].t()) for i, x in enumerate(THREE_X)], 6 * 24),
    "bmm": (lambda w: torch.bmm(THREE_X, w), 6 * 24),
    "baddbmm": (lambda w: torch.baddbmm(torch.zeros(3, 1, 6), THREE_X, w), 6 * 24),
    "matmul": (lambda w: THREE_X @ w, 6 * 24),
    "einsum, each its own": (lambda w: torch.einsum("eti,eio->eto", THREE_X, w), 6 * 24),
    "einsum, all of each": (lambda w: torch.einsum("ti,eio->teo", THREE_X.reshape(6, 4), w), 3 * 6 * 24),
}


@pytest.mark.parametrize(("use", "expected"), EXPERTS.values(), ids=EXPERTS)
def test_the_work_of_experts_is_counted(use: Callable[[Tensor], Any], expected: int) -> None:
    experts = Experts()
    observer = Observer(sites_of(experts), 0.0)
    with observer:
        use(experts.weight)
    assert (dict(observer.multiply_adds), observer.seen) == ({"weight": expected}, {})


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], dict[str, int]]] = {
    # 2 × 3 tokens of 4 features
    "LSTM": (
        lambda: nn.LSTM(4, 5, num_layers=2, batch_first=True),
        lambda m: m(normal(2, 3, 4, seed=0)),
        {
            "weight_ih_l0": 6 * 20 * 4,
            "weight_hh_l0": 6 * 20 * 5,
            "weight_ih_l1": 6 * 20 * 5,
            "weight_hh_l1": 6 * 20 * 5,
        },
    ),
    "GRU": (
        lambda: nn.GRU(4, 5),
        lambda m: m(normal(2, 3, 4, seed=0)),
        {"weight_ih_l0": 6 * 15 * 4, "weight_hh_l0": 6 * 15 * 5},
    ),
    "GRUCell": (
        lambda: nn.GRUCell(4, 5),
        lambda m: m(normal(6, 4, seed=0)),
        {"weight_ih": 6 * 15 * 4, "weight_hh": 6 * 15 * 5},
    ),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        lambda m: m(*[normal(2, 3, 4, seed=0)] * 3),
        {"in_proj_weight": 6 * 12 * 4, "out_proj.weight": 6 * 4 * 4},
    ),
    # 2 × 5 tokens of another sequence, of 4 features or of 3 and 6
    "attention to another sequence": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda m: m(normal(2, 3, 4, seed=0), *[normal(2, 5, 4, seed=0)] * 2),
        {"in_proj_weight": (6 + 10 + 10) * 4 * 4, "out_proj.weight": 6 * 4 * 4},
    ),
    "attention to another size": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=6, batch_first=True),
        lambda m: m(normal(2, 3, 4, seed=0), normal(2, 5, 3, seed=0), normal(2, 5, 6, seed=0)),
        {
            "q_proj_weight": 6 * 4 * 4,
            "k_proj_weight": 10 * 4 * 3,
            "v_proj_weight": 10 * 4 * 6,
            "out_proj.weight": 6 * 4 * 4,
        },
    ),
    "convolution": (lambda: nn.Conv2d(3, 5, 2), lambda m: m(normal(1, 3, 4, 4, seed=0)), {"weight": 5 * 9 * 3 * 4}),
    "bilinear": (
        lambda: nn.Bilinear(4, 4, 5),
        lambda m: m(normal(6, 4, seed=0), normal(6, 4, seed=1)),
        {"weight": 6 * 4 * 4 * 5},
    ),
}


@pytest.mark.parametrize(("make", "call", "expected"), LAYERS.values(), ids=LAYERS)
def test_the_work_of_other_layers_is_counted(
    make: Callable[[], nn.Module], call: Callable[[nn.Module], Any], expected: dict[str, int]
) -> None:
    module = make().requires_grad_(False)
    observer = Observer(sites_of(module), 0.0)
    with observer:
        call(module)
    assert observer.multiply_adds == expected
    assert all(seen.absmax is None for seen in observer.seen.values())


@pytest.mark.parametrize(("use", "count"), [(lambda x, w: w @ x.t(), 48), (lambda x, w: x * w[0], 0)])
def test_the_work_of_other_uses_is_counted_if_it_is_a_product(use: Use, count: int) -> None:
    assert watch(use).multiply_adds.get(NAME, 0) == count


def test_of_what_is_left_alone_only_the_work_is_counted() -> None:
    site = layer_of(normal(4, 4, seed=2), reason="weight is trainable")
    site.module.weight.requires_grad_()
    x = torch.full((3, 4), math.nan)
    observer = watch(lambda x, w: (F.linear(x, w), x @ w.t(), w.sum(), F.embedding(torch.tensor([0]), w)), x, site=site)
    assert (observer.seen, dict(observer.multiply_adds)) == ({}, {NAME: 96})
    observer.check_finite(1)


# --- weights that were loaded as int8 ------------------------------------------------------------------------------


def loaded_site(in_dim: int = 1) -> Site:
    weight = normal(4, 4, seed=2)
    site = layer_of(weight)
    source = StoredTensor("gone.safetensors", "weight", (4, 4), torch.float32, 0, 0)
    loaded = LoadedWeight(*numerics.quantize_weight(weight), in_dim, 1, torch.float32, source)
    owners.attach(site.module, {"weight": loaded})
    return site


INT8_OVER_1: dict[str, Use] = {
    "F.linear": lambda x, w: F.linear(x, w, BIAS),
    "@ w.T": lambda x, w: x @ w.T,
    "addmm": lambda x, w: torch.addmm(BIAS, x, w.t()),
    "data": lambda x, w: F.linear(x, w.data),
    "a cast": lambda x, w: F.linear(x.double(), w.to(torch.float64)),
}


@pytest.mark.parametrize("use", INT8_OVER_1.values(), ids=INT8_OVER_1)
def test_a_linear_with_an_int8_weight_is_observed_and_changed_by_nothing(use: Use) -> None:
    site = loaded_site()
    expected = use(X, site.module.weight)
    results: list[Tensor] = []
    observer = watch(lambda x, w: results.append(use(x, w)), site=site)
    assert torch.equal(results[0], expected)
    seen = observer.seen[NAME]
    assert (seen.in_dim, seen.readers) == (1, {})
    assert torch.equal(seen.absmax, X.to(expected.dtype).abs().amax(dim=0).float())
    assert observer.multiply_adds == {NAME: 48}


def test_each_reading_of_an_int8_weight_is_the_same_weight() -> None:
    site = loaded_site()
    observer = Observer([site], 0.0)
    with observer:
        assert site.module.weight is not site.module.weight
        for factor in (1, 3, 2):
            F.linear(factor * X, site.module.weight)
    assert torch.equal(observer.seen[NAME].absmax, 3 * X.abs().amax(dim=0))


def test_an_int8_weight_in_the_layout_of_conv1d_is_observed_over_dimension_0() -> None:
    site = loaded_site(in_dim=0)
    observer = watch(lambda x, w: torch.addmm(BIAS, x, w), site=site)
    assert observer.seen[NAME].in_dim == 0


def test_an_int8_weight_is_no_int8_weight_of_another_model() -> None:
    other = loaded_site()
    assert watch(lambda x, w: F.linear(x, other.module.weight), site=loaded_site()).seen == {}


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda x, w: F.embedding(torch.tensor([1]), w), "embedding"),
        (lambda x, w: w @ x.t(), "matmul"),
        (lambda x, w: F.linear(w, w), "linear"),
        (lambda x, w: w[0], "getitem"),
    ],
)
def test_any_other_use_of_an_int8_weight_is_told(use: Use, name: str) -> None:
    seen = watch(lambda x, w: (F.linear(x, w), use(x, w)), site=loaded_site()).seen[NAME]
    assert (seen.in_dim, seen.absmax, seen.readers) == (IN_DIM_CONFLICT, None, {name: "uses it in another way"})


def test_an_int8_weight_read_by_a_linear_and_its_norm_serves_both() -> None:
    seen = watch(lambda x, w: F.linear(x, w) / w.norm(), site=loaded_site()).seen[NAME]
    assert (seen.in_dim, seen.readers) == (1, {"norm": "reads its values"})


def test_where_the_weight_of_a_site_is() -> None:
    plain, int8 = layer_of(normal(4, 4, seed=2)), loaded_site()
    assert plain.weight.tensors == (plain.module.weight,)
    assert not plain.weight.is_int8
    loaded = int8.weight
    assert loaded is int8.module.quaff_weight
    assert loaded.is_int8
    assert loaded.tensors == (loaded.w_int8, loaded.w_scale)
    assert isinstance(int8.module.weight, Int8Weight)
    assert Statistics.none(int8).hits.shape == (4,)


# --- what else goes on while a model runs --------------------------------------------------------------------------


def test_under_autocast_the_activation_is_observed_as_it_comes() -> None:
    def use(x: Tensor, w: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(F.linear(x, w))

    results: list[Tensor] = []
    seen = seen_by(use)
    assert results[0].dtype == torch.bfloat16
    assert (seen.absmax.dtype, seen.in_dim) == (torch.float32, 1)
    assert torch.equal(seen.absmax, X.abs().amax(dim=0))


def test_what_is_seen_in_inference_mode_can_be_used_outside() -> None:
    def use(x: Tensor, w: Tensor) -> None:
        with torch.inference_mode():
            F.linear(x + 1, w)  # an inference tensor
        F.linear(x, w)

    observer = watch(use, threshold=0.5)
    absmax = observer.seen[NAME].absmax
    assert torch.equal(absmax, torch.maximum((X + 1).abs(), X.abs()).amax(dim=0))
    assert not absmax.is_inference()
    observer.check_finite(1)
    statistics = Statistics.none(layer_of(normal(4, 4, seed=2))).with_step(observer.seen[NAME], 1, 0.5)
    statistics.absmax_sum.add_(1)


def test_what_is_seen_keeps_no_graph_alive() -> None:
    x = X.clone().requires_grad_()
    seen = watch(lambda x, w: F.linear(x * 2, w), x, threshold=0.5).seen[NAME]
    assert not seen.absmax.requires_grad
    assert not seen.count.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_observed_once(use_reentrant: bool) -> None:
    linear = nn.Linear(4, 4).requires_grad_(False)
    x = X.clone().requires_grad_()
    observer = Observer(sites_of(linear), 0.0)
    with observer:
        y = checkpoint(linear, x, use_reentrant=use_reentrant)
    y.sum().backward()
    seen = observer.seen["weight"]
    assert (seen.in_dim, seen.readers) == (1, {})
    assert torch.equal(seen.absmax, X.abs().amax(dim=0))
    assert observer.multiply_adds == {"weight": 48}
    assert torch.equal(x.grad, linear.weight.sum(dim=0).expand(3, 4))


def test_hooks_run_and_what_they_change_is_what_is_observed() -> None:
    linear = nn.Linear(4, 4).requires_grad_(False)
    calls: list[str] = []
    linear.register_forward_pre_hook(lambda module, args: (calls.append("before"), (args[0] * 5,))[1])
    linear.register_forward_hook(lambda module, args, y: (calls.append("after"), y + 1)[1])
    linear.register_full_backward_hook(lambda module, dx, dy: calls.append("backward"))
    expected = linear(X.clone().requires_grad_())
    observer = Observer(sites_of(linear), 0.0)
    calls.clear()
    with observer:
        y = linear(X.clone().requires_grad_())
    y.sum().backward()
    assert calls == ["before", "after", "backward"]
    assert torch.equal(y, expected)
    assert torch.equal(observer.seen["weight"].absmax, (5 * X).abs().amax(dim=0))


def test_another_thread_is_not_watched() -> None:
    site = layer_of(normal(4, 4, seed=2))
    observer = Observer([site], 0.0)
    with observer:
        thread = threading.Thread(target=lambda: F.linear(X, site.module.weight))
        thread.start()
        thread.join()
    assert observer.seen == {}


def test_nothing_is_watched_before_and_after() -> None:
    site = layer_of(normal(4, 4, seed=2))
    observer = Observer([site], 0.0)
    F.linear(X, site.module.weight)
    with pytest.raises(ValueError, match="in the model"), observer:
        raise ValueError("in the model")
    F.linear(X, site.module.weight)
    assert observer.seen == {}


def test_an_error_of_the_model_goes_through_and_the_use_does_not_count() -> None:
    site = layer_of(normal(4, 4, seed=2))
    observer = Observer([site], 0.0)
    with observer:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(normal(3, 5, seed=0), site.module.weight)
        F.linear(X, site.module.weight)
    assert observer.multiply_adds == {NAME: 48}


def test_one_observer_in_another_sees_its_own_weights() -> None:
    inner, outer = layer_of(normal(4, 4, seed=2)), layer_of(normal(4, 4, seed=3))
    watching_outer, watching_inner = Observer([outer], 0.0), Observer([inner], 0.0)
    with watching_outer:
        y = F.linear(X, outer.module.weight)
        with watching_inner:
            F.linear(y, inner.module.weight)
            F.linear(2 * X, outer.module.weight)
    assert torch.equal(watching_inner.seen[NAME].absmax, y.abs().amax(dim=0))
    assert torch.equal(watching_outer.seen[NAME].absmax, 2 * X.abs().amax(dim=0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_code_that_the_model_compiles_on_its_own_runs_and_is_compiled_once(backend: str) -> None:
    torch._dynamo.reset()
    compiled: list[str] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.compiled = torch.compile(self.second, backend=backend)

        def forward(self, x: Tensor) -> Tensor:
            return self.compiled(self.first(x))

    model = Model().requires_grad_(False)
    expected = model.second(model.first(X))
    torch._dynamo.callback.on_compile_start(lambda _: compiled.append("start"))
    try:
        for _ in range(3):
            observer = Observer([site for site in sites_of(model) if "compiled" not in site.name], 0.0)
            with observer:
                y = model(X)
            assert torch.equal(y, expected)
            assert torch.equal(observer.seen["first.weight"].absmax, X.abs().amax(dim=0))
            second = observer.seen.get("second.weight", Seen())
            assert second.absmax is None or torch.equal(second.absmax, model.first(X).abs().amax(dim=0))
    finally:
        torch._dynamo.callback.callback_handler.clear()
        torch._dynamo.reset()
    assert compiled == ["start"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)


@pytest.mark.parametrize(
    "default",
    [lambda: default_dtype(torch.bfloat16), lambda: default_dtype(torch.float64), lambda: default_device("meta")],
    ids=["bfloat16", "float64", "meta"],
)
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_default_dtype_and_device_change_nothing(default: Callable[[], Any], threshold: float) -> None:
    def run() -> list[Tensor]:
        observer = watch(lambda x, w: (F.linear(x, w), F.linear(x[:0], w)), site=site, threshold=threshold)
        observer.check_finite(1)
        seen = observer.seen[NAME]
        statistics = Statistics.none(site).with_step(seen, 2, threshold)
        return [seen.absmax, seen.count if threshold else seen.absmax, statistics.hits, statistics.absmax_sum]

    site = layer_of(normal(4, 4, seed=2))
    expected = run()
    with default():
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.device) == (torch.float32, torch.device("cpu"))
        assert torch.equal(one, other)


def test_a_step_of_a_model_is_the_same_bit_for_bit() -> None:
    def step(model: nn.Module, observer: Observer | None) -> dict[str, Tensor]:
        torch.manual_seed(5)
        if observer is None:
            loss = model(input_ids=token_ids(), labels=token_ids()).loss
        else:
            with observer:
                loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        return {"": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain = tiny_llama(2, attention_dropout=0.3)
    watched = copy.deepcopy(plain)
    sites = find_sites(watched, QuaffConfig())
    observer = Observer(sites, 5.0)
    expected, found = step(plain, None), step(watched, observer)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert observer.seen.keys() == {site.weight_name for site in sites if not site.reason}
    assert len(observer.seen) == 2 * 7 + 1
    assert all((seen.in_dim, seen.readers) == (1, {}) for seen in observer.seen.values())
    tokens = token_ids().numel()
    linears = [site for site in sites if len(site.shape) == 2 and "embed_tokens" not in site.name]
    assert observer.multiply_adds == {site.weight_name: tokens * math.prod(site.shape) for site in linears}
