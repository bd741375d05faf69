"""Figures of sweeps."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from torch_depthmup.diagnostics.extras import needs
from torch_depthmup.diagnostics.optima import Sweep

__all__ = ["transfer_figure"]


def transfer_figure(sweep: Sweep, *, title: str = "") -> Any:
    """Loss against the base's learning rate: a panel for each rule, a line for each depth, all seeds as dots.

    The line is the median over seeds and ends where the median run diverged; a ring marks each depth's best learning
    rate, and the vertical line the one tuned at the shallowest depth.

    Args:
        sweep: finished runs.
        title: printed above the panels.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    colors = needs("matplotlib").colormaps["viridis"]
    figure_class = needs("matplotlib.figure").Figure
    rules, depths = sweep.rules, sweep.depths
    figure = figure_class(figsize=(3.1 * len(rules) + 0.6, 3.6), layout="constrained")
    axes = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for axis, rule in zip(axes, rules, strict=True):
        for i, depth in enumerate(depths):
            _draw(axis, sweep, rule, depth, colors(0.85 * i / max(1, len(depths) - 1)))
        tuned = sweep.optimum(rule, depths[0]).lr
        if not math.isnan(tuned):
            axis.axvline(tuned, color="0.6", linestyle=":", linewidth=1, zorder=0)
        trained = any(not run.diverged for run in sweep.runs)  # a log axis needs one number at least
        axis.set(yscale="log" if trained else "linear", title=rule, xlabel=f"learning rate at depth {depths[0]}")
        axis.set_xscale("log", base=2)
        axis.grid(which="major", alpha=0.25, linewidth=0.6)
    axes[0].set_ylabel("loss after training")
    axes[-1].legend(title="depth", frameon=False, fontsize="small")
    if title:
        figure.suptitle(title)
    return figure


def _draw(axis: Any, sweep: Sweep, rule: str, depth: int, color: Any) -> None:
    points = [(lr, losses) for lr in sweep.lrs if (losses := sweep.losses(rule, depth, lr))]
    line = [(lr, median(losses)) for lr, losses in points]
    shown = [(lr, loss if math.isfinite(loss) else math.nan) for lr, loss in line]
    axis.plot(*zip(*shown, strict=True), color=color, linewidth=1.6, label=f"{depth}")
    for lr, losses in points:
        finite = [loss for loss in losses if math.isfinite(loss)]
        axis.plot([lr] * len(finite), finite, ".", color=color, markersize=3, alpha=0.6)
    best = sweep.optimum(rule, depth)
    if math.isnan(best.lr):
        return
    axis.plot(best.lr, best.loss, "o", markerfacecolor="none", markeredgecolor=color, markersize=9, markeredgewidth=1.6)
