"""What a learning-rate sweep says: optimum, drift over depth, transfer regret, edge of stability.

A sweep is a list of finished runs, each a function of (rule, depth, lr, seed). Everything here is arithmetic on it.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

from torch_depthmup.diagnostics.shared.extras import frame, needs
from torch_depthmup.diagnostics.transfer.optimum import Curve, Estimate, Optimum, difference, optimum_of
from torch_depthmup.diagnostics.transfer.power import PowerLaw, power_law
from torch_depthmup.diagnostics.transfer.runs import Run
from torch_depthmup.errors import DepthMuPError, MeasurementError
from torch_depthmup.rules import Rule, get_rule
from torch_depthmup.tables import COLUMNS, Table, columns, number

if TYPE_CHECKING:
    import pandas

__all__ = ["Sweep"]

LEVEL = 0.05  # probability that any rule is told from another where all are alike


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

        Where it is at an end of the grid, its place is a bound.

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
        """By how many factors of two the optimum moves from the shallowest depth to this one; a bound where one is."""
        if depth == self.depths[0]:
            return Estimate(0.0, 0.0)
        return difference(self.optimum(rule, depth).log2_lr, self.optimum(rule, self.depths[0]).log2_lr)

    def power_law(self, rule: str | Rule) -> PowerLaw:
        """The drift that remains under a rule, as a power of depth, checked by leaving the deepest out.

        Raises:
            MeasurementError: fewer than three depths have an optimum inside the grid.
        """
        label = get_rule(rule).label
        optima = {depth: self.optimum(label, depth).log2_lr for depth in self.depths}
        inside = {depth: optimum for depth, optimum in optima.items() if optimum.known}
        if len(inside) < 3:
            raise MeasurementError(
                f"{label}: {len(inside)} of {len(optima)} depths have an optimum inside the grid, and a power law "
                "needs three. Use more depths, or a wider range of learning rates"
            )
        return power_law(inside)

    def calibrated(self, rule: str | Rule) -> Rule:
        """The rule with the drift taken out that this sweep measured under it.

        The exponent of the drift is added to the rule's learning-rate exponents, which act on the parameters in the
        branches. It is good for the optimizer and the network of this sweep.

        Raises:
            MeasurementError: fewer than three depths have an optimum inside the grid, or the power law of the others
                misses the deepest one's.
        """
        rule = get_rule(rule)
        law = self.power_law(rule)
        if not law.predicts_deepest:
            raise MeasurementError(f"{rule.label}: {law}. A power law does not describe it: use deeper networks")
        assert rule.sgd is not None and rule.adam is not None
        exponent = law.exponent.value
        return replace(rule, name=f"{rule.name} calibrated", sgd=rule.sgd + exponent, adam=rule.adam + exponent)

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

    def edge_of_stability(self, rule: str, depth: int) -> float:
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
                    "rule": rule, "depth": depth, "lr": best.lr, "loss": best.loss, "at_grid_end": best.at_grid_end,
                    **_columns("log2_lr", best.log2_lr), **_columns("drift", drift),
                    "transferred_loss": median(self.transferred(rule, depth)),
                    "regret": regret.value, "regret_error": regret.error,
                    "edge_of_stability": self.edge_of_stability(rule, depth),
                }
            )  # fmt: skip
        return rows

    def __str__(self) -> str:
        return "\n".join([*columns(*self.table(brief=True)), "", *textwrap.wrap(self.reading, COLUMNS)])

    def table(self, *, brief: bool = False) -> Table:
        """Header and rows of `summary` as a person reads them; the base's own moves and regret are not numbers.

        Args:
            brief: the columns that fit in a terminal of 80 characters.
        """
        base = self.depths[0]
        chosen = BRIEF if brief else tuple(HEADINGS)
        header = [HEADINGS[key].format(base=base) for key in chosen]
        rows = []
        for row in self.summary():
            rule, depth = row["rule"], row["depth"]
            regret = number(row["regret"])
            if not math.isnan(row["regret_error"]):
                regret += f" ± {number(row['regret_error'], 1)}"
            edge = row["edge_of_stability"]
            cells = {
                "rule": rule, "depth": f"{depth}", "lr": f"{number(row['lr'])}{'*' if row['at_grid_end'] else ''}",
                "log2_lr": f"{self.optimum(rule, depth).log2_lr}",
                "drift": "base" if depth == base else str(self.drift(rule, depth)),
                "edge_of_stability": "none" if math.isinf(edge) else number(edge), "loss": number(row["loss"]),
                "transferred_loss": number(row["transferred_loss"]), "regret": "base" if depth == base else regret,
            }  # fmt: skip
            rows.append((rule, tuple(cells[key] for key in chosen[1:])))
        return header, rows

    @cached_property
    def reading(self) -> str:
        """What this run says in words: nothing but its own numbers, and what they cannot tell apart."""
        deepest, base = self.depths[-1], self.depths[0]
        losses = {rule: self.transferred(rule, deepest) for rule in self.rules}
        trained = {rule: values for rule, values in losses.items() if all(map(math.isfinite, values))}
        lr = f"the learning rate tuned at depth {base}"
        if not trained:
            return f"In this run no rule trains at depth {deepest} with {lr}."
        best = min(trained, key=lambda rule: fmean(trained[rule]))
        alike = [rule for rule in trained if rule != best and not told_apart(trained, best, rule)]
        text = f"In this run {lr} gives the lowest mean loss at depth {deepest} under {best}"
        text += f"; these seeds do not tell it from {', '.join(alike)}" if alike else ""
        if lost := [rule for rule in self.rules if rule not in trained]:
            text += f". Under {', '.join(lost)} runs diverge with it"
        ends = {(rule, depth) for rule in self.rules for depth in self.depths if self._at_grid_end(rule, depth)}
        if ends:
            text += ". * at an end of the grid: the optimum may lie beyond it, and < and > are bounds. Use more lrs"
        return text + "."

    def _at_grid_end(self, rule: str, depth: int) -> bool:
        return (rule, depth) in self._curves and self.optimum(rule, depth).at_grid_end

    def frame(self) -> pandas.DataFrame:
        """A tidy pandas frame: rule, depth, lr, seed, loss, diverged, seconds; a row for each run.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = [{**asdict(r.job), "loss": r.loss, "diverged": r.diverged, "seconds": r.seconds} for r in self.runs]
        return frame(rows, ("rule", "depth", "lr", "seed", "loss", "diverged", "seconds"))


