"""What a sweep says, on curves with known answers."""

from __future__ import annotations

import math

import pytest
from sweeps import noisy, parabola

import torch_depthmup as dm
from torch_depthmup.diagnostics.plots import transfer_figure
from torch_depthmup.diagnostics.transfer.optimum import Estimate
from torch_depthmup.diagnostics.transfer.result import Sweep
from torch_depthmup.diagnostics.transfer.runs import Job, Run


def test_optimum_drift_regret_and_edge_of_known_curves() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5.3) + parabola("mup", 64, -7.6, floor=0.05, edge=-3)))
    assert sweep.optimum("mup", 4).lr == 2**-5 and sweep.optimum("mup", 64).lr == 2**-8
    assert sweep.optimum("mup", 4).log2_lr.value == pytest.approx(-5.3)
    assert sweep.drift("mup", 64).value == pytest.approx(-2.3)
    wanted = 0.05 * math.exp(0.1 * 2.6**2) - 0.05 * math.exp(0.1 * 0.4**2)
    assert sweep.regret("mup", 64).value == pytest.approx(wanted)
    assert sweep.edge("mup", 64) == 2**-3 and sweep.edge("mup", 4) == math.inf
    assert not sweep.optimum("mup", 4).at_edge


def test_an_optimum_outside_the_grid_is_said_to_be() -> None:
    assert Sweep(tuple(parabola("mup", 4, -14))).optimum("mup", 4).at_edge


def test_a_curve_that_diverged_everywhere_has_no_optimum() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5, edge=-100) + parabola("mup", 8, -5)))
    assert math.isnan(sweep.optimum("mup", 4).lr) and sweep.optimum("mup", 4).loss == math.inf
    assert sweep.transferred("mup", 8) == [math.inf] and math.isnan(sweep.drift("mup", 8).value)
    assert len(transfer_figure(sweep).axes) == 1
    with pytest.raises(dm.DepthMuPError, match="mup at depth 5: the sweep has no such run"):
        sweep.optimum("mup", 5)


def test_what_seeds_share_over_depths_is_not_drift() -> None:
    """Each seed's optimum is shifted by a whole grid step or so, at both depths alike: the drift's error is small."""
    sweep = Sweep(tuple(noisy(-5, 6, 0.002, 1, 4, shared=0.8) + noisy(-6, 6, 0.002, 1, 8, shared=0.8)))
    drift, optimum = sweep.drift("mup", 8), sweep.optimum("mup", 8).log2_lr
    assert drift.value == pytest.approx(-1, abs=3 * drift.error) and drift.error < optimum.error / 3


def test_the_error_of_the_regret_is_taken_seed_by_seed() -> None:
    """Seeds differ a lot from each other, but the price of the transferred learning rate is nearly the same for all."""
    levels, prices = (0.1, 0.5, 0.9), (0.05, 0.06, 0.07)
    runs = [Run(Job("mup", 4, lr, s), loss, 1.0) for s in range(3) for lr, loss in ((0.1, 1.0), (0.2, 2.0))]
    for seed, (level, price) in enumerate(zip(levels, prices, strict=True)):
        runs += [Run(Job("mup", 8, 0.1, seed), level + price, 1.0), Run(Job("mup", 8, 0.2, seed), level, 1.0)]
    regret = Sweep(tuple(runs)).regret("mup", 8)
    assert regret.value == pytest.approx(0.06) and regret.error == pytest.approx(0.01 / math.sqrt(3))


def test_the_regret_of_what_diverges_is_infinite() -> None:
    runs = [Run(Job("mup", 4, lr, s), loss, 1.0) for s in range(2) for lr, loss in ((0.1, 2.0), (0.2, 1.0))]
    runs += [Run(Job("mup", 8, lr, s), loss, 1.0) for s in range(2) for lr, loss in ((0.1, 2.0), (0.2, math.inf))]
    regret = Sweep(tuple(runs)).regret("mup", 8)
    assert regret.value == math.inf and math.isnan(regret.error)


def test_the_summary_has_a_row_for_each_rule_and_depth() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5.3) + parabola("mup", 64, -7.6, edge=-3) + parabola("sp", 4, -5)))
    rows = sweep.summary()
    assert [(row["rule"], row["depth"]) for row in rows] == [("mup", 4), ("mup", 64), ("sp", 4)]
    assert rows[1]["drift"] == pytest.approx(-2.3) and rows[1]["edge"] == 2**-3 and rows[1]["lr"] == 2**-8
    assert rows[1]["regret"] == sweep.regret("mup", 64).value > 0
    assert str(Estimate(-1.234, 0.28)) == "-1.2±0.3" and str(Estimate(0.04, math.nan)) == "+0.0"


def test_a_sweep_prints_its_summary_and_what_it_says() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5.3) + parabola("mup", 64, -14, floor=0.05, edge=-3)))
    header, _, base, deep, _, said = str(sweep).splitlines()
    assert (
        header.split()[:4] == ["rule", "depth", "best", "lr"] and "moves by 2^" in header and "with lr of 4" in header
    )
    assert base.split() == ["mup", "4", "0.0312", "-5.3±0.0", "base", "none", "0.101", "0.101", "base"]
    assert deep.split()[:3] == ["mup", "64", "0.000977*"] and deep.split()[5] == "0.125"
    assert said.startswith(
        "In this run the learning rate tuned at depth 4 gives the lowest mean loss at depth 64 under mup"
    )
    lost = Sweep(tuple(parabola("mup", 4, -5, edge=-100) + parabola("mup", 8, -5)))
    assert str(lost).splitlines()[2].split() == ["mup", "4", "–", "–", "base", "0.000977", "inf", "inf", "base"]
