"""From observed to quantized: choose the outlier channels, make the weights int8, free the float ones."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import warnings
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from quaff_fx import distributed, numerics
from quaff_fx.config import QuaffConfig
from quaff_fx.errors import CalibrationError, QuaffWarning
from quaff_fx.kernels import dispatch
from quaff_fx.observe import Seen, Statistics
from quaff_fx.ops import IN_DIM_UNSEEN, STATIC_MOMENTUM
from quaff_fx.sites import Site
from quaff_fx.weights import OutlierState, QuantizedWeight, owners


@dataclass(frozen=True)
class Choice:
    """How one weight becomes int8.

    Attributes:
        in_dim: the dimension of the parameter that its product reduces over.
        outliers: the state of its activation, shared with the sites that read the same one. activation_max: Q.
        rotation: the block that weight and activation are rotated with.
    """

    site: Site
    in_dim: int
    outliers: OutlierState
    activation_max: int
    rotation: int


@dataclass
class Plan:
    """What becomes of the observed weights: chosen from their statistics, or as it was in a run that is resumed.

    Attributes:
        choices: of the weights that become int8, in order. left_alone: the other sites, each with its reason.
        columns: the float outlier columns (N, O) of weights that were loaded as int8, by weight name.
    """

    choices: list[Choice] = field(default_factory=list)
    left_alone: list[tuple[Site, str]] = field(default_factory=list)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def for_sites(self, sites: Sequence[Site]) -> Plan:
        """Returns the same plan for the sites of a copy of the model, with outlier states of their own."""
        by_name = {site.weight_name: site for site in sites}
        outliers = copy.deepcopy({id(choice.outliers): choice.outliers for choice in self.choices})
        return Plan(
            [replace(c, site=by_name[c.site.weight_name], outliers=outliers[id(c.outliers)]) for c in self.choices],
            [(by_name[site.weight_name], reason) for site, reason in self.left_alone],
            self.columns,
        )


def choose(sites: Sequence[Site], statistics: Mapping[str, Statistics], config: QuaffConfig) -> Plan:
    """Returns what is to become of every observed site; one that no linear read is left alone.

    Statistics are summed over all ranks of a distributed run first, so that every rank chooses the same channels.
    Changes nothing.

    Raises:
        CheckpointError: the file of a weight that was loaded as int8 has changed or vanished.
    """
    sites = [site for site in sites if not site.reason]
    for site in sites:
        site.observed.check_source()
    seen = {site.weight_name: statistics.get(site.weight_name) or Statistics.none(site) for site in sites}
    seen = _summed_over_ranks(seen)
    reasons = {site.weight_name: _reason_not_read(site, seen[site.weight_name]) for site in sites}
    read = [site for site in sites if not reasons[site.weight_name]]
    plan = Plan(left_alone=[(site, reason) for site in sites if (reason := reasons[site.weight_name])])
    for group in _groups(read, seen) if config.is_sharing else [[site] for site in read]:
        outliers = _outlier_state(group, seen, config, plan.columns)
        q = dispatch.activation_max(config.activation_bits, outliers.outlier_channels.device)
        for site in group:
            in_dim = seen[site.weight_name].in_dim
            rotation = numerics.rotation_block(site.shape[in_dim], config.largest_rotation)
            plan.choices.append(Choice(site, in_dim, outliers, q, rotation))
    return plan


def apply(plan: Plan, *, progress: bool) -> None:
    """Carries out `plan`: makes its sites quantized, one by one, so that never more than one weight exists twice.

    Whatever interrupts it, another call goes on where it was: what has to be read from files was read for the plan.
    """
    for site, reason in plan.left_alone:
        site.reason = reason
    held: list[tuple[str, weakref.ref[Tensor]]] = []
    for choice in tqdm(plan.choices, desc="quaff_fx: converting", disable=not progress, leave=False):
        site = choice.site
        weight = None
        for module, parameter in site.places:  # all of them share one
            if (done := owners.quantized_in(module).get(parameter)) is not None:
                weight = done
                continue
            if weight is None:
                if not site.weight.is_int8:
                    held.append((site.weight_name, weakref.ref(site.weight.tensors[0])))
                weight = converted(choice, plan.columns.get(site.weight_name))
            owners.attach(module, owners.states_of(module) | {parameter: weight})
    _warn_of_held_weights(held)
    _return_freed_memory()


def converted(choice: Choice, columns: Tensor | None = None) -> QuantizedWeight:
    """Returns what the weight of a site becomes; `columns` are those of one that was loaded as int8."""
    numbers = (choice.activation_max, choice.rotation)
    weight = choice.site.observed.quantized(choice.in_dim, choice.outliers, *numbers, columns)
    weight.grad_outliers = numerics.GRAD_OUTLIERS if choice.site.is_head else 0
    return weight


def _reason_not_read(site: Site, seen: Statistics) -> str:
    if seen.in_dim == IN_DIM_UNSEEN:
        return "no linear reads it"
    if seen.in_dim not in site.observed.in_dims:
        return "not only linears over one dimension read it"
    if site.shape[seen.in_dim] > numerics.INT32_MAX_REDUCTION:
        return f"{site.shape[seen.in_dim]} in-features are too long for int32 sums"
    return "" if site.observed.is_finite() else "weight has non-finite values"


def check_whole(sites: Sequence[Site]) -> None:
    """Raises `CalibrationError` if a weight is sharded before its conversion: one rank cannot see its columns."""
    for site in sites:
        if distributed.is_sharded(site.weight.tensors[0]):
            raise CalibrationError(
                f"{site.weight_name}: is sharded while it is observed, expected a whole weight. Call "
                "quaff_fx.calibrate(model, batches) before fully_shard; converted weights can be sharded."
            )


def hit_count(site: Site, seen: Seen, config: QuaffConfig) -> int:
    """How many channels of a site's input count as hits in a step when ranked by absmax."""
    if seen.in_dim not in (0, 1):
        return 0
    return numerics.outlier_count(site.shape[seen.in_dim], config.budget_of(site.name))


