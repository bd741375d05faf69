"""Where loss against learning rate is smallest, and how well the runs know that.

The curve is a Gaussian process in log2 lr; the optimum is the distribution of its smallest place, given the runs. So
its error contains the noise of the runs, what the grid leaves open between its points, and a second valley where there
may be one. Nothing is assumed of the curve's shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Bound", "Curve", "Estimate", "Optimum", "difference", "optimum_of"]

Bound = Literal["", "<", ">"]
"""Whether a number is a value, or only known to be below or above it."""

Curve = dict[float, float]
"""Learning rate -> loss."""

LENGTHS = (1.5, 2.5, 4.0, 7.0)  # over which curves bend, in steps of the grid
SIZES = (0.5, 1.0, 2.0, 4.0)  # of curves, in standard deviations of the losses
NOISES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8)  # of a run, likewise
APART = (0.0, 1.0, 3.0, 8.0)  # how far seeds' curves differ smoothly, in units of the noise
FREEDOM = 4.0  # of the Student distribution of a run's noise, which lets a run that went wrong count less
FINE = 8  # places in a step of the grid where the curve is evaluated
DRAWS = 400  # of the curve
LIKELY = 30  # settings of the process that are drawn from
STUDENT = {2: 1.84, 3: 1.32, 4: 1.20, 5: 1.14}  # what holds 68 % of a mean of so few, in its standard errors; then 1.1
MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error (nan where nothing tells it); or a bound, which has no error.

    Args:
        value: the number, or the bound.
        error: its standard error.
        bound: ``"<"`` where the number is only known to lie below ``value``, ``">"`` above it, else ``""``.
    """

    value: float
    error: float
    bound: Bound = ""

    @property
    def known(self) -> bool:
        """Whether this is a value with an error."""
        return not self.bound and math.isfinite(self.value) and math.isfinite(self.error)

    def __str__(self) -> str:
        """In tenths, which is as much as anyone can use of a move in factors of two."""
        if math.isnan(self.value):
            return "–"
        error = "" if self.bound or math.isnan(self.error) else f"±{self.error:.1f}"
        return f"{self.bound}{self.value:+.1f}{error}"


UNKNOWN = Estimate(math.nan, math.nan)


@dataclass(frozen=True)
class Optimum:
    """Where the loss is smallest.

    Args:
        lr: on the grid, by the median over seeds.
        loss: the median loss there.
        log2_lr: where the curve through all runs is smallest; a bound where that is at or beyond an end of the grid.
    """

    lr: float
    loss: float
    log2_lr: Estimate

    @property
    def at_grid_end(self) -> bool:
        """Whether ``lr`` is an end of the grid, so that the optimum may lie beyond it."""
        return bool(self.log2_lr.bound)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """``one - other``: a bound where one of them is, and unknown where both are and do not add up to one."""
    flipped: dict[Bound, Bound] = {"": "", "<": ">", ">": "<"}
    bounds = {one.bound, flipped[other.bound]} - {""}
    if len(bounds) > 1:
        return UNKNOWN
    bound: Bound = bounds.pop() if bounds else ""
    return Estimate(one.value - other.value, math.nan if bound else math.hypot(one.error, other.error), bound)


def optimum_of(curves: dict[int, Curve]) -> Optimum:
    """The best learning rate of some seeds' curves; nan, with an infinite loss, where the median run diverged always.

    Args:
        curves: for each seed the loss against the learning rate, infinite where it diverged.
    """
    middle = _middle(curves)
    best = min(middle, key=middle.__getitem__)
    if not math.isfinite(middle[best]):
        return Optimum(math.nan, math.inf, UNKNOWN)
    lrs = sorted(middle)
    place = lrs.index(best)
    if len(lrs) == 1:
        return Optimum(best, middle[best], Estimate(math.log2(best), math.nan))
    if place == 0:  # no run says how the loss goes below
        return Optimum(best, middle[best], Estimate(math.log2(lrs[1]), math.nan, "<"))
    if place == len(lrs) - 1:
        return Optimum(best, middle[best], Estimate(math.log2(lrs[-2]), math.nan, ">"))
    return Optimum(best, middle[best], _smallest_place(curves, middle))


