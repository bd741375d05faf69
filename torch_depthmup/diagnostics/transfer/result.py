"""What a learning-rate sweep says: optimum, drift over depth, transfer regret, edge of stability.

A sweep is a list of finished runs, each a function of (rule, depth, lr, seed). Everything here is arithmetic on it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any

from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.diagnostics.transfer.optimum import (
    Curve,
    Estimate,
    Optimum,
    jackknife,
    optimum_of,
    resolution,
    vertex_of,
    without_seed,
)
from torch_depthmup.diagnostics.transfer.runs import Run
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.tables import Table, columns, number

__all__ = ["Sweep", "cells", "reading"]


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
            self._optima[rule, depth] = optimum_of(self.curves(rule, depth))
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
        moves = [vertex_of(without_seed(here, seed)) - vertex_of(without_seed(first, seed)) for seed in seeds]
        rounding = [resolution(curves, end.value) for curves, end in zip((first, here), ends, strict=True)]
        return Estimate(value, math.hypot(jackknife(moves), *rounding))

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


def cells(sweep: Sweep) -> Table:
    """Header and rows of `Sweep.summary` as a person reads them; the base's own moves and regret are not numbers."""
    base = sweep.depths[0]
    header = (
        "rule", "depth", "best lr", "log2 lr", "moves by 2^", "edge", "best loss", f"with lr of {base}", "regret"
    )  # fmt: skip
    rows: list[tuple[str, tuple[str, ...]]] = []
    for row in sweep.summary():
        rule, depth = row["rule"], row["depth"]
        moves, regret = str(sweep.drift(rule, depth)), number(row["regret"])
        if not math.isnan(row["regret_error"]):
            regret += f" ± {number(row['regret_error'], 1)}"
        texts = (
            f"{depth}", f"{number(row['lr'])}{'*' if row['at_edge'] else ''}", f"{sweep.optimum(rule, depth).log2_lr}",
            "base" if depth == base else moves, "none" if math.isinf(row["edge"]) else number(row["edge"]),
            number(row["loss"]), number(row["transferred_loss"]), "base" if depth == base else regret,
        )  # fmt: skip
        rows.append((rule, texts))
    return header, rows


def reading(sweep: Sweep) -> str:
    """What this run says in words: nothing but its own numbers, and what they cannot tell apart."""
    deepest, base = sweep.depths[-1], sweep.depths[0]
    losses = {rule: sweep.transferred(rule, deepest) for rule in sweep.rules}
    best = min(losses, key=lambda rule: fmean(losses[rule]))
    if not math.isfinite(fmean(losses[best])):
        return f"In this run no rule trains at depth {deepest} with the learning rate tuned at depth {base}."
    alike = [rule for rule in sweep.rules if rule != best and _alike(losses[rule], losses[best])]
    told = f"; these seeds do not tell it from {', '.join(alike)}" if alike else ""
    return (
        f"In this run the learning rate tuned at depth {base} gives the lowest mean loss at depth {deepest} under "
        f"{best}{told}. ± over seeds: standard error (moves), deviation (loss)."
    )


def _alike(a: list[float], b: list[float]) -> bool:
    """Whether two means lie within two standard errors of their difference; with one seed nothing tells them apart."""
    if not all(map(math.isfinite, (*a, *b))):
        return False
    if min(len(a), len(b)) < 2:
        return True
    return abs(fmean(a) - fmean(b)) < 2 * math.hypot(stdev(a) / len(a) ** 0.5, stdev(b) / len(b) ** 0.5)
