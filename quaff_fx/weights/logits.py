"""What eager code gets from a head in training: logits that are computed only where something reads them.

A cross entropy of them is computed in parts of some tokens, forward and gradient, so that no more than one part of the
logits ever exists. Everything else sees the logits as they are without this.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quaff_fx.errors import WeightError
from quaff_fx.kernels.dispatch import is_host, kernels_of

Steps = tuple[tuple[Any, ...], ...]
"""What a model does to each logit: methods of a tensor, by name, each with its numbers: ``(("div", 30.0), ("tanh",))``.
"""

SMALLEST_PART, EFFICIENT_PART = 16, 128
"""Tokens. Parts have sizes of powers of two, so that few graphs are compiled; the last one is filled up. Below the
second size a product spends its time on reading the weight, once for each part.
"""


class Head(Protocol):
    """What `Logits` needs of a `weights.QuantizedWeight`."""

    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """N, the size of the vocabulary."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x Wᵀ + bias through the int8 product, differentiable."""

    def token_losses(
        self, x: Tensor, bias: Tensor | None, labels: Tensor, steps: Steps, ignore_index: int, label_smoothing: float
    ) -> Tensor:
        """Returns the cross entropy of each token (T,), compiled, differentiable in x (T, K)."""


@dataclass(eq=False)
class _Family:
    """What logits have in common that are views and copies of the same ones.

    Attributes:
        members: all of them that are alive. has_loss: whether a loss was computed without them.
    """

    members: weakref.WeakSet[Logits] = field(default_factory=weakref.WeakSet)
    has_loss: bool = False


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How logits are computed.

    Attributes:
        head: their weight. x: (..., K), rows in the order of the logits'. version: of x, which must not be edited.
        bias: (N,) or None. steps: what is done to each logit. is_moved: their vocabulary is dimension 1, not the last.
    """

    head: Head
    x: Tensor
    version: int
    bias: Tensor | None
    steps: Steps = ()
    is_moved: bool = False

    def values(self, x: Tensor) -> Tensor:
        """Returns the logits of x."""
        logits = self.head.product(x, self.bias)
        for name, *numbers in self.steps:
            logits = getattr(logits, name)(*numbers)
        return logits.transpose(1, 2) if self.is_moved else logits


class Logits(Tensor):
    """Logits without data until something needs them.

    A cross entropy needs none. Reshaping, slicing of tokens, casts, and functions of each logit alone (a soft cap, a
    scale) give logits again. Whatever else gets them, gets them computed, with their graph: results, gradients and
    edits in place are those of the logits themselves.
    """

    _recipe: _Recipe
    _family: _Family
    _origin: tuple[Logits, Callable[..., Any], tuple[Any, ...], dict[str, Any], bool] | None
    _computed: Tensor | None

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return repr(_values_of(self))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _answer(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What comes from code below Python (`autograd.Function`, say), which has their gradient by `_Deferred`."""
        if func._schema.is_mutable:
            raise WeightError(
                f"logits: are edited by {func} below Python, expected code that does so in Python, where it is seen. "
                "Compile with QuaffConfig(loss_without_logits=False)."
            )
        return func(*_plain(args, detach=True), **_plain(kwargs or {}, detach=True))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a loss that is compiled on its own begins with what this gives
def _answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns what a function of logits gives: a loss without them, logits again, or its result on computed ones."""
    first = args[0] if args else None
    if isinstance(first, Logits):
        if getattr(func, "__self__", None) in _METADATA or func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if first._computed is None:
            if func is nn.functional.cross_entropy and (loss := _cross_entropy(*args, **kwargs)) is not None:
                return loss
            if (recipe := _follow(first, func, args[1:], kwargs)) is not None:
                return _made(recipe, first._family, (first, func, args, kwargs, torch.is_grad_enabled()))
        if func in _WATCHES and first._family.has_loss and not _is_torchs_own(args[1:]):
            raise WeightError(
                "logits: a loss was computed without them, expected no one who waits for their gradient: there is "
                "none. Compile with QuaffConfig(loss_without_logits=False)."
            )
    return func(*_plain(args), **_plain(kwargs))


def can_be_deferred(x: Tensor, bias: Tensor | None) -> bool:
    """Tells whether the logits of x may be `Logits`: in training, of plain tensors, outside of function transforms."""
    is_trained = torch.is_grad_enabled() and x.requires_grad and x.ndim > 1
    is_plain = type(x) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return is_trained and is_plain and (bias is None or not bias.requires_grad)


def logits(head: Head, x: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the logits of x (..., K), to be computed where they are read."""
    return _made(_Recipe(head, x, x._version, bias), _Family(), None)


