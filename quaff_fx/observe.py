"""Watching the activations of frozen weights while a model runs as it is, in eager code, hooks and all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from quaff_fx import numerics
from quaff_fx.errors import CalibrationError
from quaff_fx.ops import IN_DIM_CONFLICT, IN_DIM_UNSEEN
from quaff_fx.passes import matching
from quaff_fx.sites import Site
from quaff_fx.weights.int8_weight import Int8Weight, product_operands
from quaff_fx.weights.owners import weights_in


@dataclass(frozen=True)
class Statistics:
    """What the calibration steps saw of the activation that a frozen weight multiplies.

    Attributes:
        hits: (max(N, K),) float32, steps (or values) in which a channel was an outlier.
        absmax_sum: (max(N, K),) float32, sum over steps of its absmax.
        in_dim: which dimension of the weight the linears reduce over; -1 unseen, 2 not only linears.
        steps: number of steps folded in.
    """

    hits: Tensor
    absmax_sum: Tensor
    in_dim: int = IN_DIM_UNSEEN
    steps: int = 0

    @classmethod
    def none(cls, site: Site) -> Statistics:
        """Returns those of a site before the first step, on the device of its weight."""
        hits, absmax_sum = torch.zeros(2, max(site.shape), dtype=torch.float32, device=site.weight.device)
        return cls(hits, absmax_sum)

    def with_step(self, seen: Seen | None, outliers: int, threshold: float) -> Statistics:
        """Returns these and one step more, in which `seen` was seen.

        Args:
            outliers: so many channels count as hits when ranked by absmax. threshold: 0, or what `Observer` counts by.
        """
        if seen is None or seen.absmax is None:
            return Statistics(self.hits, self.absmax_sum, _joined(self.in_dim, seen), self.steps + 1)
        hits, absmax_sum = self.hits.clone(), self.absmax_sum.clone()
        here = slice(0, seen.absmax.shape[0])
        counted = seen.count if threshold > 0 else numerics.outlier_hits(seen.absmax, outliers)
        if counted is not None:
            hits[here] += counted.to(hits.device)
        absmax_sum[here] += seen.absmax.to(absmax_sum.device)
        return Statistics(hits, absmax_sum, _joined(self.in_dim, seen), self.steps + 1)


@dataclass
class Seen:
    """What one step saw of a site; both dimensions of the weight where it multiplies in both directions.

    Attributes:
        absmax: (K,) float32, the largest over all its uses; None if no linear read it. count: (K,) float32, values over
            the threshold. in_dim: as of `Statistics`. readers: what else read it, by name.
    """

    absmax: Tensor | None = None
    count: Tensor | None = None
    in_dim: int = IN_DIM_UNSEEN
    readers: dict[str, str] = field(default_factory=dict)


def _joined(in_dim: int, seen: Seen | None) -> int:
    if seen is None or seen.in_dim == IN_DIM_UNSEEN:
        return in_dim
    return seen.in_dim if in_dim in (IN_DIM_UNSEEN, seen.in_dim) else IN_DIM_CONFLICT


class Observer(TorchFunctionMode):
    """Sees every use of the weights of `sites` while it is on, in this thread; changes nothing.

    A linear over the weight, in whatever form (`F.linear`, ``x @ w``, `addmm`, through transposes and casts), is
    observed by its activation. What only reads the values (the norm of DoRA) keeps no weight in float; any other use
    (a table, a convolution, an edit) does. A step's maxima are kept over all uses, so that a forward that runs twice
    counts once.

    Attributes:
        seen: what was seen of each active site, by weight name.
        multiply_adds: of every matrix of the model, also those left alone, by weight name.
    """

    def __init__(self, sites: Sequence[Site], threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.seen: dict[str, Seen] = {}
        self.multiply_adds: dict[str, int] = defaultdict(int)
        # By id: a weight is one object, however many modules own it.
        self._sites: dict[int, Site] = {}
        self._transposed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # views of weights: site, transposed
        for site in sites:
            if (weight := weights_in(site.module).get(site.parameter)) is not None:
                self._sites[id(weight)] = site

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func` and looks at the weights among its arguments."""
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # code that the model compiles on its own, in this thread
            return func(*args, **kwargs)
        weights = [
            (tensor, weight) for tensor in _tensors(args, kwargs) if (weight := self._weight(tensor)) is not None
        ]
        result = func(*args, **kwargs)
        if weights:
            with torch.inference_mode(False), torch.no_grad():
                self._look(func, args, kwargs, weights, result)
        return result

    def check_finite(self, step: int) -> None:
        """Raises `CalibrationError` if an activation had NaN or infinite values in calibration step `step`."""
        observed = [(name, seen.absmax) for name, seen in self.seen.items() if seen.absmax is not None]
        if not observed:
            return
        device = observed[0][1].device
        finite = torch.stack([torch.isfinite(absmax).all().to(device) for _, absmax in observed]).tolist()
        for (name, _), is_finite in zip(observed, finite, strict=True):
            if not is_finite:
                raise CalibrationError(
                    f"{name}: its input has NaN or infinite values in calibration step {step}, expected "
                    "finite ones. Nothing was converted and the step does not count. Check the data and learning rate."
                )

    def _weight(self, tensor: Tensor) -> tuple[Site, bool] | None:
        """The site whose weight a tensor is or shows, and whether it shows it transposed."""
        if isinstance(tensor, Int8Weight):
            site = self._sites.get(id(tensor._state))
            return None if site is None else (site, False)
        site = self._sites.get(id(tensor))
        if site is not None and site.module._parameters.get(site.parameter) is tensor:  # not one that took its id
            return site, False
        found: tuple[Site, bool] | None = self._transposed.get(tensor)  # type: ignore[no-untyped-call]
        return found

    def _look(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: list[tuple[Tensor, tuple[Site, bool]]],
        result: Any,
    ) -> None:
        name = matching.function_name(func)
        operands = product_operands(func, args, kwargs)
        if operands is not None and (form := _reason_not_plain(operands[0])):
            for _, (site, _) in weights:
                self._note_reader(site, f"{name} {form}")
            return
        for tensor, (site, transposed) in weights:
            is_first = bool(args) and args[0] is tensor
            is_viewed = is_first and isinstance(result, Tensor)
            if operands is not None and operands[1] is tensor and operands[0] is not tensor:
                in_dim = operands[3] if not transposed else 1 - operands[3]
                self._observe(site, in_dim, operands[0])
            elif is_viewed and name in (*matching.COPIES, "data") and result.is_floating_point():
                self._transposed[result] = (site, transposed)
            elif is_viewed and matching.is_transpose(name, args[1:], kwargs):
                self._transposed[result] = (site, not transposed)
            elif (is_first and name in matching.EDITS) or kwargs.get("out") is tensor:
                self._note_reader(site, name, is_edit=True)
            elif not _reads_no_values(name, is_first, result):
                self._note_reader(site, name)
            if name in matching.PRODUCTS | matching.CONVOLUTIONS | matching.LAYERS:
                tensors = list(_tensors(args, kwargs))
                if name in matching.LAYERS:
                    count = _multiply_adds_of_layer(site, name, tensor, tensors, kwargs)
                else:
                    x = operands[0] if operands is not None else _operand_beside(tensor, tensors)
                    count = _multiply_adds(site, name, x, result)
                self.multiply_adds[site.weight_name] += count
            elif isinstance(result, Tensor) and len(site.shape) > 2:  # one expert of several
                self._transposed[result] = (site, transposed)

    def _observe(self, site: Site, in_dim: int, x: Tensor) -> None:
        if site.reason:
            return
        seen = self.seen.setdefault(site.weight_name, Seen())
        if seen.in_dim not in (IN_DIM_UNSEEN, in_dim):
            seen.in_dim, seen.absmax = IN_DIM_CONFLICT, None
            return
        seen.in_dim = in_dim
        x = x.detach().reshape(-1, x.shape[-1])
        absmax = numerics.channel_absmax(x)
        seen.absmax = absmax if seen.absmax is None else torch.maximum(seen.absmax, absmax)
        if self.threshold > 0 and x.shape[0]:
            magnitude = x.abs().float()
            count = (magnitude > self.threshold * magnitude.mean()).sum(dim=0).float()
            seen.count = count if seen.count is None else torch.maximum(seen.count, count)

    def _note_reader(self, site: Site, name: str, is_edit: bool = False) -> None:
        if site.reason:
            return
        seen = self.seen.setdefault(site.weight_name, Seen())
        if (name in matching.VALUE_READS or (name == "embedding" and site.table)) and not is_edit:
            seen.readers[name] = "reads its values"
        else:
            seen.readers[name] = "uses it in another way"
            seen.in_dim, seen.absmax = IN_DIM_CONFLICT, None


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors among arguments, also in lists of them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


