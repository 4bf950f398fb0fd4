"""Logits that are computed where they are read: beside the same code on plain ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quaff_fx.errors import WeightError
from quaff_fx.weights.logits import Logits, Steps, _parts, can_be_deferred, logits

CLASSES, FEATURES = 11, 6
F = nn.functional


@dataclass
class Head:
    """A float head that writes down what was asked of it."""

    weight: Tensor
    products: int = 0
    parts: list[int] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.products += 1
        return F.linear(x, self.weight, bias)

    def token_losses(
        self, x: Tensor, bias: Tensor | None, labels: Tensor, steps: Steps, ignore_index: int, label_smoothing: float
    ) -> Tensor:
        self.parts.append(len(labels))
        values = F.linear(x, self.weight, bias)
        for name, *numbers in steps:
            values = getattr(values, name)(*numbers)
        options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        return F.cross_entropy(values, labels, reduction="none", **options)


class Case:
    """Logits of one x, deferred and plain."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.head = Head(torch.randn(CLASSES, FEATURES, generator=generator).to(dtype))
        self.bias = torch.randn(CLASSES, generator=generator).to(dtype)
        self.x = torch.randn(*shape, FEATURES, generator=generator).to(dtype).requires_grad_()
        self.labels = torch.randint(CLASSES, shape, generator=generator)
        self.labels.view(-1)[1] = -100

    def both(self, code: Callable[[Tensor, Tensor], Any]) -> tuple[Any, Any, Tensor | None, Tensor | None]:
        """Runs code on deferred and on plain logits; returns what it gives and the gradients of x."""
        results, gradients = [], []
        for deferred in (True, False):
            x = self.x.detach().clone().requires_grad_()
            hidden = x * 1.0
            given = logits(self.head, hidden, self.bias) if deferred else F.linear(hidden, self.head.weight, self.bias)
            result = code(given, self.labels)
            if isinstance(result, Tensor) and result.requires_grad:
                (result.float() * torch.linspace(0.5, 2, result.numel()).reshape(result.shape)).sum().backward()
            results.append(result)
            gradients.append(x.grad)
        return results[0], results[1], gradients[0], gradients[1]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, (tuple, list)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    elif expected is not None:
        assert found == expected


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def shifted(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :-1, :].contiguous().view(-1, CLASSES), labels[..., 1:].contiguous().view(-1)


WITHOUT_LOGITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "rows": lambda z, y: F.cross_entropy(z.view(-1, CLASSES), y.view(-1)),
    "shifted": lambda z, y: F.cross_entropy(*shifted(z, y)),
    "flattened": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "transposed": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "permuted": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y),
    "mT": lambda z, y: F.cross_entropy(z[:, :-1].mT, y[:, 1:]),
    "as a module": lambda z, y: nn.CrossEntropyLoss(label_smoothing=0.1)(flat(z), y.flatten()),
    "sum": lambda z, y: F.cross_entropy(flat(z), y.flatten(), reduction="sum") / 3,
    "each": lambda z, y: F.cross_entropy(flat(z), y.flatten(), reduction="none"),
    "each, transposed": lambda z, y: F.cross_entropy(z.mT, y, reduction="none"),
    "weighed by token": lambda z, y: (F.cross_entropy(z.mT, y, reduction="none") * torch.arange(5.0)).mean(),
    "ignored": lambda z, y: F.cross_entropy(flat(z), y.flatten().clamp(min=3), ignore_index=3),
    "all ignored": lambda z, y: F.cross_entropy(flat(z), torch.full_like(y.flatten(), -100)),
    "smoothed": lambda z, y: F.cross_entropy(flat(z), y.flatten(), label_smoothing=0.2),
    "soft cap": lambda z, y: F.cross_entropy(flat(torch.tanh(z / 30.0) * 30.0), y.flatten()),
    "scaled": lambda z, y: F.cross_entropy(flat(0.25 * z.div(2).float()), y.flatten()),
    "cast": lambda z, y: F.cross_entropy(flat(z.to(torch.float32).to(y.device)), y.flatten()),
    "masked": lambda z, y: F.cross_entropy(z[y != -100], y[y != -100]),
    "one of the batch": lambda z, y: F.cross_entropy(z[0], y[0].clamp(min=0)),
    "last token": lambda z, y: F.cross_entropy(z[:, -1], y[:, -1]),
    "twice": lambda z, y: F.cross_entropy(flat(z), y.flatten()) + F.cross_entropy(flat(z[:1]), y[:1].flatten()),
}