def _made(recipe: _Recipe, family: _Family, origin: Any) -> Logits:
    made: Logits = _Deferred.apply(recipe.x, recipe)  # type: ignore[no-untyped-call]
    made._recipe, made._family, made._origin, made._computed = recipe, family, origin, None
    family.members.add(made)
    return made


class _Deferred(torch.autograd.Function):
    """Logits whose gradient comes from code that `Logits.__torch_function__` does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recipe: _Recipe) -> Tensor:
        ctx.recipe = recipe
        shape = [*x.shape[:-1], recipe.head.out_features]
        if recipe.is_moved:
            shape[1], shape[2] = shape[2], shape[1]
        dtype = next((step[1] for step in reversed(recipe.steps) if step[0] == "to"), x.dtype)
        return Tensor._make_wrapper_subclass(Logits, shape, dtype=dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        is_twice = torch.is_grad_enabled()
        with torch.enable_grad():
            x = ctx.recipe.x.detach().requires_grad_()
            (grad_x,) = torch.autograd.grad(ctx.recipe.values(x), x, grad)
        return _Once.apply(grad_x, ctx.recipe.x) if is_twice else grad_x, None  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """A gradient that is not differentiable again: its graph ends in an error, not in nothing."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(
            "logits: their gradient is differentiated again, expected one backward: int8 products have no second. Keep "
            "gradient penalties in float, without quaff_fx.compile."
        )


def _values_of(logits: Logits) -> Tensor:
    """Returns the logits themselves, with their graph, computed once.

    All views and copies of them are computed with them, so that from then on an edit of one is seen by those that torch
    shows it to, however it is made.
    """
    # Not saved by the forward that reads them first (checkpointing), which may read them again and save nothing.
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):
        for member in [] if logits._computed is not None else list(logits._family.members):
            _compute(member)
        return _compute(logits)


def _compute(logits: Logits) -> Tensor:
    if logits._computed is None:
        if logits._origin is None:
            _check_unchanged(logits._recipe)
            with torch.enable_grad():
                logits._computed = logits._recipe.values(logits._recipe.x)
        else:
            origin, func, args, kwargs, has_grad = logits._origin
            values = _compute(origin)
            with torch.set_grad_enabled(has_grad):
                logits._computed = func(values, *args[1:], **kwargs)
    return logits._computed


def _check_unchanged(recipe: _Recipe) -> None:
    if recipe.x._version != recipe.version:
        raise WeightError(
            "logits: what the head had read was edited in place before they were, expected it as it was. Compile with "
            "QuaffConfig(loss_without_logits=False)."
        )


def _plain(value: Any, detach: bool = False) -> Any:
    """Returns arguments with logits computed."""
    if isinstance(value, Logits):
        values = _values_of(value)
        return values.detach() if detach else values
    if type(value) in (tuple, list):
        return type(value)(_plain(item, detach) for item in value)
    if type(value) is dict:
        return {name: _plain(item, detach) for name, item in value.items()}
    return value


# --- what is done to logits ----------------------------------------------------------------------------------------

