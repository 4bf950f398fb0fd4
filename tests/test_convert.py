"""From statistics to a plan, and from a plan to int8 weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import quaff_fx
from quaff_fx import convert, distributed
from quaff_fx.config import QuaffConfig
from quaff_fx.errors import CalibrationError, QuaffWarning
from quaff_fx.observe import Statistics
from quaff_fx.ops import IN_DIM_UNSEEN, STATIC_MOMENTUM
from quaff_fx.sites import Site, find_sites
from quaff_fx.weights import QuantizedWeight, owners
from tests.models import tiny_llama, token_ids

QUIET = {"progress": False, "calibration_steps": 1}
CONFIG = QuaffConfig(outlier_budget=0.25, rotation=1, scope="model")


class Attention(nn.Module):
    """q and k read one activation, out another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(8, 8).requires_grad_(False) for _ in range(3))


def seen(*channels: int, in_dim: int = 1, size: float = 1.0) -> Statistics:
    """What one step saw, with outliers in `channels`."""
    hits, absmax = torch.zeros(8), torch.full((8,), size)
    hits[list(channels)] = 1
    absmax[list(channels)] = 50 * size
    return Statistics(hits, absmax, in_dim, 1)


@pytest.fixture
def sites() -> list[Site]:
    return find_sites(Attention(), CONFIG)


STATISTICS = {"q.weight": seen(3, 5), "k.weight": seen(3, 5), "out.weight": seen(1, 2)}


def test_sites_that_saw_the_same_share_one_outlier_state(sites: list[Site]) -> None:
    q, k, out = convert.choose(sites, STATISTICS, CONFIG).choices
    assert (q.site.name, k.site.name, out.site.name) == ("q", "k", "out")
    assert q.outliers is k.outliers
    assert q.outliers.outlier_channels.tolist() == [3, 5]
    assert out.outliers.outlier_channels.tolist() == [1, 2]
    columns = [choice.site.weight.tensors[0][:, [3, 5]].abs().amax(dim=0) for choice in (q, k)]
    torch.testing.assert_close(q.outliers.outlier_w_absmax, (columns[0] * columns[1]).sqrt())


def test_momentum_begins_at_its_target_and_split_takes_the_channels_out(sites: list[Site]) -> None:
    """s = max(1, sqrt(absmax of the activation / absmax of the weight)), per channel."""
    split = convert.choose(sites, STATISTICS, CONFIG).choices[2].outliers
    assert split.smoothing_scale.isinf().all()
    assert split.momentum == STATIC_MOMENTUM
    config = QuaffConfig(outlier_budget=0.25, smoothing="momentum", momentum=0.3)
    outliers = convert.choose(sites, STATISTICS, config).choices[2].outliers
    torch.testing.assert_close(outliers.smoothing_scale, (50 / outliers.outlier_w_absmax).sqrt())
    assert outliers.momentum == 0.3


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        (seen(1, in_dim=IN_DIM_UNSEEN), "no linear reads it"),
        (seen(1, in_dim=2), "not only linears over one dimension read it"),
        (None, "no linear reads it"),
    ],
)
def test_what_no_linear_reads_is_left_alone(sites: list[Site], statistics: Statistics | None, reason: str) -> None:
    plan = convert.choose(sites, STATISTICS | {"k.weight": statistics}, CONFIG)
    assert [(site.name, why) for site, why in plan.left_alone] == [("k", reason)]
    assert [choice.site.name for choice in plan.choices] == ["q", "out"]
    assert all(site.reason == "" for site in sites), "choosing changes nothing"
    convert.apply(plan, progress=False)
    assert [site.reason for site in sites] == ["", reason, ""]


def test_a_weight_with_a_value_that_is_not_finite_is_left_alone(sites: list[Site]) -> None:
    sites[0].weight.tensors[0][0, 0] = torch.nan
    assert [(s.name, why) for s, why in convert.choose(sites, STATISTICS, CONFIG).left_alone] == [
        ("q", "weight has non-finite values")
    ]


def test_a_plan_is_carried_out_once_however_often_it_is_applied(sites: list[Site]) -> None:
    plan = convert.choose(sites, STATISTICS, CONFIG)
    convert.apply(plan, progress=False)
    weights = [site.quantized for site in sites]
    convert.apply(plan, progress=False)
    assert [site.quantized for site in sites] == weights
    assert all(
        site.weight.outlier_channels == tuple(c.outliers.outlier_channels)
        for site, c in zip(sites, plan.choices, strict=True)
    )


def test_modules_that_share_a_weight_get_one_state() -> None:
    model = Attention()
    model.k.weight = model.q.weight
    sites = find_sites(model, CONFIG)
    convert.apply(convert.choose(sites, STATISTICS, CONFIG), progress=False)
    assert owners.states_of(model.q) == owners.states_of(model.k)
    assert isinstance(model.q._modules["quaff_weight"], QuantizedWeight)


def test_the_plan_of_a_copy_has_outlier_states_of_its_own(sites: list[Site]) -> None:
    plan, others = convert.choose(sites, STATISTICS, CONFIG), find_sites(Attention(), CONFIG)
    copied = plan.for_sites(others)
    assert [choice.site for choice in copied.choices] == others
    q, k, out = copied.choices
    assert q.outliers is k.outliers is not out.outliers
    assert q.outliers is not plan.choices[0].outliers
    assert torch.equal(q.outliers.outlier_channels, plan.choices[0].outliers.outlier_channels)


def test_a_weight_that_is_sharded_before_its_conversion_is_told(
    sites: list[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.check_whole(sites)
    k = sites[1].weight.tensors[0]
    monkeypatch.setattr(distributed, "is_sharded", lambda tensor: tensor is k)
    with pytest.raises(CalibrationError, match=r"^k\.weight: is sharded while it is observed, expected a whole weight"):
        convert.check_whole(sites)


def test_a_float_weight_that_someone_holds_is_told_with_its_size(sites: list[Site]) -> None:
    held: Tensor = sites[2].weight.tensors[0]
    plan = convert.choose(sites, STATISTICS, CONFIG)
    with pytest.warns(QuaffWarning, match=r"^out\.weight and 0 more float weights: .* Look for who holds them\.$"):
        convert.apply(plan, progress=False)
    assert held.shape == (8, 8)


def test_optimizer_over_frozen_weights_is_warned_of_once() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    quaff_fx.compile(model, QUIET)
    with pytest.warns(
        QuaffWarning, match=r"13 more float weights.*optimizer \(.*AdamW.*\) was built over them"
    ) as caught:
        quaff_fx.calibrate(model, [token_ids()])
    assert len([warning for warning in caught if warning.category is QuaffWarning]) == 1
    del optimizer


def test_optimizer_over_trainable_weights_is_fine() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    quaff_fx.compile(model, QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuaffWarning)
        quaff_fx.calibrate(model, [token_ids()])
    assert len(optimizer.param_groups[0]["params"]) == 28