@pytest.mark.parametrize("name", WITHOUT_LOGITS)
def test_a_cross_entropy_computes_no_logits(name: str) -> None:
    case = Case(2, 5)
    found, expected, grad, expected_grad = case.both(WITHOUT_LOGITS[name])
    assert_same(found, expected)
    assert_same(grad, expected_grad)
    assert case.head.products == 0
    assert case.head.parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cross_entropy_in_16_bits_is_that_of_rounded_logits(dtype: torch.dtype) -> None:
    case = Case(2, 5, dtype=dtype)
    found, expected, grad, expected_grad = case.both(lambda z, y: F.cross_entropy(flat(z.float()), y.flatten()))
    assert_same(found, expected)
    assert_same(grad, expected_grad, tolerance=0.02)
    assert case.head.products == 0


def edited(z: Tensor, edit: Callable[[Tensor], Any]) -> Tensor:
    edit(z)
    return z.sum(-1)


def viewed_then_edited(z: Tensor) -> Tensor:
    """A view and a copy of before an edit: the one sees it, the other does not."""
    view, copied = z[:, 1:], z.double()
    z[:, 2] *= 0.0
    return torch.cat([view.flatten(), copied.float().flatten(), z.flatten()])


def edited_below(z: Tensor, y: Tensor, edit: Callable[[Tensor], Any]) -> Tensor:
    """A view of before an edit that no function of the logits makes, and what is copied before it."""
    view, copied = z[:, :-1], z.double()
    edit(z)
    return F.cross_entropy(view.flatten(0, 1), y[:, 1:].flatten()) + copied.float().sum()