_METADATA = {
    *(getattr(Tensor, name) for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "stride", "element_size", "get_device")),
    *(getattr(Tensor, f"is_{name}") for name in ("leaf", "cuda", "cpu", "meta", "sparse", "quantized", "mps", "xpu")),
    *(getattr(Tensor, f"is_{name}") for name in ("floating_point", "complex", "contiguous", "inference")),
    *(Tensor.output_nr, Tensor.__len__, Tensor.__hash__, torch.numel),
    *(torch.is_floating_point, torch.is_complex, torch.is_tensor),
}
"""What a tensor says of itself without its values."""
_WATCHES = {Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook}

_STEPS = {
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply), "mul"),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__, torch.divide, Tensor.divide), "div"),
    **dict.fromkeys((torch.tanh, Tensor.tanh), "tanh"),
}
_CASTS = {Tensor.float: torch.float32, Tensor.bfloat16: torch.bfloat16, Tensor.half: torch.float16}
_SAME = {Tensor.contiguous}
_RESHAPES = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}
_MOVES = {Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.swapaxes, Tensor.mT.__get__}  # type: ignore[attr-defined]


def _follow(logits: Logits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recipe | None:
    """Returns how the result of a function is computed, if it is logits again: other rows of x, or one step more."""
    recipe, has_cast = logits._recipe, None
    step: tuple[Any, ...] | None = None
    if func in _STEPS and not kwargs and all(type(a) in (int, float) for a in args):
        step = (_STEPS[func], *args)
    elif func in _CASTS and not args and not kwargs:
        has_cast = _CASTS[func]
    elif func is Tensor.to and not kwargs.keys() & {"copy", "memory_format"}:
        moved = torch.empty(0, dtype=logits.dtype, device=logits.device).to(*args, **kwargs)
        if moved.device != logits.device:
            return None
        has_cast = moved.dtype
    elif func in _SAME and not args and not kwargs:
        has_cast = logits.dtype
    if has_cast is not None:
        if not has_cast.is_floating_point:
            return None
        step = ("to", has_cast)
        if has_cast == logits.dtype:
            return recipe
    if step is not None:
        return _with(recipe, steps=(*recipe.steps, step))
    if recipe.is_moved:
        return None
    if func in _MOVES and logits.ndim == 3 and _moved_shape(logits, func, args, kwargs) == _swapped(logits.shape):
        return _with(recipe, is_moved=True)
    if func in _RESHAPES and (shape := _shape_of(logits, func, args, kwargs))[-1:] == logits.shape[-1:]:
        return _with(recipe, x=recipe.x.reshape(*shape[:-1], recipe.x.shape[-1]))
    if func is Tensor.__getitem__ and _takes_rows(args[0], logits.ndim):
        return _with(recipe, x=recipe.x[args[0]])
    return None


def _with(recipe: _Recipe, **changes: Any) -> _Recipe:
    _check_unchanged(recipe)
    values = {**vars(recipe), **changes}
    return _Recipe(**{**values, "version": values["x"]._version})


def _shape_of(logits: Logits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
    result: Tensor = func(torch.empty(logits.shape, device="meta"), *args, **kwargs)
    return result.shape


def _moved_shape(logits: Logits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of a permutation of dimensions, told apart from others of the same shape by strides."""
    like = torch.empty(logits.shape, device="meta")
    result: Tensor = func(like, *args, **kwargs)
    return tuple(result.shape) if result.stride() == like.transpose(1, 2).stride() else None


def _swapped(shape: torch.Size) -> tuple[int, ...]:
    return shape[0], shape[2], shape[1]


def _takes_rows(index: Any, ndim: int) -> bool:
    """Tells whether an index leaves the last dimension as it is."""
    items = index if type(index) is tuple else (index,)
    tensors = [item for item in items if isinstance(item, Tensor)]
    if tensors:
        return len(items) == 1 and (items[0].dtype != torch.bool or items[0].ndim < ndim)
    if any(item is not None and item is not Ellipsis and not isinstance(item, (int, slice)) for item in items):
        return False
    if any(isinstance(item, bool) for item in items):
        return False
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in items and items[-1] is Ellipsis:
        return taken < ndim
    reaches_last = Ellipsis in items or taken == ndim
    return not reaches_last or (type(items[-1]) is slice and items[-1] == slice(None))


def _is_torchs_own(args: tuple[Any, ...]) -> bool:
    """Whether a hook is of FSDP or DDP, which wait for a backward and not for a gradient."""
    return bool(args) and str(getattr(args[0], "__module__", "")).startswith("torch.distributed")


# --- the loss --------------------------------------------------------------------------------------------------------


def _cross_entropy(
    input: Tensor,  # noqa: A002  # torch's name
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Returns `torch.nn.functional.cross_entropy` of logits that are not computed; None if it is of another form."""
    is_plain = weight is None and size_average is None and reduce is None and reduction in ("none", "mean", "sum")
    if not isinstance(input, Logits) or not is_plain or type(target) is not Tensor or target.dtype != torch.int64:
        return None
    recipe = input._recipe
    if target.shape != recipe.x.shape[:-1] or target.device != recipe.x.device or input.ndim == 1:
        return None
    if input.ndim > 2 and not recipe.is_moved:  # its second dimension counts as the vocabulary
        return None
    _check_unchanged(recipe)
    labels = target.reshape(-1)
    _check_labels(labels, ignore_index, recipe.head.out_features)
    input._family.has_loss = True
    losses: Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        recipe.x.reshape(-1, recipe.x.shape[-1]), labels, recipe, ignore_index, float(label_smoothing)
    )
    if reduction == "none":
        return losses.reshape(target.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def _check_labels(labels: Tensor, ignore_index: int, classes: int) -> None:
    """Raises what torch raises at once; a card says it when it gets there."""
    if not is_host(labels.device) or not labels.numel():
        return
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
    if wrong.numel():
        raise IndexError(f"Target {int(wrong[0])} is out of bounds.")


class _TokenLosses(torch.autograd.Function):
    """The cross entropy of each token, and with it the gradient of its row of x, which is a row of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor, recipe: _Recipe, ignore_index: int, label_smoothing: float
    ) -> Tensor:
        losses, gradients = None, torch.empty_like(x)
        for rows in _parts(x.shape[0], recipe.head.out_features, x.device):
            count = len(range(*rows.indices(x.shape[0])))
            missing = rows.stop - rows.start - count
            part = nn.functional.pad(x[rows].detach(), (0, 0, 0, missing))
            part_labels = nn.functional.pad(labels[rows], (0, missing), value=ignore_index)
            # Hooks of before would take what is saved here for saved by the forward around it (checkpointing).
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
                part.requires_grad_()
                arguments = (part_labels, recipe.steps, ignore_index, label_smoothing)
                part_losses = recipe.head.token_losses(part, recipe.bias, *arguments)
                (gradient,) = torch.autograd.grad(part_losses, part, torch.ones_like(part_losses))
            if losses is None:
                losses = part_losses.new_empty(x.shape[0])
            losses[rows] = part_losses.detach()[:count]
            gradients[rows] = gradient[:count]
        ctx.save_for_backward(gradients, labels == ignore_index)
        ctx.recipe = recipe
        return x.new_zeros(0) if losses is None else losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, is_ignored = ctx.saved_tensors
        # Where all tokens are ignored, the mean divides by zero; their gradient is zero all the same.
        grad = torch.where(is_ignored, 0.0, grad.float())
        grad_x = (gradients * grad.unsqueeze(1)).to(gradients.dtype)
        if torch.is_grad_enabled():
            grad_x = _Once.apply(grad_x.detach(), ctx.recipe.x)  # type: ignore[no-untyped-call]
        return grad_x, None, None, None, None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _parts(tokens: int, classes: int, device: torch.device) -> list[slice]:
    """Slices of the tokens; the last one may reach beyond them."""
    size = SMALLEST_PART
    while size < tokens and (size < EFFICIENT_PART or 8 * size * classes <= kernels_of(device).logits_bytes):
        size *= 2
    return [slice(start, start + size) for start in range(0, tokens, size)]
