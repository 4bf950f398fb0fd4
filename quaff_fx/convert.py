"""From observed to quantized: choose the outlier channels, make the weights int8, free the float ones."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import warnings
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quaff_fx import numerics, ops, state
from quaff_fx.config import QuaffConfig
from quaff_fx.errors import CalibrationError, QuaffWarning
from quaff_fx.kernels import product
from quaff_fx.ops import STATIC_MOMENTUM
from quaff_fx.sites import Site
from quaff_fx.state import LoadedWeight, ObservedWeight, OutlierState, QuantizedWeight, WeightState


def weight_state(site: Site) -> WeightState:
    """Returns the state of the weight of a site that is observed or quantized."""
    return state.states_of(site.module)[site.parameter]


def observed(site: Site) -> ObservedWeight:
    """Returns the statistics of a site that is being observed."""
    weight = weight_state(site)
    statistics = weight.observer if isinstance(weight, LoadedWeight) else weight
    assert isinstance(statistics, ObservedWeight)
    return statistics


def loaded(site: Site) -> LoadedWeight | None:
    """Returns the weight of a site that was loaded as int8, None of any other."""
    weight = state.states_of(site.module).get(site.parameter)
    return weight if isinstance(weight, LoadedWeight) else None


def float_weight(site: Site) -> nn.Parameter:
    """Returns the weight of an observed site that was not loaded as int8."""
    weight = site.module._parameters[site.parameter]
    assert weight is not None
    return weight


def quantized(site: Site) -> QuantizedWeight:
    """Returns the weight of a site that is quantized."""
    weight = weight_state(site)
    assert isinstance(weight, QuantizedWeight)
    return weight


def stop_observing(site: Site) -> None:
    """Makes the weight of a site what it was before it was observed."""
    if (int8 := loaded(site)) is not None:
        int8.observer = None
    else:
        state.restore(site.module, site.parameter)


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


def choose(sites: Sequence[Site], config: QuaffConfig) -> Plan:
    """Returns what is to become of every observed site; one that no linear read is left alone.

    Statistics are summed over all ranks of a distributed run first, so that every rank chooses the same channels.

    Raises:
        CalibrationError: no linear read any of the sites.
        CheckpointError: the file of a weight that was loaded as int8 has changed or vanished.
    """
    sites = [site for site in sites if not site.reason]
    for int8 in map(loaded, sites):
        if int8 is not None:
            int8.source.check_unchanged()
    _sum_over_ranks(sites)
    reasons = {site.weight_name: _reason_not_read(site) for site in sites}
    if all(reasons.values()):
        raise CalibrationError(
            f"model: none of its {len(sites)} frozen weights was read by a traced linear, expected at least one. "
            "Look at quaff_fx.graphs(model) to see what was captured."
        )
    read = [site for site in sites if not reasons[site.weight_name]]
    plan = Plan(left_alone=[(site, reason) for site in sites if (reason := reasons[site.weight_name])])
    for group in _groups(read) if config.is_sharing else [[site] for site in read]:
        outliers = _outlier_state(group, config, plan.columns)
        q = product.activation_max(config.activation_bits, outliers.outlier_channels.device)
        rotation = numerics.rotation_block(in_features(group[0]), config.largest_rotation)
        plan.choices += [Choice(site, int(observed(site).in_dim_seen), outliers, q, rotation) for site in group]
    return plan


def apply(plan: Plan, *, progress: bool) -> None:
    """Carries out `plan`: makes its sites quantized, one by one, so that never more than one weight exists twice.

    Nothing can fail in the middle: all that has to be read was read for the plan.
    """
    for site, reason in plan.left_alone:
        site.reason = reason
        stop_observing(site)
    held: list[tuple[str, weakref.ref[Tensor]]] = []
    for choice in tqdm(plan.choices, desc="quaff_fx: converting", disable=not progress, leave=False):
        site = choice.site
        if loaded(site) is None:
            held.append((site.weight_name, weakref.ref(float_weight(site))))
        weight = converted(choice, plan.columns.pop(site.weight_name, None))
        state.attach(site.module, state.states_of(site.module) | {site.parameter: weight})
    _warn_of_held_weights(held)
    _return_freed_memory()


def converted(choice: Choice, columns: Tensor | None = None) -> QuantizedWeight:
    """Returns what the weight of a site becomes; `columns` are those of one that was loaded as int8."""
    if (int8 := loaded(choice.site)) is None:
        weight = float_weight(choice.site)
        return QuantizedWeight(weight, choice.in_dim, choice.outliers, choice.activation_max, choice.rotation)
    assert columns is not None
    return QuantizedWeight.of_loaded(int8, columns, choice.outliers, choice.activation_max)


def _reason_not_read(site: Site) -> str:
    seen = int(observed(site).in_dim_seen)
    if seen == ops.IN_DIM_UNSEEN:
        return "no traced linear reads it"
    if seen == ops.IN_DIM_CONFLICT:
        return "not only linears over one dimension read it"
    if loaded(site) is not None:
        return ""
    return "" if bool(torch.isfinite(float_weight(site)).all()) else "weight has non-finite values"


def in_features(site: Site) -> int:
    """K of a site whose orientation was seen."""
    if (int8 := loaded(site)) is not None:
        return int8.w_int8.shape[1]
    return site.shape[int(observed(site).in_dim_seen)]


def check_whole(sites: Sequence[Site]) -> None:
    """Raises `CalibrationError` if a weight is sharded before its conversion: one rank cannot see its columns."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    for site in sites:
        int8 = loaded(site)
        weight = site.module._parameters.get(site.parameter) if int8 is None else int8.w_int8
        if isinstance(weight, DTensor):
            raise CalibrationError(
                f"{site.weight_name}: is sharded while it is observed, expected a whole weight. Call "
                "quaff_fx.calibrate(model, batches) before fully_shard; converted weights can be sharded."
            )


