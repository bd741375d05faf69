"""Log-log slopes over depth and width: their confidence intervals, and their verdicts beside a rule's exponents.

Arithmetic on sizes; where they come from is the affair of `coordinates.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.errors import MeasurementError

__all__ = ["AXES", "QUANTITIES", "Point", "Sizes", "Slope", "Verdict", "exact", "fit", "mean_slope", "slope"]

QUANTITIES: dict[str, str] = {
    "branch": "branch value at initialization",
    "inner": "inner layers' own update",
    "outer": "outer layers' own update",
    "stream": "residual stream's update",
    "function": "function's update",
}
"""What is held against the rule, in words."""

MANY = 1000  # seeds beyond which it does not matter how many more it takes

AXES = ("depth", "width")

Point = tuple[int, int | None, int]
"""A network of the grid: its depth, its width (``None`` where no widths are checked), its seed."""

Sizes = Mapping[Point, float]

Verdict = Literal["holds", "broken", "cannot tell", "network"]


@dataclass(frozen=True)
class Slope:
    """A measured exponent beside the rule's.

    Args:
        axis: ``"depth"`` or ``"width"``.
        quantity: a key of `QUANTITIES`.
        measured: slope of log size in log depth (or width), the mean over seeds.
        low: lower end of its 95 % confidence interval.
        high: upper end.
        predicted: the rule's exponent.
        verdict: ``"holds"``, ``"broken"``, ``"cannot tell"`` where the interval is too wide to say, or ``"network"``
            where multipliers and learning rates hold in every branch and the whole still moves otherwise.
        kind: the branches it is of, as their name with ``#`` for every number; ``""`` where there is one kind.
        seeds: that it was measured with.
        needed: about how many seeds would tell; ``seeds`` where these do, 0 where one seed gives no estimate.
    """

    axis: str
    quantity: str
    measured: float
    low: float
    high: float
    predicted: float
    verdict: Verdict
    kind: str = ""
    seeds: int = 1
    needed: int = 0

    @property
    def words(self) -> str:
        """The quantity in words."""
        return QUANTITIES[self.quantity] + (f", {self.kind}" if self.kind else "")

    @property
    def prediction(self) -> str:
        """The rule's exponent in words: ``-0.50``, or ``0..+0.50`` where the slope rises to it with depth."""
        return ("" if exact(self.quantity, self.predicted) else "0..") + f"{self.predicted:+.2f}"


def exact(quantity: str, predicted: float) -> bool:
    """Whether a prediction is the slope itself, or what the slope rises to from 0 at large depth.

    Where a rule lets the whole grow, the part that grows adds to one that does not: readout, stem, outer layers.
    """
    return predicted <= 0 or quantity not in ("stream", "function")


def slope(axis: str, quantity: str, sizes: Sizes, predicted: float, tolerance: float, kind: str = "") -> Slope:
    """The slope of a quantity along an axis, at all values of the other axis together, and its verdict.

    Args:
        axis: ``"depth"`` or ``"width"``.
        quantity: a key of `QUANTITIES`.
        sizes: of a whole grid.
        predicted: the rule's exponent.
        tolerance: how far from it a slope still counts as holding.
        kind: of branches.

    Raises:
        MeasurementError: a size is zero or not finite, and has no logarithm.
    """
    if wrong := [point for point, size in sizes.items() if not (math.isfinite(size) and size > 0)]:
        depth, width, seed = wrong[0]
        words = QUANTITIES[quantity] + (f" of {kind}" if kind else "")
        where = f"depth {depth}{'' if width is None else f', width {width}'}, seed {seed}"
        raise MeasurementError(
            f"the {words} is {sizes[wrong[0]]:.3g} at {where}, so it has no slope. Use a smaller lr, a "
            "layer that does not start at zero, or more steps"
        )
    measured, half = fit(axis, sizes)
    low, high = measured - half, measured + half
    floor = predicted if exact(quantity, predicted) else 0.0
    bottom, top = floor - tolerance, predicted + tolerance
    verdict: Verdict = "cannot tell"
    if high < bottom or low > top:
        verdict = "broken"
    elif bottom <= measured <= top and bottom - tolerance <= low and high <= top + tolerance:
        verdict = "holds"
    seeds = len({seed for _, _, seed in sizes})
    needed = seeds if verdict != "cannot tell" else _seeds_needed(seeds, half, tolerance)
    return Slope(axis, quantity, measured, low, high, predicted, verdict, kind, seeds, needed)


def _seeds_needed(seeds: int, half: float, tolerance: float) -> int:
    """How many seeds make an interval as narrow as the tolerance, if they scatter like these; 0 where that is open."""
    if seeds < 2 or not math.isfinite(half):
        return 0
    stats = needs("scipy.stats")
    scatter = half / float(stats.t.ppf(0.975, seeds - 1)) * math.sqrt(seeds)
    found = seeds
    while found < MANY and float(stats.t.ppf(0.975, found - 1)) * scatter / math.sqrt(found) > tolerance:
        found += 1
    return max(found, 2 * seeds)


def fit(axis: str, sizes: Sizes) -> tuple[float, float]:
    """The slope of log size in the log of ``"depth"`` or ``"width"``, and half its 95 % interval; see `mean_slope`.

    Args:
        axis: the values of the other one are lines of their own.
        sizes: positive and finite, of a whole grid.
    """
    place = AXES.index(axis)
    seeds: dict[int, dict[int | None, list[tuple[float, float]]]] = {}
    for point, size in sizes.items():
        lines = seeds.setdefault(point[2], {})
        lines.setdefault(point[1 - place], []).append((math.log(point[place] or 1), math.log(size)))
    ordered = [[sorted(line) for line in lines.values()] for lines in seeds.values()]
    return mean_slope([x for x, _ in ordered[0][0]], [[[y for _, y in line] for line in lines] for lines in ordered])


def mean_slope(x: Sequence[float], seeds: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """The least-squares slope, each line with an intercept of its own, and half its 95 % interval.

    Args:
        x: where the lines have values.
        seeds: for each seed its lines.

    Returns:
        The mean over seeds, and the half width from their scatter by Student's t; of one seed, from the scatter of its
        values around the lines; infinite where nothing tells it.
    """
    stats = needs("scipy.stats")
    centre = fmean(x)
    offsets = [value - centre for value in x]
    square = sum(offset * offset for offset in offsets)
    slopes = [fmean(sum(o * y for o, y in zip(offsets, line, strict=True)) / square for line in s) for s in seeds]
    mean, n = fmean(slopes), len(slopes)
    if n > 1:
        return mean, float(stats.t.ppf(0.975, n - 1)) * stdev(slopes) / math.sqrt(n)
    (lines,) = seeds
    free = len(lines) * (len(x) - 1) - 1
    if free < 1:
        return mean, math.inf
    rest = sum((y - fmean(line) - mean * o) ** 2 for line in lines for o, y in zip(offsets, line, strict=True))
    return mean, float(stats.t.ppf(0.975, free)) * math.sqrt(rest / free / (len(lines) * square))
