"""Does a sweep's optimum lie within its error as often as it should? On curves whose optimum is known.

Draws each kind of curve many times, with its optimum anywhere between the grid's points and noise as of real runs, and
counts how often the truth is within one and two standard errors: 0.68 and 0.95 is what an error means.

    python examples/benchmarks/optimum_coverage.py --repeats 200
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from statistics import fmean

from torch_depthmup.diagnostics.transfer.optimum import optimum_of

LRS = range(-12, -2)


def symmetric(x: float) -> float:
    return 0.1 * x * x


def asymmetric(x: float) -> float:
    """Falls slowly towards the optimum, rises steeply beyond it; the smallest value is at 0."""
    return 0.25 * (math.exp(1.1 * x) - 1.1 * x - 1)


def cliff(x: float) -> float:
    """Falls up to where training diverges."""
    return -0.15 * x if x < 0 else math.inf


def plateau(x: float) -> float:
    """Flat around the optimum."""
    return 0.01 * x**4


def two_minima(x: float) -> float:
    """A second, shallower valley three octaves below."""
    return min(0.15 * x * x, 0.12 + 0.15 * (x + 3) ** 2)


CURVES: dict[str, tuple[Callable[[float], float], float]] = {
    "symmetric": (symmetric, 0.03),
    "asymmetric": (asymmetric, 0.03),
    "cliff": (cliff, 0.03),
    "plateau": (plateau, 0.03),
    "two minima": (two_minima, 0.03),
    "noisy": (symmetric, 0.15),
}
"""The log loss against octaves from the optimum, and the standard deviation of a run's log loss."""


def drawn(curve: Callable[[float], float], noise: float, seeds: int, draw: int) -> tuple[float, dict]:
    """The optimum's place, and noisy runs."""
    dice = random.Random(draw)
    centre = dice.uniform(-8.0, -6.0)
    runs: dict[int, dict[float, float]] = {}
    for seed in range(seeds):
        level, moved = 0.05 * dice.gauss(0, 1), 0.1 * dice.gauss(0, 1)
        runs[seed] = {2.0**i: 0.1 * math.exp(curve(i - centre - moved) + level + noise * dice.gauss(0, 1)) for i in LRS}
    return centre, runs


def coverage(name: str, seeds: int, repeats: int) -> tuple[float, float, float, float, float]:
    """Shares within one and two standard errors, mean deviation, mean error, share of bounds."""
    curve, noise = CURVES[name]
    within, deviations, errors = [], [], []
    for draw in range(repeats):
        centre, runs = drawn(curve, noise, seeds, draw)
        found = optimum_of(runs).log2_lr
        if found.bound:
            continue
        deviations.append(found.value - centre)
        errors.append(found.error)
        within.append(abs(found.value - centre) / found.error)
    return (
        fmean(z < 1 for z in within), fmean(z < 2 for z in within), fmean(deviations), fmean(errors),
        1 - len(within) / repeats,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="runs for each learning rate")
    options = parser.parse_args()
    print(f"{'curve':12} {'1 SE':>6} {'2 SE':>6} {'mean off':>9} {'mean SE':>8} {'bounds':>7}")
    for name in CURVES:
        one, two, off, error, bounds = coverage(name, options.seeds, options.repeats)
        print(f"{name:12} {one:6.2f} {two:6.2f} {off:+9.2f} {error:8.2f} {bounds:7.2f}")


if __name__ == "__main__":
    main()
