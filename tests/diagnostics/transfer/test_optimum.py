"""The optimum of a noisy curve, and how well it is known."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
from sweeps import noisy, parabola

from torch_depthmup.diagnostics.transfer.optimum import Estimate, difference, optimum_of
from torch_depthmup.diagnostics.transfer.result import Sweep
from torch_depthmup.diagnostics.transfer.runs import Run

CURVES = {
    "symmetric": lambda x: 0.1 * x * x,
    "asymmetric": lambda x: 0.25 * (math.exp(1.1 * x) - 1.1 * x - 1),
    "cliff": lambda x: -0.15 * x if x < 0 else math.inf,
    "plateau": lambda x: 0.01 * x**4,
    "two valleys": lambda x: min(0.15 * x * x, 0.12 + 0.15 * (x + 3) ** 2),
}


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", CURVES)
def test_the_truth_is_within_the_error_as_often_as_it_should_be(name: str, seeds: int) -> None:
    """examples/benchmarks/optimum_coverage.py prints the shares of many more draws."""
    off = []
    for draw in range(40):
        dice = random.Random(draw)
        centre = dice.uniform(-8, -6)
        curves = {
            s: {2.0**i: math.exp(CURVES[name](i - centre) + 0.03 * dice.gauss(0, 1)) for i in range(-12, -2)}
            for s in range(seeds)
        }
        found = optimum_of(curves).log2_lr
        off.append(abs(found.value - centre) / found.error)
    least = 0.65 if name == "plateau" else 0.8  # of 40 draws; on a flat bottom the error is a little too small
    assert fmean(z < 1 for z in off) > 0.5 and fmean(z < 2 for z in off) > least


@pytest.mark.parametrize("factor", [0.5, 3.0, 50.0])
@pytest.mark.parametrize("where", [-7, -6, -5, -4, -3])
def test_a_run_that_went_wrong_does_not_move_the_optimum(where: int, factor: float) -> None:
    """One run of thirty is too good, bad, or much too bad."""
    runs = noisy(-5.3, 3, 0.01, 0)
    spoiled = [Run(r.job, r.loss * factor, 1.0) if r.job.seed == 0 and r.job.lr == 2.0**where else r for r in runs]
    assert spoiled != runs
    found = Sweep(tuple(spoiled)).optimum("mup", 4).log2_lr
    assert found.value == pytest.approx(-5.3, abs=0.25)


@pytest.mark.parametrize("lrs", [(-5,), (-6, -5), (-8, -5)])
def test_a_grid_without_an_inside_has_no_value(lrs: tuple[int, ...]) -> None:
    runs = tuple(run for run in parabola("mup", 4, -5.2) if math.log2(run.job.lr) in lrs)
    found = Sweep(runs).optimum("mup", 4).log2_lr
    assert not found.known and (found.bound == ">") == (len(lrs) > 1)


def test_a_coarse_grid_is_part_of_the_error() -> None:
    fine, coarse = (
        Sweep(tuple(r for r in noisy(-5.3, 3, 0.01, 0) if round(math.log2(r.job.lr)) % step == 0)) for step in (1, 3)
    )
    assert coarse.optimum("mup", 4).log2_lr.error > 2 * fine.optimum("mup", 4).log2_lr.error


def test_the_same_runs_give_the_same_optimum() -> None:
    runs = tuple(noisy(-5.3, 3, 0.05, 0))
    assert Sweep(runs).optimum("mup", 4) == Sweep(runs[::-1]).optimum("mup", 4)


def test_differences_keep_bounds() -> None:
    value, below, above = Estimate(1.0, 0.3), Estimate(2.0, math.nan, "<"), Estimate(2.0, math.nan, ">")
    assert difference(value, Estimate(0.5, 0.4)) == Estimate(0.5, 0.5)
    assert [str(difference(*pair)) for pair in ((below, value), (value, below), (below, above), (below, below))] == [
        "<+1.0", ">-1.0", "<+0.0", "–",
    ]  # fmt: skip
