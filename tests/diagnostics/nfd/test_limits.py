"""Limits of depth: extrapolated where there is one, called growth where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from torch_depthmup.diagnostics.nfd.kernels import first_order_change
from torch_depthmup.diagnostics.nfd.limits import depth_growth, infinite_depth, returns
from torch_depthmup.diagnostics.nfd.setting import Setting
from torch_depthmup.errors import DepthMuPError

X = torch.nn.functional.normalize(torch.randn(3, 10, generator=torch.Generator().manual_seed(0))) * math.sqrt(10)
Y = torch.tensor([1.0, -1.0, 0.5])


def test_infinite_depth_extrapolates_and_knows_its_rate() -> None:
    # infinitely wide, one step, first order: the limit is known from the tangent kernel at great depth
    limit = infinite_depth(
        Setting(depth=2, steps=1, lr=0.1, activation="relu"), X, Y, depths=[2, 4, 8, 16], width=30000, seeds=24
    )
    deep = first_order_change(Setting(depth=2000, steps=1, lr=0.1, activation="relu"), X, Y).float()
    assert float((limit.value[1, :, 0] - deep).abs().max()) < 0.01
    assert limit.rate == pytest.approx(1, abs=max(0.4, 3 * limit.rate_error))


def test_returns_diminish() -> None:
    common = {"steps": 2, "lr": 2.0, "activation": "relu"}
    small = returns(Setting(depth=1, **common), X, Y, width=2000, seeds=32)
    large = returns(Setting(depth=8, **common), X, Y, width=2000, seeds=32)
    assert small.next_depth[0] - 3 * small.next_depth[1] > large.next_depth[0]
    narrow = returns(Setting(depth=2, **common), X, Y, width=100, seeds=32)
    assert narrow.seed_spread == pytest.approx(small.seed_spread * math.sqrt(20), rel=0.5)
    assert "twice the width" in str(small)


@pytest.mark.parametrize("depths", [[4, 8], [8, 4, 16], [4, 4, 8]])
def test_depths_that_cannot_be_extrapolated_are_refused(depths) -> None:
    with pytest.raises(DepthMuPError, match="three or more ascending"):
        infinite_depth(Setting(depth=2, steps=1, lr=0.1), X, Y, depths=depths)
    with pytest.raises(DepthMuPError, match="single seed"):
        returns(Setting(depth=2, steps=1, lr=0.1), X, Y, width=64, seeds=1)


@pytest.mark.parametrize(
    "rule, block_layers, growth",
    [
        ("depth-mup", 1, 0.0),
        ("depth-mup", 2, 0.0),
        ("depth-mup-corrected", 1, 0.0),
        ("depth-mup-corrected", 2, 0.5),
        ("complete-p", 2, 0.0),
        ("mup", 2, math.inf),
    ],
)
def test_what_the_function_grows_by_follows_from_the_rule(rule: str, block_layers, growth: float) -> None:
    assert depth_growth(Setting(depth=8, steps=1, lr=1.0, rule=rule, block_layers=block_layers)) == growth


def test_without_a_limit_nothing_is_extrapolated_and_the_growth_is_measured() -> None:
    setting = Setting(depth=4, steps=1, lr=0.05, block_layers=2, rule="depth-mup-corrected")
    limit = infinite_depth(setting, X, Y, depths=[8, 32, 128], width=1000, seeds=8)
    assert limit.value is None and limit.error is None and limit.growth == 0.5
    measured, error = limit.measured_growth
    assert 0.2 < measured < 0.55 and error < 0.1
    assert "no limit" in str(limit)
    assert "no limit" in str(returns(setting, X, Y, width=500, seeds=8))
