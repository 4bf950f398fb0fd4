"""Quaff's linear layer in other forms: what each choice that quaff_fx makes is worth.

The integers are emulated in float32, so that a form which no kernel computes can be tried. `DEFAULT` is the form of the
product (a test compares both), `PAPER_FORM` that of the paper's formulas.

Sizes: tokens T, in_features K, out_features N, outlier channels O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.peers import MOMENTUM, OUTLIER_BUDGET, OUTLIER_THRESHOLD, adapted_layers, with_base_layers
from quaff_fx import numerics

INT8_MAX = 127


@dataclass(frozen=True)
class Form:
    """How a linear is quantized.

    Attributes:
        rule: one of `RULES`. budget: share of the channels it may choose. is_shared_out: the budget is one for the
            whole model, counted in weights, and goes to the channels that take the most energy for theirs.
        exponent: e of s = max(1, (absmax x_i / absmax W_i)^e); infinite: outlier channels leave the int8 product.
        sharing: over which linears that read the same activation absmax W_i is taken, and how; "activation": it is not,
            s = max(1, (absmax x_i / median of absmax x)^e).
        momentum: weight of the old s; 1 keeps that of the calibration.
        rotation: largest block. has_signs: the sign of half the inputs, drawn once, is changed before.
        activation_group: inputs with a scale of their own; 0: one scale for each token.
        is_asymmetric: an activation's integers span its range from least to largest value.
        activations: of the product in forward. weight_scale: one for each out-feature or for the whole weight.
        rounding: of the weight.
        correction: of x_outlier W_Oᵀ; "rows" and "tensor": in int8, W_O with a scale per out-feature or one.
        backward: of the product with the int8 weight.
        exempt: linears that are treated as `exempt_as`: by their names, or the number with the largest error.
    """

    rule: str = "absmax rank"
    budget: float = OUTLIER_BUDGET
    is_shared_out: bool = False
    exponent: float = 0.5
    sharing: Literal["own", "geometric mean", "mean", "max", "min", "activation"] = "own"
    momentum: float = MOMENTUM
    rotation: int = 1
    has_signs: bool = False
    activation_group: int = 0
    is_asymmetric: bool = False
    activations: Literal["int8", "float"] = "int8"
    weight_scale: Literal["row", "tensor"] = "row"
    rounding: Literal["nearest", "error feedback", "none"] = "nearest"
    correction: Literal["float", "rows", "tensor"] = "float"
    backward: Literal["int8", "float"] = "int8"
    exempt: tuple[str, ...] | int = ()
    exempt_as: Literal["float", "8 bits"] = "float"


PAPER_FORM = Form()
DEFAULT = Form(exponent=math.inf, momentum=1.0, rotation=64)


# --- calibration -------------------------------------------------------------------------------------------------


@dataclass
class Activation:
    """What the calibration batches show of an activation.

    Attributes:
        readers: names of the adapted layers whose linears read it. weights: how many weights a channel has in them.
        absmax: (batches, K). large: (K,) values over 100 × the mean.
        energy: (K,), share of |x|², mean over tokens, added up over batches.
        gram: (K, K), xᵀx, or None where no form needs it.
    """

    readers: list[str]
    weights: int
    absmax: Tensor
    large: Tensor
    energy: Tensor
    gram: Tensor | None

    @classmethod
    def unseen(cls, features: int, form: Form) -> Activation:
        zeros = torch.zeros(features)
        gram = torch.zeros(features, features) if form.rounding == "error feedback" else None
        return cls([], 0, torch.zeros(0, features), zeros, zeros, gram)

    def observe(self, x: Tensor) -> None:
        magnitude = x.abs()
        squares = x.square()
        self.absmax = torch.cat([self.absmax, magnitude.amax(dim=0, keepdim=True)])
        self.large = self.large + (magnitude > OUTLIER_THRESHOLD * magnitude.mean()).sum(dim=0)
        tiny = torch.finfo(x.dtype).tiny
        self.energy = self.energy + (squares / squares.sum(dim=1, keepdim=True).clamp(min=tiny)).mean(dim=0)
        if self.gram is not None:
            self.gram += x.t() @ x


@torch.no_grad()
def observed(form: Form, model: nn.Module, run: Callable[[], None]) -> list[Activation]:
    """Returns each activation that frozen linears under adapters read while `run` runs the model."""
    found: dict[str, Activation] = {}
    last: list[Any] = [None, None]

    def see(name: str, module: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        if name not in found:
            found[name] = last[1] if last[0] is x else Activation.unseen(module.in_features, form)
            found[name].readers.append(name)
            found[name].weights += module.out_features
        if found[name].readers[0] == name:
            found[name].observe(x.detach().flatten(0, -2).float())
        last[:] = x, found[name]

    handles = [linear.register_forward_pre_hook(partial(see, name)) for name, linear in frozen_linears(model).items()]
    run()
    for handle in handles:
        handle.remove()
    return list({id(activation): activation for activation in found.values()}.values())


def frozen_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns what lies under each adapted layer, by the layer's name."""
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: layer.get_base_layer() for layer in adapted_layers(model)}