def _middle(curves: dict[int, Curve]) -> Curve:
    """The median loss over seeds at each learning rate."""
    lrs = sorted({lr for curve in curves.values() for lr in curve})
    return {lr: median(curve[lr] for curve in curves.values() if lr in curve) for lr in lrs}


def _smallest_place(curves: dict[int, Curve], middle: Curve) -> Estimate:
    """The median of where draws of the curve are smallest, and the standard error of `_error`."""
    generator = torch.Generator().manual_seed(0)
    lrs = [math.log2(lr) for lr in sorted(middle)]
    step = (lrs[-1] - lrs[0]) / (len(lrs) - 1)
    runs = [(seed, math.log2(lr), loss) for seed, c in enumerate(curves.values()) for lr, loss in c.items()]
    runs = [run for run in runs if math.isfinite(run[2])]
    seeds, x, losses = (torch.tensor(column, dtype=torch.float64) for column in zip(*runs, strict=True))
    process = _Process(x / step, _bounded(losses, sorted(middle.values())), seeds)
    last = max(math.log2(lr) for lr, loss in middle.items() if math.isfinite(loss))
    following = [lr for lr in lrs if lr > last]
    end = following[0] if following else last
    places = torch.linspace(lrs[0], end, round((end - lrs[0]) / step * FINE) + 1, dtype=torch.float64)
    draws = process.draws(places / step, generator)
    allowed = places <= _cliffs(curves, last, end, generator)[:, None] + 1e-9
    found = places[draws.masked_fill(~allowed, math.inf).argmin(1)]
    found += (torch.rand(len(found), generator=generator, dtype=torch.float64) - 0.5) * step / FINE
    each = places[process.each_seed(places / step).masked_fill(places > last + 1e-9, math.inf).argmin(1)]
    return Estimate(float(found.median()), _error(found, each))


def _error(found: Tensor, each: Tensor) -> float:
    """A standard error that is not smaller than any of three tell.

    Args:
        found: where draws of the curve are smallest: their central 68 % and, where the tails are long, 95 %.
        each: where each seed's own curve is: seeds that disagree do not know their mean better than this.
    """
    levels = torch.tensor([0.025, 0.16, 0.84, 0.975], dtype=torch.float64)
    lowest, low, high, highest = found.quantile(levels).tolist()
    seeds = len(each)
    apart = STUDENT.get(seeds, 1.1) * float(each.std()) / math.sqrt(seeds) if seeds > 1 else 0.0
    return max((high - low) / 2, (highest - lowest) / 4, apart)


def _bounded(losses: Tensor, medians: Sequence[float]) -> Tensor:
    """Losses on a scale on which what is far above the valley counts little; the place of the minimum does not move.

    Args:
        losses: of the runs.
        medians: over seeds, ascending.
    """
    floor, near = medians[0], [loss for loss in medians[1:4] if math.isfinite(loss)]
    if floor > 0 and bool((losses > 0).all()):  # losses shrink by factors; some, such as a negative ELBO, do not
        losses, near, floor = losses.log(), [math.log(loss) for loss in near], math.log(floor)
    height = 2 * max((loss - floor for loss in near), default=0.0)
    return torch.asinh((losses - floor) / (height or 1.0))


def _cliffs(curves: dict[int, Curve], last: float, end: float, generator: torch.Generator) -> Tensor:
    """Beyond which learning rate the median run diverges: anywhere between the last that did not and the next."""
    if end <= last:
        return torch.full((DRAWS,), last, dtype=torch.float64)
    return last + (end - last) * torch.rand(DRAWS, generator=generator, dtype=torch.float64)