def _reason_not_plain(x: Any) -> str:
    """What keeps an activation from being seen as rows of features; empty if nothing does."""
    if isinstance(x, Tensor) and x.is_nested:
        return "of a nested tensor"
    return "under torch.func" if torch._C._functorch.is_functorch_wrapped_tensor(x) else ""


def _operand_beside(weight: Tensor, tensors: list[Tensor]) -> Tensor:
    """What a product multiplies `weight` by: the tensor before it, or behind it if it comes first."""
    index = next(index for index, tensor in enumerate(tensors) if tensor is weight)
    return tensors[index - 1] if index else tensors[-1]


def _multiply_adds_of_layer(
    site: Site, name: str, weight: Tensor, tensors: list[Tensor], kwargs: Mapping[str, Any]
) -> int:
    """How many multiply-adds one of `matching.LAYERS` takes with `weight`; `tensors` are all of its arguments."""
    tokens = [x.numel() // max(1, x.shape[-1]) for x in tensors[:3]]
    if name == "multi_head_attention_forward":  # of query, key and value
        if weight is tensors[3] and kwargs.get("q_proj_weight") is None:  # one weight for the three
            return int(sum(tokens) * math.prod(site.shape) // 3)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        tokens = [count for name, count in zip(names, tokens, strict=True) if kwargs.get(name) is weight] or tokens
    return int(tokens[0] * math.prod(site.shape))


def _multiply_adds(site: Site, name: str, x: Tensor, result: Any) -> int:
    """How many multiply-adds a product with x takes."""
    return int(result.numel() * (math.prod(site.shape[1:]) if name in matching.CONVOLUTIONS else x.shape[-1]))


_PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.layout)


def _reads_no_values(name: str, is_first: bool, result: Any) -> bool:
    """Tells whether a call takes the form of a weight alone: a shape, a dtype, a flag, a tensor like it."""
    if name in matching.METADATA or (name in matching.METADATA_OF_OTHER and not is_first):
        return True
    if name in _GIVES_MEMORY:
        return False
    parts = result if isinstance(result, tuple) else (result,)
    return all(isinstance(part, _PLAIN) for part in parts)


_GIVES_MEMORY = {"data_ptr"}
"""Names of functions that give the memory of a tensor away as a number, which an int8 weight does not have."""
