"""The drift of an optimum over depth as a power law, with its error, and a check on the depth that was left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch_depthmup.diagnostics.transfer.optimum import Estimate

__all__ = ["PowerLaw", "power_law"]

MISSED = 2.0  # standard errors by which the deepest optimum may be off what the others predict
CLOSE = 0.5  # ... or octaves, within which a prediction is good enough to use


@dataclass(frozen=True)
class PowerLaw:
    """``lr(depth) = lr(base) * (depth / base) ** exponent``.

    Args:
        base: the shallowest depth.
        start: log2 of the optimal learning rate there, by the fit.
        exponent: of the drift.
        deepest: the deepest depth.
        predicted: log2 of its optimal learning rate by a fit of the others.
        found: the same as measured.
    """

    base: int
    start: Estimate
    exponent: Estimate
    deepest: int
    predicted: Estimate
    found: Estimate

    @property
    def predicts_deepest(self) -> bool:
        """Whether the shallower depths predict the deepest one's optimum, within half an octave or the errors."""
        off = abs(self.predicted.value - self.found.value)
        return off <= max(CLOSE, MISSED * math.hypot(self.predicted.error, self.found.error))

    def at(self, depth: int) -> Estimate:
        """log2 of the optimal learning rate at a depth."""
        far = math.log2(depth / self.base)
        error = math.hypot(self.start.error, far * self.exponent.error)
        return Estimate(self.start.value + far * self.exponent.value, error)

    def __str__(self) -> str:
        exponent = f"{self.exponent.value:+.2f}±{self.exponent.error:.2f}"
        return (
            f"the optimum drifts as depth^{exponent}; without depth {self.deepest} the others predict "
            f"2^{self.predicted.value:.1f}±{self.predicted.error:.1f} there, and 2^{self.found} was found"
        )


def power_law(optima: Mapping[int, Estimate]) -> PowerLaw:
    """Fits log2 of the optimal learning rates against log2 of the depths.

    Args:
        optima: by depth, log2 of the optimal learning rate with its error; at least three.
    """
    base, deepest = min(optima), max(optima)
    start, exponent = _line(base, optima)
    fit = _line(base, {depth: optimum for depth, optimum in optima.items() if depth != deepest})
    far = math.log2(deepest / base)
    predicted = Estimate(fit[0].value + far * fit[1].value, math.hypot(fit[0].error, far * fit[1].error))
    return PowerLaw(base, start, exponent, deepest, predicted, optima[deepest])


def _line(base: int, optima: Mapping[int, Estimate]) -> tuple[Estimate, Estimate]:
    """Intercept at the base and slope by weighted least squares.

    Errors are those of the points, and larger where the points lie further from the line than their errors say.
    """
    points = [(math.log2(d / base), o.value, 1 / max(o.error, 1e-3) ** 2) for d, o in optima.items()]
    total = sum(w for _, _, w in points)
    x0, y0 = (sum(w * p[i] for p in points for w in (p[2],)) / total for i in (0, 1))
    square = sum(w * (x - x0) ** 2 for x, _, w in points)
    slope = sum(w * (x - x0) * (y - y0) for x, y, w in points) / square
    rest = sum(w * (y - y0 - slope * (x - x0)) ** 2 for x, y, w in points)
    wider = math.sqrt(max(1.0, rest / max(1, len(points) - 2)))
    error = wider / math.sqrt(square)
    return Estimate(y0 - slope * x0, math.hypot(wider / math.sqrt(total), x0 * error)), Estimate(slope, error)