class _Process:
    """A Gaussian process through the runs, averaged over its settings by how likely they make the runs.

    Args:
        x: where the runs are, in steps of the grid.
        y: their losses.
        seeds: which seed each is of; every seed has a level of its own.
    """

    def __init__(self, x: Tensor, y: Tensor, seeds: Tensor):
        self.x, self.scale = x, y.std(correction=0).clamp_min(1e-12)
        self.y = (y - y.median()) / self.scale
        same = (seeds[:, None] == seeds).double()
        self.distances, self.same, self.levels = (x[:, None] - x).abs(), same, 100.0 * (same + 1.0)
        self.settings = torch.cartesian_prod(
            *(torch.tensor(values, dtype=torch.float64) for values in (LENGTHS, SIZES, NOISES, APART))
        )
        self.spoiled = torch.ones_like(y)
        for _ in range(3):
            self.spoiled = self._how_spoiled()
        self.likelihood = self._likelihood()

    def _covariances(self, settings: Tensor) -> tuple[Tensor, Tensor]:
        """Of the curve, and of the runs, for each setting."""
        length, size, noise, apart = (column[:, None, None] for column in settings.T)
        shape = _matern(self.distances / length)
        smooth = size**2 * shape
        runs = noise**2 * (torch.diag_embed(self.spoiled) + apart**2 * self.same * shape)
        return smooth, smooth + runs + self.levels

    def _likelihood(self) -> Tensor:
        """The log likelihood of each setting."""
        factor = torch.linalg.cholesky(self._covariances(self.settings)[1])
        whitened = torch.linalg.solve_triangular(factor, self.y[None, :, None].expand(len(factor), -1, 1), upper=False)
        return -0.5 * whitened.square().sum((1, 2)) - factor.diagonal(dim1=1, dim2=2).log().sum(1)

    def _how_spoiled(self) -> Tensor:
        """The factor on each run's noise variance that Student's distribution gives it for its residual."""
        best = self.settings[self._likelihood().argmax()][None]
        _, runs = (part[0] for part in self._covariances(best))
        noise = best[0, 2] ** 2 * self.spoiled
        residuals = noise * torch.linalg.solve(runs, self.y)
        spread = (MAD * residuals.abs().median()).clamp_min(1e-9)
        return ((FREEDOM + (residuals / spread) ** 2) / (FREEDOM + 1)).clamp_min(1.0)

    def draws(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """Curves, up to a constant each, of shape (`DRAWS`, places)."""
        weights = self.likelihood.softmax(0)
        likely = weights.topk(LIKELY).indices
        counts = torch.multinomial(weights[likely], DRAWS, replacement=True, generator=generator).bincount(
            minlength=LIKELY
        )
        return torch.cat(
            [self._drawn(self.settings[i], places, int(n), generator) for i, n in zip(likely, counts, strict=True) if n]
        )

    def each_seed(self, places: Tensor) -> Tensor:
        """The most likely curve of each seed, up to a constant each, of shape (seeds, places)."""
        best = self.settings[self.likelihood.argmax()]
        length, size, noise, apart = best
        _, runs = (part[0] for part in self._covariances(best[None]))
        shape = _matern((places[:, None] - self.x).abs() / length)
        solved = torch.linalg.solve(runs, self.y)
        own = (noise * apart) ** 2 * self.same.unique(dim=0)
        return torch.stack([(size**2 + of_seed) * shape @ solved for of_seed in own])

    def _drawn(self, setting: Tensor, places: Tensor, count: int, generator: torch.Generator) -> Tensor:
        length, size = setting[0], setting[1]
        _, runs = (part[0] for part in self._covariances(setting[None]))
        cross = size**2 * _matern((places[:, None] - self.x).abs() / length)
        prior = size**2 * _matern((places[:, None] - places).abs() / length)
        mean = cross @ torch.linalg.solve(runs, self.y)
        covariance = prior - cross @ torch.linalg.solve(runs, cross.T)
        values, vectors = torch.linalg.eigh(covariance)
        noise = torch.randn(count, len(places), generator=generator, dtype=torch.float64)
        return mean + noise @ (vectors * values.clamp_min(0).sqrt()).T


def _matern(distance: Tensor) -> Tensor:
    """The Matérn kernel of smoothness 5/2."""
    scaled = math.sqrt(5) * distance
    return (1 + scaled + scaled**2 / 3) * (-scaled).exp()