def _groups(sites: list[Site], seen: Mapping[str, Statistics]) -> list[list[Site]]:
    """Sites whose recorded statistics are equal bit for bit read the same activation.

    The pass shares a quantized activation only if the traced activation is the same as well.
    """
    groups: dict[tuple[int, bytes], list[Site]] = defaultdict(list)
    for site in sites:
        statistics = seen[site.weight_name]
        size = site.shape[statistics.in_dim]
        groups[size, statistics.absmax_sum[:size].cpu().numpy().tobytes()].append(site)
    return list(groups.values())


def _outlier_state(
    group: list[Site], seen: Mapping[str, Statistics], config: QuaffConfig, columns: dict[str, Tensor]
) -> OutlierState:
    """Chooses the outlier channels of one activation and their first smoothing scale.

    Puts the columns (N, O) of weights that were loaded as int8, which a file has to be read for, into `columns`.

    A group's weight absmax is the geometric mean of its sites': the maximum would leave the site with the smallest
    weights (v_proj) too little smoothing, the minimum would give the others too much.
    """
    first = seen[group[0].weight_name]
    size, device = group[0].shape[first.in_dim], group[0].weight.device
    absmax = (first.absmax_sum[:size] / max(first.steps, 1)).to(device)
    budget = max(config.budget_of(site.name) for site in group)
    count = numerics.outlier_count(size, budget)
    channels = numerics.stable_outlier_channels(first.hits[:size].to(device), absmax, count)
    absmaxes = []
    for site in group:
        w_outlier = site.observed.columns(channels, seen[site.weight_name].in_dim)
        if site.weight.is_int8:
            columns[site.weight_name] = w_outlier
        absmaxes.append(w_outlier.abs().amax(dim=0).float())
    w_absmax = torch.stack(absmaxes).log().mean(dim=0).exp()
    if config.smoothing == "split":
        return OutlierState(channels, w_absmax, torch.full_like(w_absmax, torch.inf), STATIC_MOMENTUM)
    target = numerics.smoothing_target(absmax.index_select(0, channels), w_absmax)
    return OutlierState(channels, w_absmax, target, float(config.momentum))


def _summed_over_ranks(seen: dict[str, Statistics]) -> dict[str, Statistics]:
    """Returns the statistics of all ranks together; those of each stay as they are."""
    return {
        name: Statistics(
            distributed.summed(statistics.hits),
            distributed.summed(statistics.absmax_sum),
            distributed.largest(statistics.in_dim, statistics.hits.device),
            statistics.steps * distributed.processes(),
        )
        for name, statistics in seen.items()
    }


def _return_freed_memory() -> None:
    """Gives the memory of the float weights back to the system: an allocator keeps it among what is still in use."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _warn_of_held_weights(held: list[tuple[str, weakref.ref[Tensor]]]) -> None:
    """Warns if someone still holds a float weight: then it takes memory that should have been freed."""
    gc.collect()
    alive = [(name, weight) for name, reference in held if (weight := reference()) is not None]
    if not alive:
        return
    # By type, since isinstance would run the __class__ properties of every object there is.
    objects = gc.get_objects()
    optimizers = [o for o in objects if issubclass(type(o), torch.optim.Optimizer)]
    held_by_optimizers = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    size = sum(weight.numel() * weight.element_size() for _, weight in alive) / 2**20
    holder = " Look for who holds them."
    if any(id(weight) in held_by_optimizers for _, weight in alive):
        names = ", ".join(sorted({type(o).__name__ for o in optimizers}))
        holder = f" An optimizer ({names}) was built over them: give it only the parameters that require a gradient."
    elif distributed.is_wrapper_among(objects):
        holder = " DistributedDataParallel keeps all that it was built over: calibrate before wrapping to free them."
    warnings.warn(
        f"{alive[0][0]} and {len(alive) - 1} more float weights: {size:.1f} MiB are still referenced after conversion, "
        f"expected to be freed.{holder}",
        QuaffWarning,
        stacklevel=2,
    )
