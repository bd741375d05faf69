"""Slopes and their intervals against scipy and a regression written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from torch_depthmup.diagnostics.coordinates.slopes import fit, mean_slope, slope
from torch_depthmup.errors import MeasurementError

X = [1.0, 2.0, 3.5, 4.0]


def noisy(lines: int) -> list[list[float]]:
    rng = np.random.default_rng(lines)
    return [[0.7 * x + 3 * i + rng.normal(0, 0.1) for x in X] for i in range(lines)]


def test_one_line_is_scipys_regression() -> None:
    (line,) = noisy(1)
    wanted = stats.linregress(X, line)
    measured, half = mean_slope(X, [[line]])
    assert measured == pytest.approx(wanted.slope)
    assert half == pytest.approx(stats.t.ppf(0.975, 2) * wanted.stderr)


def test_lines_of_one_seed_share_a_slope_and_have_intercepts_of_their_own() -> None:
    lines = noisy(3)
    design = np.zeros((12, 4))
    for i in range(3):
        design[4 * i : 4 * i + 4, i] = 1
        design[4 * i : 4 * i + 4, 3] = X
    solution, rest, _, _ = np.linalg.lstsq(design, np.concatenate(lines), rcond=None)
    error = math.sqrt(rest[0] / 8 * np.linalg.inv(design.T @ design)[3, 3])
    measured, half = mean_slope(X, [lines])
    assert measured == pytest.approx(solution[3])
    assert half == pytest.approx(stats.t.ppf(0.975, 8) * error)


def test_seeds_give_the_interval_of_their_mean() -> None:
    lines = noisy(5)
    slopes = [stats.linregress(X, line).slope for line in lines]
    measured, half = mean_slope(X, [[line] for line in lines])
    wanted = stats.t.interval(0.95, 4, loc=np.mean(slopes), scale=stats.sem(slopes))
    assert (measured - half, measured + half) == pytest.approx(wanted)


def test_two_points_of_one_line_tell_nothing() -> None:
    assert mean_slope([0.0, 1.0], [[[0.0, 2.0]]]) == (2.0, math.inf)


def test_a_grid_has_a_slope_along_each_axis_in_any_order() -> None:
    grid = {(d, w, s): 5 * d**-0.5 * w**0.25 for w in (64, 16, 32) for s in (1, 0) for d in (8, 2, 4)}
    assert fit("depth", grid)[0] == pytest.approx(-0.5) and fit("width", grid)[0] == pytest.approx(0.25)
    found = slope("depth", "inner", grid, 0.0, 0.15)
    assert (found.verdict, found.prediction) == ("broken", "+0.00")
    assert slope("depth", "inner", grid, -0.5, 0.15).verdict == "holds"


@pytest.mark.parametrize("measured, verdict", [(0.0, "holds"), (0.3, "holds"), (0.5, "holds"), (-0.3, "broken")])
def test_where_the_rule_lets_the_whole_grow_the_slope_rises_from_zero(measured: float, verdict: str) -> None:
    grid = {(d, None, s): float(d) ** measured for d in (2, 4, 8) for s in (0, 1)}
    found = slope("depth", "stream", grid, 0.5, 0.15)
    assert found.verdict == verdict and found.prediction == "0..+0.50"


def test_a_size_without_a_logarithm_is_named() -> None:
    grid = {(2, 16, 0): 1.0, (4, 16, 0): 0.0}
    with pytest.raises(MeasurementError, match="inner layers' own update is 0 at depth 4, width 16, seed 0"):
        slope("depth", "inner", grid, 0.0, 0.15)
