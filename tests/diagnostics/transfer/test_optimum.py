"""The optimum of a noisy curve, and how well it is known."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest
from sweeps import noisy, parabola

from torch_depthmup.diagnostics.transfer.result import Sweep
from torch_depthmup.diagnostics.transfer.runs import Run


def test_the_error_of_the_optimum_is_its_scatter() -> None:
    """Over a hundred draws of three seeds: the jackknife against the spread that it estimates."""
    optima = [Sweep(tuple(noisy(-5.3, 3, 0.05, draw))).optimum("mup", 4).log2_lr for draw in range(100)]
    scatter = stdev(optimum.value for optimum in optima)
    assert fmean(optimum.value for optimum in optima) == pytest.approx(-5.3, abs=3 * scatter / 10)
    claimed = math.sqrt(fmean(optimum.error**2 for optimum in optima))
    assert 0.7 * scatter < claimed < 1.5 * scatter


def test_one_seed_has_an_error_too() -> None:
    optima = [Sweep(tuple(noisy(-5.3, 1, 0.05, draw))).optimum("mup", 4).log2_lr for draw in range(100)]
    claimed = math.sqrt(fmean(optimum.error**2 for optimum in optima))
    assert 0.5 * stdev(optimum.value for optimum in optima) < claimed < 4 * stdev(optimum.value for optimum in optima)


@pytest.mark.parametrize("factor", [0.5, 3.0, 50.0])
@pytest.mark.parametrize("where", [-7, -6, -5, -4, -3])
def test_a_run_that_went_wrong_does_not_move_the_optimum(where: int, factor: float) -> None:
    """One run of thirty is too good, bad, or much too bad. A parabola through that seed's three best would move."""
    runs = noisy(-5.3, 3, 0.01, 0)
    spoiled = [Run(r.job, r.loss * factor, 1.0) if r.job.seed == 0 and r.job.lr == 2.0**where else r for r in runs]
    assert spoiled != runs
    assert Sweep(tuple(spoiled)).optimum("mup", 4).log2_lr.value == pytest.approx(-5.3, abs=0.1)


@pytest.mark.parametrize("lrs, step", [((-5,), math.nan), ((-6, -5), 1), ((-8, -5), 3)])
def test_too_coarse_a_grid_is_part_of_the_error(lrs: tuple[int, ...], step: float) -> None:
    runs = tuple(run for run in parabola("mup", 4, -5) if math.log2(run.job.lr) in lrs)
    optimum = Sweep(runs).optimum("mup", 4)
    assert optimum.log2_lr.value == -5 and optimum.log2_lr.error == pytest.approx(step / math.sqrt(12), nan_ok=True)