# --- rules -------------------------------------------------------------------------------------------------------


def by_rank(activation: Activation, count: int) -> Tensor:
    """quaff_fx's own: the channels that are among the largest in the most batches."""
    hits = torch.stack([numerics.outlier_hits(absmax, count) for absmax in activation.absmax]).sum(dim=0)
    return numerics.stable_outlier_channels(hits, activation.absmax.mean(dim=0), count)


def by_threshold(activation: Activation, count: int) -> Tensor:
    """The paper's: channels with values over 100 × the mean, and no others."""
    chosen = numerics.stable_outlier_channels(activation.large, activation.absmax.mean(dim=0), count)
    return chosen[activation.large[chosen] > 0]


def by_stability(activation: Activation, count: int) -> Tensor:
    """The largest mean absmax over batches after its standard deviation is taken off."""
    return (activation.absmax.mean(dim=0) - activation.absmax.std(dim=0)).topk(count).indices


def by_energy(activation: Activation, count: int) -> Tensor:
    """The error saved: of a rotated activation, rounding noise and what the weights' rounding adds grow with |x|²."""
    return activation.energy.topk(count).indices


RULES: Mapping[str, Callable[[Activation, int], Tensor]] = {
    "absmax rank": by_rank,
    "100 × mean": by_threshold,
    "mean absmax": lambda activation, count: activation.absmax.mean(dim=0).topk(count).indices,
    "absmax less its deviation": by_stability,
    "energy": by_energy,
}


def chosen_channels(form: Form, activations: list[Activation]) -> list[Tensor]:
    """Returns the outlier channels of each activation."""
    counts = [numerics.outlier_count(len(activation.energy), form.budget) for activation in activations]
    if form.is_shared_out:
        counts = shared_out(activations, counts)
    return [RULES[form.rule](activation, count) for activation, count in zip(activations, counts, strict=True)]


def shared_out(activations: list[Activation], counts: list[int]) -> list[int]:
    """Returns counts that cost as many weights together, taken in the order of energy per weight of a channel.

    A channel takes the energy off each linear that reads it, and costs as many weights as they have out-features.
    """
    costs = [activation.weights for activation in activations]
    budget = sum(cost * count for cost, count in zip(costs, counts, strict=True))
    gains = sorted(
        (
            (energy * len(activation.readers) / cost, place)
            for place, (activation, cost) in enumerate(zip(activations, costs, strict=True))
            for energy in activation.energy.tolist()
        ),
        reverse=True,
    )
    counts = [0] * len(activations)
    for _, place in gains:
        if budget < min(costs):
            break
        if costs[place] <= budget:
            counts[place] += 1
            budget -= costs[place]
    return counts


def weight_absmaxes(form: Form, activation: Activation, linears: list[nn.Linear], channels: Tensor) -> list[Tensor]:
    """Returns the absmax of the outlier columns that the smoothing scale of each linear is formed with, (O,)."""
    each = torch.stack([linear.weight.detach()[:, channels].abs().amax(dim=0) for linear in linears])
    shared: dict[str, Callable[[], Tensor]] = {
        "geometric mean": lambda: each.log().mean(dim=0).exp(),
        "mean": lambda: each.mean(dim=0),
        "max": lambda: each.amax(dim=0),
        "min": lambda: each.amin(dim=0),
        "activation": lambda: activation.absmax.mean(dim=0).median().expand(len(channels)),
    }
    return list(each) if form.sharing == "own" else [shared[form.sharing]()] * len(each)