def hit_count(site: Site, config: QuaffConfig) -> int:
    """How many channels of a site's input count as hits in a step when ranked by absmax; 0 before it was seen."""
    is_seen = int(observed(site).in_dim_seen) in (0, 1)
    return numerics.outlier_count(in_features(site), config.budget_of(site.name)) if is_seen else 0


def _groups(sites: list[Site]) -> list[list[Site]]:
    """Sites whose recorded statistics are equal bit for bit read the same activation.

    The pass shares a quantized activation only if the traced activation is the same as well.
    """
    groups: dict[tuple[int, bytes], list[Site]] = defaultdict(list)
    for site in sites:
        statistics = observed(site).absmax_sum[: in_features(site)]
        groups[in_features(site), statistics.cpu().numpy().tobytes()].append(site)
    return list(groups.values())


def _outlier_state(group: list[Site], config: QuaffConfig, columns: dict[str, Tensor]) -> OutlierState:
    """Chooses the outlier channels of one activation and their first smoothing scale.

    Puts the columns (N, O) of weights that were loaded as int8, which a file has to be read for, into `columns`.

    A group's weight absmax is the geometric mean of its sites': the maximum would leave the site with the smallest
    weights (v_proj) too little smoothing, the minimum would give the others too much.
    """
    first = observed(group[0])
    size = in_features(group[0])
    absmax = first.absmax_sum[:size] / max(first.steps, 1)
    budget = max(config.budget_of(site.name) for site in group)
    count = numerics.outlier_count(size, budget)
    channels = numerics.stable_outlier_channels(first.hits[:size], absmax, count)
    absmaxes = []
    for site in group:
        if (int8 := loaded(site)) is not None:
            columns[site.weight_name] = int8.columns(channels)
            absmaxes.append(columns[site.weight_name].abs().amax(dim=0).float())
            continue
        weight, in_dim = float_weight(site), int(observed(site).in_dim_seen)
        absmaxes.append(weight.detach().index_select(in_dim, channels).abs().amax(dim=1 - in_dim).float())
    w_absmax = torch.stack(absmaxes).log().mean(dim=0).exp()
    if config.smoothing == "split":
        return OutlierState(channels, w_absmax, torch.full_like(w_absmax, torch.inf), STATIC_MOMENTUM)
    target = numerics.smoothing_target(absmax.index_select(0, channels), w_absmax)
    return OutlierState(channels, w_absmax, target, float(config.momentum))


def _sum_over_ranks(sites: Sequence[Site]) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for site in sites:
        statistics = observed(site)
        for tensor in (statistics.hits, statistics.absmax_sum):
            torch.distributed.all_reduce(tensor)
        torch.distributed.all_reduce(statistics.in_dim_seen, op=torch.distributed.ReduceOp.MAX)
        statistics.steps *= torch.distributed.get_world_size()


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
    elif any(type(o) is nn.parallel.DistributedDataParallel for o in objects):
        holder = " DistributedDataParallel keeps all that it was built over: calibrate before wrapping to free them."
    warnings.warn(
        f"{alive[0][0]} and {len(alive) - 1} more float weights: {size:.1f} MiB are still referenced after conversion, "
        f"expected to be freed.{holder}",
        QuaffWarning,
        stacklevel=2,
    )
