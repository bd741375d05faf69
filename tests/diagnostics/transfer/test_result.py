"""What a sweep says, on curves with known answers."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from sweeps import noisy, parabola

import torch_depthmup as dm
from torch_depthmup.diagnostics.plots import transfer_figure
from torch_depthmup.diagnostics.transfer.optimum import Estimate
from torch_depthmup.diagnostics.transfer.result import Sweep, told_apart
from torch_depthmup.diagnostics.transfer.runs import Job, Run


def test_optimum_drift_regret_and_edge_of_known_curves() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5.3) + parabola("mup", 64, -7.6, floor=0.05, edge=-3)))
    assert sweep.optimum("mup", 4).lr == 2**-5 and sweep.optimum("mup", 64).lr == 2**-8
    assert sweep.optimum("mup", 4).log2_lr.value == pytest.approx(-5.3, abs=0.1)
    assert sweep.drift("mup", 64).value == pytest.approx(-2.3, abs=0.2)
    wanted = 0.05 * math.exp(0.1 * 2.6**2) - 0.05 * math.exp(0.1 * 0.4**2)
    assert sweep.regret("mup", 64).value == pytest.approx(wanted)
    assert sweep.edge_of_stability("mup", 64) == 2**-3 and sweep.edge_of_stability("mup", 4) == math.inf
    assert not sweep.optimum("mup", 4).at_grid_end


def test_an_optimum_outside_the_grid_is_said_to_be() -> None:
    assert Sweep(tuple(parabola("mup", 4, -14))).optimum("mup", 4).at_grid_end


def test_a_curve_that_diverged_everywhere_has_no_optimum() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5, edge=-100) + parabola("mup", 8, -5)))
    assert math.isnan(sweep.optimum("mup", 4).lr) and sweep.optimum("mup", 4).loss == math.inf
    assert sweep.transferred("mup", 8) == [math.inf] and math.isnan(sweep.drift("mup", 8).value)
    assert len(transfer_figure(sweep).axes) == 1
    with pytest.raises(dm.DepthMuPError, match="mup at depth 5: the sweep has no such run"):
        sweep.optimum("mup", 5)


def test_shifts_that_seeds_share_are_part_of_the_error() -> None:
    """Each seed's optimum is shifted by a whole grid step or so."""
    sweep = Sweep(tuple(noisy(-5, 6, 0.002, 1, 4, shared=0.8) + noisy(-6, 6, 0.002, 1, 8, shared=0.8)))
    drift = sweep.drift("mup", 8)
    assert drift.value == pytest.approx(-1, abs=3 * drift.error) and drift.error > 0.2


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
    assert (
        rows[1]["drift"] == pytest.approx(-2.3, abs=0.2)
        and rows[1]["edge_of_stability"] == 2**-3
        and rows[1]["lr"] == 2**-8
    )
    assert rows[1]["regret"] == sweep.regret("mup", 64).value > 0
    assert str(Estimate(-1.234, 0.28)) == "-1.2±0.3" and str(Estimate(0.04, math.nan)) == "+0.0"


def test_a_sweep_prints_in_80_columns_what_it_says() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5.3) + parabola("mup", 64, -14, floor=0.05, edge=-3)))
    header, _, base, deep, _, *lines = str(sweep).splitlines()
    said = " ".join(lines)
    assert header.split("  ")[0] == "rule" and "moves by 2^" in header and "with lr of 4" in header
    assert base.split() == ["mup", "4", "0.0312", "base", "0.101", "0.101"]
    assert deep.split()[:4] == ["mup", "64", "0.000977*", f"<{-9 - sweep.optimum('mup', 4).log2_lr.value:+.1f}"]
    assert max(map(len, str(sweep).splitlines())) <= 80
    assert said.startswith(
        "In this run the learning rate tuned at depth 4 gives the lowest mean loss at depth 64 under mup"
    )
    assert "< and > are bounds" in said
    lost = Sweep(tuple(parabola("mup", 4, -5, edge=-100) + parabola("mup", 8, -5)))
    assert str(lost).splitlines()[2].split() == ["mup", "4", "–", "base", "inf", "inf"]


