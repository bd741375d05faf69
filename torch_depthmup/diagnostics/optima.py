"""What a learning-rate sweep says: optimum, drift over depth, transfer regret, edge of stability.

A sweep is a list of finished runs, each a function of (rule, depth, lr, seed). Everything here is arithmetic on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor

from torch_depthmup.diagnostics.extras import needs
from torch_depthmup.diagnostics.sweep_text import cells, reading
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.printing import columns

__all__ = ["Estimate", "Job", "Optimum", "Run", "Sweep"]

BANDWIDTH = 3  # steps of the grid from the minimum at which a loss no longer counts for the parabola
HUBER = 1.345  # residuals beyond so many standard deviations count linearly: 95 % efficient on normal ones
MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
ROUNDS = 60  # reweightings of the robust fit; it settles in fewer
SETTLED = 1e-7  # factors of two


@dataclass(frozen=True, order=True)
class Job:
    """One run to do: a rule by its label, a depth as the factory takes it, the base's learning rate, a seed."""

    rule: str
    depth: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Run:
    """A finished run. ``loss`` is infinite where it diverged; ``seconds`` is the time it took in its worker."""

    job: Job
    loss: float
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the loss is not a number that training could have gone on from."""
        return not math.isfinite(self.loss)

    def to_json(self) -> str:
        """One line; an infinite loss is null, which JSON has and infinity it has not."""
        return json.dumps({**asdict(self.job), "loss": None if self.diverged else self.loss, "seconds": self.seconds})

    @classmethod
    def from_json(cls, line: str) -> Run:
        """The run that `to_json` wrote."""
        data = json.loads(line)
        loss, seconds = data.pop("loss"), data.pop("seconds")
        return cls(Job(**data), math.inf if loss is None else loss, seconds)


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


@dataclass(frozen=True)
class Sweep:
    """Finished runs, and what follows from them. The shallowest depth is the one that is tuned. ``print`` it."""

    runs: tuple[Run, ...]

    @cached_property
    def rules(self) -> list[str]:
        """Rules in the order in which they were run."""
        return list(dict.fromkeys(run.job.rule for run in self.runs))

    @cached_property
    def depths(self) -> list[int]:
        """Depths, ascending."""
        return sorted({run.job.depth for run in self.runs})

    @cached_property
    def lrs(self) -> list[float]:
        """Learning rates of the base, ascending."""
        return sorted({run.job.lr for run in self.runs})

    @cached_property
    def _curves(self) -> dict[tuple[str, int], dict[int, Curve]]:
        """(rule, depth) -> seed -> the loss against the learning rate, ascending."""
        curves: dict[tuple[str, int], dict[int, Curve]] = {}
        for run in sorted(self.runs, key=lambda run: run.job):
            job = run.job
            curves.setdefault((job.rule, job.depth), {}).setdefault(job.seed, {})[job.lr] = run.loss
        return curves

    def curves(self, rule: str, depth: int) -> dict[int, Curve]:
        """For each seed the loss against the learning rate.

        Raises:
            DepthMuPError: there is no such run.
        """
        try:
            return self._curves[rule, depth]
        except KeyError:
            raise DepthMuPError(f"{rule} at depth {depth}: the sweep has no such run") from None

    def losses(self, rule: str, depth: int, lr: float) -> list[float]:
        """The losses of one point of the grid, a number for each seed, infinite where a run diverged."""
        return [curve[lr] for curve in self._curves.get((rule, depth), {}).values() if lr in curve]

    def optimum(self, rule: str, depth: int) -> Optimum:
        """The best learning rate at one depth; nan, with an infinite loss, where the median run always diverged.

        Its uncertainty is the jackknife over seeds (over learning rates where there is one seed), and the grid's
        resolution where no parabola fits.

        Raises:
            DepthMuPError: there is no such run.
        """
        if (rule, depth) not in self._optima:
            self._optima[rule, depth] = _optimum(self.curves(rule, depth))
        return self._optima[rule, depth]

    @cached_property
    def _optima(self) -> dict[tuple[str, int], Optimum]:
        """Those that were asked for: the fits are the only work here."""
        return {}

    def drift(self, rule: str, depth: int) -> Estimate:
        """By how many factors of two the fitted optimum moves from the shallowest depth to this one.

        A seed is the same noise at every depth, so that the jackknife leaves it out at both.
        """
        first, here = self.curves(rule, self.depths[0]), self.curves(rule, depth)
        ends = [self.optimum(rule, self.depths[0]).log2_lr, self.optimum(rule, depth).log2_lr]
        value = ends[1].value - ends[0].value
        if math.isnan(value) or depth == self.depths[0]:
            return Estimate(value, value)
        seeds = sorted(first.keys() & here.keys())
        if len(seeds) < 2:
            return Estimate(value, math.hypot(*(end.error for end in ends)))
        moves = [_vertex(_without(here, seed)) - _vertex(_without(first, seed)) for seed in seeds]
        rounding = [_resolution(curves, end.value) for curves, end in zip((first, here), ends, strict=True)]
        return Estimate(value, math.hypot(_jackknife(moves), *rounding))

    def transferred(self, rule: str, depth: int) -> list[float]:
        """The losses at a depth with the learning rate tuned at the shallowest one, a number for each seed.

        Infinite where there was nothing to tune.
        """
        return self.losses(rule, depth, self.optimum(rule, self.depths[0]).lr) or [math.inf]

    def regret(self, rule: str, depth: int) -> Estimate:
        """What tuning shallow costs at a depth: median transferred loss less the best median loss there.

        Its error is that of the mean difference between the two learning rates, taken seed by seed.
        """
        best, tuned = self.optimum(rule, depth), self.optimum(rule, self.depths[0]).lr
        value = median(self.transferred(rule, depth)) - best.loss
        if not math.isfinite(value):
            return Estimate(math.nan if math.isnan(value) else math.inf, math.nan)
        pairs = [c[tuned] - c[best.lr] for c in self.curves(rule, depth).values() if tuned in c and best.lr in c]
        known = len(pairs) > 1 and all(map(math.isfinite, pairs))
        return Estimate(value, stdev(pairs) / math.sqrt(len(pairs)) if known else math.nan)

    def edge(self, rule: str, depth: int) -> float:
        """The smallest learning rate at which any seed diverged; infinite where none did."""
        return min((lr for lr in self.lrs if math.inf in self.losses(rule, depth, lr)), default=math.inf)

    def summary(self) -> list[dict[str, Any]]:
        """A row for each rule and depth: the numbers above, as plain values for a table or a data frame."""
        rows = []
        for rule, depth in [(rule, depth) for rule in self.rules for depth in self.depths]:
            if (rule, depth) not in self._curves:
                continue
            best, drift, regret = self.optimum(rule, depth), self.drift(rule, depth), self.regret(rule, depth)
            rows.append(
                {
                    "rule": rule, "depth": depth, "lr": best.lr, "loss": best.loss, "at_edge": best.at_edge,
                    "log2_lr": best.log2_lr.value, "log2_lr_error": best.log2_lr.error,
                    "drift": drift.value, "drift_error": drift.error,
                    "transferred_loss": median(self.transferred(rule, depth)),
                    "regret": regret.value, "regret_error": regret.error, "edge": self.edge(rule, depth),
                }
            )  # fmt: skip
        return rows

    def __str__(self) -> str:
        header, rows = cells(self)
        return "\n".join([*columns(header, rows), "", reading(self)])

    def frame(self) -> Any:
        """A tidy pandas frame: rule, depth, lr, seed, loss, diverged, seconds; a row for each run.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = [{**asdict(r.job), "loss": r.loss, "diverged": r.diverged, "seconds": r.seconds} for r in self.runs]
        return needs("pandas").DataFrame(rows)


