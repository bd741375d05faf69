"""Figures of sweeps: loss against the learning rate, and what follows from it over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.diagnostics.shared.style import GRID, MUTED, categories, plain_ticks, shades
from torch_depthmup.diagnostics.transfer.result import Sweep

__all__ = ["drift_figure", "transfer_figure"]


def transfer_figure(sweep: Sweep, *, title: str = "") -> Any:
    """Loss against the base's learning rate: a panel for each rule, a line for each depth, all seeds as dots.

    The line is the median over seeds and ends where the median run diverged; a ring marks each depth's best learning
    rate, a triangle one at an end of the grid, beyond which the optimum may lie; the vertical line is the one tuned at
    the shallowest depth.

    Args:
        sweep: finished runs.
        title: printed above the panels.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rules, depths = sweep.rules, sweep.depths
    colors = shades(depths)
    figure = needs("matplotlib.figure").Figure(figsize=(3.1 * len(rules) + 0.6, 3.6), layout="constrained")
    axes = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    trained = any(not run.diverged for run in sweep.runs)  # a log axis needs one number at least
    for axis, rule in zip(axes, rules, strict=True):
        for depth in depths:
            _draw(axis, sweep, rule, depth, colors[depth])
        tuned = sweep.optimum(rule, depths[0]).lr
        if not math.isnan(tuned):
            axis.axvline(tuned, color=MUTED, linestyle=":", linewidth=1, zorder=0)
        axis.set(yscale="log" if trained else "linear", title=rule, xlabel=f"learning rate at depth {depths[0]}")
        axis.set_xscale("log", base=2)
        axis.grid(**GRID)
    if trained:
        plain_ticks(axes[0])  # the panels share it
    axes[0].set_ylabel("loss after training")
    axes[-1].legend(title="depth", frameon=False, fontsize="small")
    if title:
        figure.suptitle(title)
    return figure


def _draw(axis: Any, sweep: Sweep, rule: str, depth: int, color: Any) -> None:
    points = [(lr, losses) for lr in sweep.lrs if (losses := sweep.losses(rule, depth, lr))]
    shown = [(lr, _finite(median(losses))) for lr, losses in points]
    axis.plot(*zip(*shown, strict=True), color=color, linewidth=1.6, label=f"{depth}")
    for lr, losses in points:
        finite = [loss for loss in losses if math.isfinite(loss)]
        axis.plot([lr] * len(finite), finite, ".", color=color, markersize=3, alpha=0.6)
    best = sweep.optimum(rule, depth)
    if math.isnan(best.lr):
        return
    mark = {"": "o", "<": "<", ">": ">"}[best.log2_lr.bound]
    axis.plot(
        best.lr, best.loss, mark, markerfacecolor="none", markeredgecolor=color, markersize=9, markeredgewidth=1.6
    )


def drift_figure(sweep: Sweep, *, title: str = "") -> Any:
    """What transfers over depth, a colour for each rule.

    Left, how far the optimum moves, with its standard error, beside the flat line of perfect transfer; a triangle that
    points up or down is a bound, where an optimum lies at or beyond an end of the grid. Right,
    the median loss with the learning rate tuned at the shallowest depth (solid) and with each depth's best one
    (dashed): the gap is the regret, an open end a run that diverged.

    Args:
        sweep: finished runs.
        title: printed above the panels.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = needs("matplotlib.figure").Figure(figsize=(8.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = sweep.summary()
    for i, (rule, color) in enumerate(categories(sweep.rules).items()):
        mine = [row for row in rows if row["rule"] == rule]
        depths = [row["depth"] * 2 ** (0.04 * (i - (len(sweep.rules) - 1) / 2)) for row in mine]  # side by side
        factors = [2 ** row["drift"] for row in mine]  # not a number where there is only a bound
        errors = [_factors(row["drift"], row["drift_error"]) for row in mine]
        for place, row in zip(depths, mine, strict=True):
            drift = sweep.drift(rule, row["depth"])
            if drift.bound:
                left.plot(place, 2**drift.value, "v" if drift.bound == "<" else "^", color=color, markersize=7)
        left.errorbar(
            depths, factors, yerr=list(zip(*errors, strict=True)), color=color, marker="o", markersize=4, capsize=2,
            linewidth=1.6, label=rule,
        )  # fmt: skip
        right.plot(depths, [_finite(r["transferred_loss"]) for r in mine], "o-", color=color, markersize=4, label=rule)
        right.plot(depths, [_finite(r["loss"]) for r in mine], "--", color=color, linewidth=1)
    left.axhline(1.0, color=MUTED, linestyle=":", linewidth=1.2, zorder=0, label="transfers")
    left.set_yscale("log", base=2)
    left.set_ylim(*_at_least_a_factor(left.get_ylim(), 4.0))
    left.yaxis.set_major_formatter(needs("matplotlib.ticker").FuncFormatter(lambda value, _: f"{value:.3g}"))
    left.set_ylabel(f"optimal learning rate / that of depth {sweep.depths[0]}")
    if any(math.isfinite(row["loss"]) for row in rows):
        right.set_yscale("log")
        plain_ticks(right)
    right.set_ylabel(f"loss: lr tuned at {sweep.depths[0]} (solid), best lr (dashed)")
    for axis in (left, right):
        _depth_axis(axis, sweep.depths)
        axis.grid(**GRID)
    left.legend(frameon=False, fontsize="small")
    if title:
        figure.suptitle(title)
    return figure


def _depth_axis(axis: Any, depths: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.set_xlabel("depth")
    axis.minorticks_off()


def _factors(drift: float, error: float) -> tuple[float, float]:
    """The lengths below and above of an error bar in factors of two around ``2^drift``."""
    if math.isnan(drift) or math.isnan(error):
        return 0.0, 0.0
    return 2**drift - 2 ** (drift - error), 2 ** (drift + error) - 2**drift


def _at_least_a_factor(limits: tuple[float, float], factor: float) -> tuple[float, float]:
    """Limits of a log axis, so wide that noise around a flat line looks flat."""
    low, high = limits
    pad = max(1.0, math.sqrt(factor * low / high))
    return low / pad, high * pad


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.nan