# --- the layer ---------------------------------------------------------------------------------------------------


def rounded(x: Tensor, activation_max: int, group: int = 0, is_asymmetric: bool = False) -> Tensor:
    """Returns what int8 keeps of x (T, C), with a scale for each token or for each `group` of its values."""
    shape = x.shape
    if group:
        x = x.reshape(-1, math.gcd(group, shape[1]))
    if is_asymmetric:
        low = x.amin(dim=1, keepdim=True).clamp(max=0)
        scale = (x.amax(dim=1, keepdim=True).clamp(min=0) - low) / (2 * activation_max)
        zero = torch.round(low / scale.clamp(min=torch.finfo(x.dtype).tiny))
        integers = torch.round(x / scale.clamp(min=torch.finfo(x.dtype).tiny)) - zero
        return ((integers.clamp(0, 2 * activation_max) + zero) * scale).view(shape)
    integers, scale = numerics.quantize_rows(x, activation_max)
    return (integers * scale.unsqueeze(1)).view(shape)


def rounded_weight(weight: Tensor, form: Form, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the integers of a rotated weight (N, K), as float32, and the scale of each row.

    Args:
        gram: (K, K), xᵀx of what it multiplies, already smoothed and rotated; for error feedback.
    """
    w_scale = weight.abs().amax(dim=1) / INT8_MAX
    if form.weight_scale == "tensor":
        w_scale = w_scale.max().expand(len(w_scale)).contiguous()
    if gram is not None:
        return with_error_feedback(weight, w_scale, gram), w_scale
    scaled = weight / w_scale.unsqueeze(1).clamp(min=torch.finfo(weight.dtype).tiny)
    return scaled if form.rounding == "none" else torch.round(scaled), w_scale


def with_error_feedback(weight: Tensor, w_scale: Tensor, gram: Tensor) -> Tensor:
    """Returns integers whose rounding errors make up for each other where the inputs go together.

    Column by column, the one with the most energy first; what rounding one takes away, those that follow give back.
    Source: GPTQ (Frantar and others, ICLR 2023), with 1 % of the mean diagonal added to the Gram matrix.
    """
    order = gram.diagonal().argsort(descending=True)
    weight, gram = weight[:, order].clone(), gram[order][:, order].clone()
    gram.diagonal().add_(0.01 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    inverse = torch.where(w_scale > 0, 1 / w_scale, 0.0)
    integers = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        integers[:, column] = torch.round(weight[:, column] * inverse).clamp(-INT8_MAX, INT8_MAX)
        error = (weight[:, column] - integers[:, column] * w_scale) / upper[column, column]
        weight[:, column:] -= error.unsqueeze(1) * upper[column, column:]
    return integers[:, order.argsort()]


def drawn_signs(features: int) -> Tensor:
    """Returns a one with a random sign for each input, (K,), the same for every layer."""
    return torch.randint(2, (features,), generator=torch.Generator().manual_seed(features)) * 2.0 - 1


class FormLinear(nn.Module):
    """x (..., K) → y (..., N) in a form of Quaff.

        x̂ = x / s, s_i = 1 outside O; both x̂ and W rotated
        y = ⌊x̂⌉ ⌊W⌉ᵀ + (x_O (1 - 1/s_O)) W_Oᵀ + b
        dx = ⌊dy ⊙ w_scale⌉ w_int8, rotated back

    Args:
        x_absmax: (O,), mean over calibration batches. w_absmax: (O,), what s is formed with; `weight_absmaxes`.
        gram: (K, K), xᵀx of the calibration, for error feedback.
    """

    def __init__(
        self,
        linear: nn.Linear,
        form: Form,
        activation_max: int,
        channels: Tensor,
        x_absmax: Tensor,
        w_absmax: Tensor,
        gram: Tensor | None = None,
    ) -> None:
        super().__init__()
        if form.correction != "float" and form.exponent == math.inf:
            raise ValueError(
                "correction: is in int8 with an infinite scale, expected float. Give it a finite exponent."
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.activation_max, self.bias = form, activation_max, linear.bias
        weight = linear.weight.detach().float()
        self.channels, self.w_absmax, self.w_outlier = channels, w_absmax, weight[:, channels]
        self.block = numerics.rotation_block(self.in_features, form.rotation)
        self.signs = drawn_signs(self.in_features) if form.has_signs else torch.ones(self.in_features)
        self.smoothing_scale = self.target(x_absmax)
        if gram is not None:
            inverse = self.signs.index_copy(0, channels, self.signs[channels] / self.smoothing_scale)
            gram = numerics.rotate(numerics.rotate(gram * inverse * inverse.unsqueeze(1), self.block).t(), self.block)
        self.w_int8, self.w_scale = rounded_weight(self.rotated(weight), form, gram)

    def rotated(self, x: Tensor) -> Tensor:
        return numerics.rotate(x * self.signs, self.block)

    def target(self, x_absmax: Tensor) -> Tensor:
        """Returns s, (O,), of absmax x_i."""
        if self.form.exponent == math.inf:
            return torch.full_like(x_absmax, math.inf)
        ratio = torch.where(self.w_absmax > 0, x_absmax / self.w_absmax, 1.0)
        return (ratio**self.form.exponent).clamp(min=1.0)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        if self.form.momentum < 1 and len(self.channels):
            absmax = numerics.channel_absmax(tokens.detach()[:, self.channels])
            self.smoothing_scale = numerics.updated_smoothing_scale(
                self.smoothing_scale, self.target(absmax), self.form.momentum
            )
        y = _FormProduct.apply(tokens, self).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def multiply(self, x: Tensor) -> Tensor:
        """Returns y (T, N) of x (T, K), without the bias."""
        inverse = 1 / self.smoothing_scale
        x = x.float()
        x_outlier = x[:, self.channels]
        operand = self.rotated(x.index_copy(1, self.channels, x_outlier * inverse))
        if self.form.activations == "int8":
            operand = rounded(operand, self.activation_max, self.form.activation_group, self.form.is_asymmetric)
        return operand @ self.w_int8.t() * self.w_scale + self.correction(x_outlier, inverse)

    def correction(self, x_outlier: Tensor, inverse: Tensor) -> Tensor:
        """Returns what the outlier channels (T, O) add, (T, N)."""
        if self.form.correction == "float" or not len(self.channels):
            return x_outlier * (1 - inverse) @ self.w_outlier.t()
        weight = self.w_outlier * (self.smoothing_scale - 1)
        flat = weight if self.form.correction == "rows" else weight.reshape(1, -1)
        weight = rounded(flat, INT8_MAX).view_as(weight)
        return rounded(x_outlier * inverse, self.activation_max) @ weight.t()

    def grad_input(self, grad_output: Tensor) -> Tensor:
        """Returns dx (T, K) of dy (T, N)."""
        scaled = grad_output.float() * self.w_scale
        if self.form.backward == "int8":
            scaled = rounded(scaled, self.activation_max)
        return numerics.rotate(scaled @ self.w_int8, self.block) * self.signs


class _FormProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FormLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.grad_input(grad_output), None


# --- models ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantized(
    form: Form, model: nn.Module, activation_max: int, activations: list[Activation], run: Callable[[], None]
) -> nn.Module:
    """Quantizes all linears under adapters, by what the calibration showed.

    Args:
        run: runs the calibration through the model, for the form that looks for the largest errors.
    """
    linears = frozen_linears(model)
    made: dict[nn.Module, FormLinear] = {}
    for activation, channels in zip(activations, chosen_channels(form, activations), strict=True):
        readers = [linears[name] for name in activation.readers]
        x_absmax = activation.absmax.mean(dim=0)[channels]
        for linear, w_absmax in zip(readers, weight_absmaxes(form, activation, readers, channels), strict=True):
            made[linear] = FormLinear(linear, form, activation_max, channels, x_absmax, w_absmax, activation.gram)
    exempt = set(exempted(form, linears, made, run))
    for linear in exempt:
        made[linear].activation_max = INT8_MAX
    return with_base_layers(
        model, lambda linear: linear if linear in exempt and form.exempt_as == "float" else made[linear]
    )


def exempted(
    form: Form, linears: Mapping[str, nn.Module], made: Mapping[nn.Module, FormLinear], run: Callable[[], None]
) -> Iterable[nn.Module]:
    """Returns the linears that are exempt: by the end of their names, or as many as have the largest relative error."""
    if not isinstance(form.exempt, int):
        return [linear for name, linear in linears.items() if name.endswith(form.exempt or ("\0",))]
    errors = dict.fromkeys(made, 0.0)

    def compare(linear: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        errors[linear] += float((made[linear](arguments[0]) - y).norm() / y.norm())

    handles = [linear.register_forward_hook(compare) for linear in made]
    run()
    for handle in handles:
        handle.remove()
    return sorted(made, key=lambda linear: errors[linear], reverse=True)[: form.exempt]


def _of_default(**changes: Any) -> Form:
    return replace(DEFAULT, **changes)


def _of_paper(**changes: Any) -> Form:
    return replace(PAPER_FORM, **changes)


FORMS: Mapping[str, Form] = {
    "default": DEFAULT,
    "no outlier channels": _of_default(budget=0.0),
    "outlier channels 0.5 %": _of_default(budget=0.005),
    "outlier channels 2 %": _of_default(budget=0.02),
    "outlier channels 3 %": _of_default(budget=0.03),
    "rule: 100 × mean": _of_default(rule="100 × mean"),
    "rule: mean absmax": _of_default(rule="mean absmax"),
    "rule: absmax less its deviation": _of_default(rule="absmax less its deviation"),
    "rule: energy": _of_default(rule="energy"),
    "rule: energy, 1 % shared out over the model": _of_default(rule="energy", is_shared_out=True),
    "not rotated": _of_default(rotation=1),
    "rotated by 16": _of_default(rotation=16),
    "rotated by 256": _of_default(rotation=256),
    "rotated by 64 after random signs": _of_default(has_signs=True),
    "not rotated, 3 %": _of_default(rotation=1, budget=0.03),
    "not rotated, scales for 64 inputs": _of_default(rotation=1, activation_group=64),
    "not rotated, asymmetric": _of_default(rotation=1, is_asymmetric=True),
    "rotated, scales for 64 inputs": _of_default(activation_group=64),
    "float activations in forward": _of_default(activations="float"),
    "float gradients in backward": _of_default(backward="float"),
    "float weights": _of_default(rounding="none"),
    "one scale per weight": _of_default(weight_scale="tensor"),
    "weights rounded with error feedback": _of_default(rounding="error feedback"),
    "down_proj in float": _of_default(exempt=("down_proj",)),
    "down_proj at 8 bits": _of_default(exempt=("down_proj",), exempt_as="8 bits"),
    "the 10 worst linears in float": _of_default(exempt=10),
    "the 10 worst linears at 8 bits": _of_default(exempt=10, exempt_as="8 bits"),
    "√ scale": PAPER_FORM,
    "√ scale, rule: 100 × mean": _of_paper(rule="100 × mean"),
    "√ scale, rule: energy": _of_paper(rule="energy"),
    "√ scale, 3 %": _of_paper(budget=0.03),
    "√ scale, rotated": _of_paper(rotation=64),
    "scale with exponent 1/4": _of_paper(exponent=0.25),
    "scale with exponent 3/4": _of_paper(exponent=0.75),
    "scale with exponent 1": _of_paper(exponent=1.0),
    "√ scale, momentum 0": _of_paper(momentum=0.0),
    "√ scale, momentum 0.9": _of_paper(momentum=0.9),
    "√ scale, static": _of_paper(momentum=1.0),
    "√ scale shared, geometric mean": _of_paper(sharing="geometric mean"),
    "√ scale shared, mean": _of_paper(sharing="mean"),
    "√ scale shared, max": _of_paper(sharing="max"),
    "√ scale shared, min": _of_paper(sharing="min"),
    "√ scale shared, of the activation": _of_paper(sharing="activation"),
    "√ scale, one scale per weight": _of_paper(weight_scale="tensor"),
    "√ scale, correction in int8, per row": _of_paper(correction="rows"),
    "√ scale, correction in int8, one scale": _of_paper(correction="tensor"),
    "√ scale, float gradients in backward": _of_paper(backward="float"),
}
"""The ablations: what differs from `DEFAULT`, or with "scale" in its name from `PAPER_FORM`."""