# The fit


def _middle(curves: dict[int, Curve]) -> Curve:
    """The median loss over seeds at each learning rate."""
    lrs = sorted({lr for curve in curves.values() for lr in curve})
    return {lr: median(curve[lr] for curve in curves.values() if lr in curve) for lr in lrs}


def _without(curves: dict[int, Curve], seed: int) -> dict[int, Curve]:
    return {other: curve for other, curve in curves.items() if other != seed}


def _vertex(curves: dict[int, Curve]) -> float:
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


def _optimum(curves: dict[int, Curve]) -> Optimum:
    middle = _middle(curves)
    best = min(middle, key=middle.__getitem__)
    if not math.isfinite(middle[best]):
        return Optimum(math.nan, math.inf, Estimate(math.nan, math.nan), False)
    at_edge = best in (min(middle), max(middle))
    return Optimum(best, middle[best], _log2_optimum(curves), at_edge)


def _log2_optimum(curves: dict[int, Curve]) -> Estimate:
    """The vertex with its error: the jackknife over seeds, or over the window's learning rates where there is one."""
    value = _vertex(curves)
    if len(curves) > 1:
        parts = [_without(curves, seed) for seed in curves]
    else:
        ((seed, curve),) = curves.items()
        near = [lr for lr in curve if len(curve) > 1 and abs(math.log2(lr) - value) < BANDWIDTH * _step(curve)]
        parts = [{seed: {lr: loss for lr, loss in curve.items() if lr != left}} for left in near]
    return Estimate(value, math.hypot(_jackknife([_vertex(part) for part in parts]), _resolution(curves, value)))


def _step(curve: Curve) -> float:
    """The grid's mean spacing in factors of two."""
    return (math.log2(max(curve)) - math.log2(min(curve))) / (len(curve) - 1)


def _resolution(curves: dict[int, Curve], value: float) -> float:
    """The error of a vertex that is a point of the grid because no parabola placed it: rounding to the grid's step."""
    middle = _middle(curves)
    if not any(math.isclose(value, math.log2(lr), abs_tol=1e-9) for lr in middle):
        return 0.0
    return _step(middle) / math.sqrt(12) if len(middle) > 1 else math.nan


def _jackknife(values: Sequence[float]) -> float:
    """The standard error of an estimator from its values on the data with one group left out at a time.

    Source: Efron and Stein (1981), The jackknife estimate of variance.
    """
    if len(values) < 2 or any(map(math.isnan, values)):
        return math.nan
    mean = fmean(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))