def counted_first(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z.argmax(-1)
        z.float().max()
    return F.cross_entropy(flat(z), y.flatten())


class Halved(torch.autograd.Function):
    """Code that no `__torch_function__` sees."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # type: ignore[override]
        return z.exp() * 0.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 0.5


WITH_LOGITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "log_softmax": lambda z, y: z.log_softmax(-1),
    "softmax": lambda z, y: F.softmax(z, dim=-1, dtype=torch.float32),
    "argmax": lambda z, y: z.argmax(-1).tolist(),
    "topk": lambda z, y: tuple(z.topk(2)),
    "one logit": lambda z, y: z[..., 3],
    "a class": lambda z, y: z[:, :, 1:4],
    "single": lambda z, y: z[0, 1, 2].item(),
    "flat": lambda z, y: z.view(-1),
    "sum": lambda z, y: z.sum(),
    "arithmetic": lambda z, y: (1 + z) * z - z.mean(-1, keepdim=True),
    "cat": lambda z, y: torch.cat([z, z[:, :1]], dim=1),
    "stack": lambda z, y: torch.stack([z, z.float() * 2]),
    "iterated": lambda z, y: sum(row.sum() for row in z),
    "numpy": lambda z, y: z.detach().numpy().tolist(),
    "text": lambda z, y: (str(z.detach()), f"{z[0, 0, 0].item():.3f}"),
    "data": lambda z, y: z.data.clone(),
    "chosen tokens": lambda z, y: F.cross_entropy(z[:, torch.tensor([0, 2])].flatten(0, 1), y[:, ::2][:, :2].flatten()),
    "other classes weighed": lambda z, y: F.cross_entropy(flat(z), y.flatten(), weight=torch.arange(1.0, CLASSES + 1)),
    "probabilities": lambda z, y: F.cross_entropy(flat(z), torch.full((10, CLASSES), 1 / CLASSES)),
    "kl": lambda z, y: F.kl_div(z.log_softmax(-1), torch.full((2, 5, CLASSES), 1 / CLASSES), reduction="sum"),
    "vocabulary in front": lambda z, y: z.permute(2, 0, 1).sum((1, 2)),
    "div_": lambda z, y: edited(z, lambda z: z.div_(2)),
    "setitem": lambda z, y: edited(z, lambda z: z.__setitem__((0, 1), 0.0)),
    "masked_fill_": lambda z, y: edited(z, lambda z: z[:, 1:].masked_fill_(y[:, 1:, None] == -100, 0.0)),
    "out": lambda z, y: torch.add(z.detach(), 1, out=torch.empty(2, 5, CLASSES)),
    "views and copies edited": lambda z, y: viewed_then_edited(z),
    "data edited": lambda z, y: edited_below(z, y, lambda z: z.data.mul_(0.5)),
    "detached ones edited": lambda z, y: edited_below(z, y, lambda z: z.detach()[..., 3:].fill_(-2.0)),
    "edited by position": lambda z, y: edited_below(z, y, lambda z: F.hardtanh(z.detach(), -1.0, 1.0, True)),
    "edited before the loss": lambda z, y: F.cross_entropy(flat(z.mul_(2)), y.flatten()),
    "read without gradients first": counted_first,
    "read, then the loss": lambda z, y: z.logsumexp(-1).square().mean() + F.cross_entropy(flat(z), y.flatten()),
    "below Python": lambda z, y: Halved.apply(z),
    "checkpointed": lambda z, y: torch.utils.checkpoint.checkpoint(
        lambda z: z.log_softmax(-1).square(), z, use_reentrant=False
    ),
}


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_what_reads_them_gets_them(name: str) -> None:
    case = Case(2, 5)
    found, expected, grad, expected_grad = case.both(WITH_LOGITS[name])
    assert_same(found, expected)
    assert_same(grad, expected_grad)
    assert case.head.products == 1 + (name == "below Python")  # whose gradient computes them again


def test_a_loss_and_reading_afterwards_give_both() -> None:
    case = Case(2, 5)

    def code(z: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(flat(z), y.flatten())
        return loss + z.logsumexp(-1).square().mean()

    found, expected, grad, expected_grad = case.both(code)
    assert_same(found, expected)
    assert_same(grad, expected_grad)
    assert case.head.products == 1


def test_their_form_needs_no_logits() -> None:
    case = Case(2, 5)
    z = logits(case.head, case.x, None)
    plain = F.linear(case.x, case.head.weight)
    for read in (
        *(lambda z: z.shape, lambda z: z.size(-1), lambda z: z.dim(), lambda z: z.dtype, lambda z: z.device),
        *(lambda z: z.numel(), lambda z: len(z), lambda z: z.requires_grad, lambda z: z.is_leaf, torch.is_tensor),
        *(lambda z: z.mT.shape, lambda z: z.float().dtype, lambda z: z.to(torch.float64).dtype, lambda z: z.ndim),
        *(lambda z: z.is_floating_point(), lambda z: z[:, -1].shape, lambda z: z.reshape(10, -1).shape),
    ):
        assert read(z) == read(plain)
    assert isinstance(z.float(), Logits)
    assert case.head.products == 0


def test_a_backward_comes_twice_if_the_graph_is_retained() -> None:
    case = Case(7)
    loss = F.cross_entropy(logits(case.head, case.x, None), case.labels)
    loss.backward(retain_graph=True)
    first = case.x.grad.clone()
    loss.backward()
    assert torch.equal(case.x.grad, 2 * first)


def test_a_double_backward_is_refused() -> None:
    case = Case(7)
    loss = F.cross_entropy(logits(case.head, case.x, None), case.labels)
    (grad,) = torch.autograd.grad(loss, case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(Halved.apply(logits(case.head, case.x, None)).sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_head_and_loss(use_reentrant: bool) -> None:
    case = Case(7)

    def loss_of(x: Tensor, deferred: bool) -> Tensor:
        z = logits(case.head, x * 2, None) if deferred and x.requires_grad else F.linear(x * 2, case.head.weight)
        return F.cross_entropy(z, case.labels)

    gradients = []
    for deferred in (True, False):
        x = case.x.detach().clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(loss_of, x, deferred, use_reentrant=use_reentrant).backward()
        gradients.append(x.grad)
    assert_same(*gradients)


def test_a_label_out_of_range_is_torchs_own_error() -> None:
    case = Case(7)
    for wrong in (CLASSES, -1):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            F.cross_entropy(logits(case.head, case.x, None), torch.full((7,), wrong))


def test_no_tokens() -> None:
    case = Case(2, 5)
    x = torch.zeros(0, FEATURES, requires_grad=True)
    z = logits(case.head, x, None)
    loss = F.cross_entropy(z, torch.zeros(0, dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None


def test_an_edit_of_what_the_head_read_is_refused() -> None:
    case = Case(7)
    hidden = case.x * 1.0
    z = logits(case.head, hidden, None)
    hidden.mul_(2)
    for read in (lambda: z.sum(), lambda: z * 2, lambda: F.cross_entropy(z, case.labels)):
        with pytest.raises(WeightError, match="edited in place"):
            read()


@pytest.mark.parametrize("watch", [Tensor.retain_grad, lambda z: z.register_hook(lambda grad: None)])
def test_their_gradient_is_waited_for(watch: Callable[[Tensor], Any]) -> None:
    case = Case(7)
    z = logits(case.head, case.x, None)
    F.cross_entropy(z, case.labels)
    with pytest.raises(WeightError, match="loss_without_logits=False"):
        watch(z)
    z = logits(case.head, case.x, None)
    watch(z)  # before the loss: it gets logits then
    F.cross_entropy(z, case.labels).backward()
    assert case.head.products == 1


def test_a_retained_gradient_is_that_of_the_logits() -> None:
    case = Case(7)
    z = logits(case.head, case.x, None)
    z.retain_grad()
    F.cross_entropy(z, case.labels).backward()
    plain = F.linear(case.x, case.head.weight).detach().requires_grad_()
    F.cross_entropy(plain, case.labels).backward()
    assert_same(z.grad, plain.grad)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda z: pickle.loads(pickle.dumps(z.detach()))])
def test_copies_are_those_of_plain_logits(duplicate: Callable[[Tensor], Tensor]) -> None:
    case = Case(7)
    z, plain = logits(case.head, case.x, None), F.linear(case.x, case.head.weight)
    try:
        expected: Any = duplicate(plain)
    except RuntimeError as error:  # torch copies no tensor that has a graph
        with pytest.raises(RuntimeError, match=str(error)[:30]):
            duplicate(z)
        return
    assert_same(duplicate(z), expected)


def test_parts_are_powers_of_two_and_hold_few_logits() -> None:
    def sizes(tokens: int, classes: int) -> list[tuple[int, int]]:
        return [(rows.start, rows.stop) for rows in _parts(tokens, classes, torch.device("cpu"))]

    assert sizes(0, 50_000) == []
    assert sizes(5, 50_000) == [(0, 16)]
    assert sizes(300, 50_000) == [(0, 256), (256, 512)]
    assert sizes(130, 262_144) == [(0, 128), (128, 256)]
    assert sizes(40, 10_000_000) == [(0, 64)]


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quaff_fx.weights.logits.EFFICIENT_PART", 16)
    case = Case(37)
    case.head.weight = torch.randn(2**20, FEATURES)  # 16 tokens are 64 MiB
    found = F.cross_entropy(logits(case.head, case.x, None), case.labels)
    expected = F.cross_entropy(F.linear(case.x, case.head.weight), case.labels)
    assert_same(found, expected)
    assert case.head.parts == [16, 16, 16]


def test_only_plain_tensors_that_train_are_deferred() -> None:
    x = torch.randn(3, FEATURES, requires_grad=True)
    assert can_be_deferred(x, None)
    assert not can_be_deferred(x.detach(), None)
    assert not can_be_deferred(x, torch.zeros(1, requires_grad=True))
    assert not can_be_deferred(x[0], None)
    with torch.no_grad():
        assert not can_be_deferred(x, None)
    seen = []
    torch.func.grad(lambda x: seen.append(can_be_deferred(x, None)) or x.sum())(x)
    assert seen == [False]
