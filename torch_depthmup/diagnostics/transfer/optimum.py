"""The optimum of loss against learning rate, by a robust fit, with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor

__all__ = ["Curve", "Estimate", "Optimum", "jackknife", "optimum_of", "resolution", "vertex_of", "without_seed"]


BANDWIDTH = 3  # steps of the grid from the minimum at which a loss no longer counts for the parabola


HUBER = 1.345  # residuals beyond so many standard deviations count linearly: 95 % efficient on normal ones


MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


ROUNDS = 60  # reweightings of the robust fit; it settles in fewer


SETTLED = 1e-7  # factors of two


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error (nan where nothing tells it)."""

    value: float
    error: float

    def __str__(self) -> str:
        """In tenths, which is as much as anyone can use of a move in factors of two."""
        if math.isnan(self.value):
            return "–"
        return f"{self.value:+.1f}" + ("" if math.isnan(self.error) else f"±{self.error:.1f}")


@dataclass(frozen=True)
class Optimum:
    """Where the loss is smallest.

    Args:
        lr: on the grid, by the median over seeds.
        loss: the median loss there.
        log2_lr: the vertex of a parabola in log2 lr, fitted robustly to the log losses of all seeds.
        at_edge: whether ``lr`` is an end of the grid, so that the optimum may lie beyond it.
    """

    lr: float
    loss: float
    log2_lr: Estimate
    at_edge: bool


Curve = dict[float, float]
"""Learning rate -> loss."""


def _middle(curves: dict[int, Curve]) -> Curve:
    """The median loss over seeds at each learning rate."""
    lrs = sorted({lr for curve in curves.values() for lr in curve})
    return {lr: median(curve[lr] for curve in curves.values() if lr in curve) for lr in lrs}


def without_seed(curves: dict[int, Curve], seed: int) -> dict[int, Curve]:
    return {other: curve for other, curve in curves.items() if other != seed}


def vertex_of(curves: dict[int, Curve]) -> float:
    """log2 of the learning rate with the lowest loss, off the grid; nan where the median run always diverged.

    One parabola in log2 lr for all seeds, with an intercept for each, through the log losses. A point's weight falls
    smoothly with its distance from the vertex, which is found by iteration from the minimum of the median: with a
    window of whole grid points the vertex, and so the jackknife, would jump. Huber weights keep a run that went wrong
    from bending the parabola.
    """
    middle = _middle(curves)
    best = min(middle, key=middle.__getitem__)
    if not math.isfinite(middle[best]):
        return math.nan
    if len(middle) < 3:
        return math.log2(best)
    points = [
        (seed, math.log2(lr), math.log(loss))
        for seed, curve in enumerate(curves.values())
        for lr, loss in curve.items()
        if 0 < loss < math.inf
    ]
    seeds, x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    groups = (seeds[:, None] == torch.arange(len(curves))).double()
    step, vertex, huber = _step(middle), math.log2(best), torch.ones_like(y)
    for _ in range(ROUNDS):
        near = (1 - ((x - vertex) / (BANDWIDTH * step)).abs().clamp_max(1) ** 3) ** 3  # the tricube kernel of lowess
        slope, curvature, residuals = _parabola(groups, x - vertex, y, near * huber)
        scale = MAD * _weighted_median(residuals, near)
        if scale > 0:
            huber = 1 / (residuals / (HUBER * scale)).clamp_min(1)
        if curvature > 0:
            moved = vertex + min(max(-slope / (2 * curvature), -step / 2), step / 2)
            moved = min(max(moved, x.min().item()), x.max().item())
            if abs(moved - vertex) < SETTLED:
                break
            vertex = moved
    return vertex if curvature > 0 else math.log2(best)


def _parabola(groups: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> tuple[float, float, Tensor]:
    """Slope and curvature at 0 of ``y = intercept(group) + slope x + curvature x^2``, and the absolute residuals."""
    design, root = torch.cat([groups, x[:, None], x[:, None] ** 2], 1), weights.sqrt()
    fit = torch.linalg.lstsq(design * root[:, None], (y * root)[:, None], driver="gelsd").solution[:, 0]
    return fit[-2].item(), fit[-1].item(), (y - design @ fit).abs()


def _weighted_median(values: Tensor, weights: Tensor) -> float:
    ordered, index = values.sort()
    summed = weights[index].cumsum(0)
    return ordered[torch.searchsorted(summed, summed[-1:] / 2)].item()


def optimum_of(curves: dict[int, Curve]) -> Optimum:
    middle = _middle(curves)
    best = min(middle, key=middle.__getitem__)
    if not math.isfinite(middle[best]):
        return Optimum(math.nan, math.inf, Estimate(math.nan, math.nan), False)
    at_edge = best in (min(middle), max(middle))
    return Optimum(best, middle[best], _log2_optimum(curves), at_edge)


def _log2_optimum(curves: dict[int, Curve]) -> Estimate:
    """The vertex with its error: the jackknife over seeds, or over the window's learning rates where there is one."""
    value = vertex_of(curves)
    if len(curves) > 1:
        parts = [without_seed(curves, seed) for seed in curves]
    else:
        ((seed, curve),) = curves.items()
        near = [lr for lr in curve if len(curve) > 1 and abs(math.log2(lr) - value) < BANDWIDTH * _step(curve)]
        parts = [{seed: {lr: loss for lr, loss in curve.items() if lr != left}} for left in near]
    return Estimate(value, math.hypot(jackknife([vertex_of(part) for part in parts]), resolution(curves, value)))


def _step(curve: Curve) -> float:
    """The grid's mean spacing in factors of two."""
    return (math.log2(max(curve)) - math.log2(min(curve))) / (len(curve) - 1)


def resolution(curves: dict[int, Curve], value: float) -> float:
    """The error of a vertex that is a point of the grid because no parabola placed it: rounding to the grid's step."""
    middle = _middle(curves)
    if not any(math.isclose(value, math.log2(lr), abs_tol=1e-9) for lr in middle):
        return 0.0
    return _step(middle) / math.sqrt(12) if len(middle) > 1 else math.nan


def jackknife(values: Sequence[float]) -> float:
    """The standard error of an estimator from its values on the data with one group left out at a time.

    Source: Efron and Stein (1981), The jackknife estimate of variance.
    """
    if len(values) < 2 or any(map(math.isnan, values)):
        return math.nan
    mean = fmean(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))