HEADINGS = {
    "rule": "rule", "depth": "depth", "lr": "best lr", "log2_lr": "log2 lr", "drift": "moves by 2^",
    "edge_of_stability": "diverges from", "loss": "best loss", "transferred_loss": "with lr of {base}",
    "regret": "regret",
}  # fmt: skip
BRIEF = ("rule", "depth", "lr", "drift", "loss", "transferred_loss")


def _columns(name: str, estimate: Estimate) -> dict[str, Any]:
    """A value with its error, or a bound, which is no value."""
    value = math.nan if estimate.bound else estimate.value
    bound = f"{estimate.bound}{estimate.value:.6g}" if estimate.bound else ""
    return {name: value, f"{name}_error": estimate.error, f"{name}_bound": bound}


def told_apart(losses: dict[str, list[float]], one: str, other: str) -> bool:
    """Whether the mean losses of two rules differ, at a level that holds for all pairs of rules together.

    Welch's test of each pair by Holm's method: the chance that any two rules that are alike are told apart is at most
    `LEVEL`, however many rules there are and however different their spreads.

    Args:
        losses: by rule, a finite number for each seed.
        one: a rule.
        other: another.
    """
    names = sorted(losses)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    ordered = sorted(pairs, key=lambda pair: _chance(losses[pair[0]], losses[pair[1]]))
    for i, pair in enumerate(ordered):
        if not _chance(losses[pair[0]], losses[pair[1]]) < LEVEL / (len(pairs) - i):
            return False
        if set(pair) == {one, other}:
            return True
    return False


def _chance(a: list[float], b: list[float]) -> float:
    """That means of equal distributions lie so far apart; 1 where one seed tells nothing."""
    if min(len(a), len(b)) < 2:
        return 1.0
    if stdev(a) == stdev(b) == 0:
        return 1.0 if fmean(a) == fmean(b) else 0.0
    return float(needs("scipy.stats").ttest_ind(a, b, equal_var=False).pvalue)
