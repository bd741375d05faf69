"""Does a sweep's optimum lie within its error as often as it should? On curves whose optimum is known.

Draws each kind of curve many times, with its optimum anywhere between the grid's points and noise as of real runs, and
counts how often the truth is within one and two standard errors: 0.68 and 0.95 is what an error means. Writes
optimum_coverage.csv beside this file.

    python examples/benchmarks/optimum_coverage.py --repeats 200
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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


def slow_rise(x: float) -> float:
    """Falls steeply towards the optimum, rises slowly beyond it."""
    return asymmetric(-x)


def pointed(x: float) -> float:
    """A corner at the optimum, with unlike sides."""
    return -0.12 * x if x < 0 else 0.25 * x


def valley_and_cliff(x: float) -> float:
    """A valley, and training that diverges an octave and a half above its lowest place."""
    return 0.1 * x * x if x < 1.5 else math.inf


def levelling(x: float) -> float:
    """What small learning rates leave unlearned levels off; above the optimum the loss rises as a power."""
    return 1.2 * x * x / (3 + x * x) if x < 0 else 0.12 * x**2.5


@dataclass(frozen=True)
class Kind:
    """What is drawn.

    Args:
        curve: the log loss against octaves from the optimum.
        noise: the standard deviation of a run's log loss.
        moved: by how many octaves the seeds' curves lie apart.
        freedom: of the Student distribution of the noise; 0 for a normal one.
    """

    curve: Callable[[float], float]
    noise: float = 0.03
    moved: float = 0.1
    freedom: int = 0


CURVES = {
    "symmetric": Kind(symmetric),
    "asymmetric": Kind(asymmetric),
    "cliff": Kind(cliff),
    "plateau": Kind(plateau),
    "two minima": Kind(two_minima),
    "noisy": Kind(symmetric, noise=0.15),
}
HELD_OUT = {
    "slow rise": Kind(slow_rise),
    "pointed": Kind(pointed),
    "valley and cliff": Kind(valley_and_cliff),
    "levelling": Kind(levelling, noise=0.06),
    "heavy tails": Kind(symmetric, noise=0.05, freedom=3),
    "seeds apart": Kind(symmetric, moved=0.6),
}
"""To hold the estimator against; "seeds apart" alone has led to a change of it, that seeds' spread is in the error."""


def drawn(kind: Kind, seeds: int, draw: int) -> tuple[float, dict[int, dict[float, float]]]:
    """The optimum's place, and noisy runs."""
    dice = random.Random(draw)
    centre = dice.uniform(-8.0, -6.0)
    runs: dict[int, dict[float, float]] = {}
    for seed in range(seeds):
        level, moved = 0.05 * dice.gauss(0, 1), kind.moved * dice.gauss(0, 1)
        runs[seed] = {}
        for i in LRS:
            tail = math.sqrt(kind.freedom / dice.gammavariate(kind.freedom / 2, 2)) if kind.freedom else 1.0
            log_loss = kind.curve(i - centre - moved) + level + kind.noise * tail * dice.gauss(0, 1)
            runs[seed][2.0**i] = 0.1 * math.exp(log_loss)
    return centre, runs


def coverage(kind: Kind, seeds: int, repeats: int) -> tuple[float, float, float, float, float]:
    """Shares within one and two standard errors, mean deviation, mean error, share of bounds."""
    within, deviations, errors = [], [], []
    for draw in range(repeats):
        centre, runs = drawn(kind, seeds, draw)
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
    rows = []
    print(f"{'curve':16} {'1 SE':>6} {'2 SE':>6} {'mean off':>9} {'mean SE':>8} {'bounds':>7}")
    for group, kinds in {"looked at": CURVES, "held out": HELD_OUT}.items():
        for name, kind in kinds.items():
            one, two, off, error, bounds = coverage(kind, options.seeds, options.repeats)
            print(f"{name:16} {one:6.2f} {two:6.2f} {off:+9.2f} {error:8.2f} {bounds:7.2f}", flush=True)
            rows.append([group, name, *(f"{value:.2f}" for value in (one, two, off, error, bounds))])
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "curve", "one", "two", "off", "error", "bounds"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