@pytest.mark.parametrize(
    "deep, base, bound",
    [(-14, -5, "<"), (3, -5, ">"), (-5, -14, ">"), (-5, 3, "<"), (-14, 3, "<"), (-14, -14, "unknown")],
)
def test_the_drift_of_an_optimum_off_the_grid_is_a_bound(deep: float, base: float, bound: str) -> None:
    """The truth lies on the side that the bound says; two bounds that do not add up say nothing."""
    sweep = Sweep(tuple(parabola("mup", 4, base) + parabola("mup", 64, deep)))
    drift, row = sweep.drift("mup", 64), sweep.summary()[1]
    assert math.isnan(row["drift"])
    if bound == "unknown":
        assert math.isnan(drift.value) and row["drift_bound"] == ""
        return
    assert drift.bound == bound and row["drift_bound"].startswith(bound)
    assert deep - base < drift.value if bound == "<" else deep - base > drift.value


def test_negative_losses_are_losses_too() -> None:
    runs = [
        Run(Job("mup", d, 2.0**-i, s), -1.0 + 0.1 * (i - 6.2) ** 2, 0.0)
        for d in (4, 8)
        for i in range(3, 10)
        for s in (0, 1)
    ]
    assert Sweep(tuple(runs)).optimum("mup", 4).log2_lr.value == pytest.approx(-6.2, abs=0.15)


SPREADS = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8}


def test_rules_that_are_alike_are_told_apart_in_one_sweep_of_twenty_at_most() -> None:
    """Five rules of one mean and very different spreads: any pair that is told apart is a mistake."""
    dice, wrong = random.Random(0), 0
    for _ in range(100):
        losses = {name: [dice.gauss(1, spread) for _ in range(4)] for name, spread in SPREADS.items()}
        wrong += any(told_apart(losses, one, other) for one in losses for other in losses if one < other)
    assert wrong / 100 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 100)
    clear = {"a": [1.0, 1.1, 1.2, 1.1], "b": [9.0, 9.1, 9.2, 9.1], "c": [1.1, 1.2, 1.0, 1.1]}
    assert told_apart(clear, "a", "b") and told_apart(clear, "c", "b") and not told_apart(clear, "a", "c")
    assert not told_apart({"a": [1.0], "b": [2.0]}, "a", "b")


def drifting(exponent: float, bend: float = 0.0) -> Sweep:
    """Optima that move as a power of depth, and, with a bend, more at the deepest."""
    depths = (2, 4, 8, 16)
    centres = {d: -5 + exponent * math.log2(d / 2) + (bend if d == 16 else 0.0) for d in depths}
    return Sweep(tuple(run for d in depths for run in noisy(centres[d], 3, 0.02, 0, d, rule="mup")))


def test_the_drift_is_fitted_checked_and_taken_out() -> None:
    law = drifting(-0.5).power_law("mup")
    assert law.exponent.value == pytest.approx(-0.5, abs=3 * law.exponent.error) and law.exponent.error < 0.2
    assert law.predicts_deepest and law.at(64).value == pytest.approx(-7.5, abs=3 * law.at(64).error)
    rule = drifting(-0.5).calibrated("mup")
    assert rule.sgd == rule.adam == pytest.approx(law.exponent.value) and rule.alpha == 0 and rule.width
    corrected = replace(
        dm.Rule("mup", alpha=0.0, sgd=0.0, adam=0.0), name="mup calibrated", sgd=rule.sgd, adam=rule.adam
    )
    assert rule == corrected


def test_a_drift_that_is_no_power_law_is_refused() -> None:
    with pytest.raises(dm.DepthMuPError, match="A power law does not describe it"):
        drifting(0.0, bend=-3).calibrated("mup")
    with pytest.raises(dm.DepthMuPError, match="2 of 2 depths .* a power law needs three"):
        Sweep(tuple(parabola("mup", 4, -5) + parabola("mup", 8, -5))).calibrated("mup")
