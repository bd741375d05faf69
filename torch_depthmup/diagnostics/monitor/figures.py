"""Figures of monitored runs: sizes at initialization, and what moved over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch_depthmup.diagnostics.monitor.recording import NUMBERS, FeatureMonitor
from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.diagnostics.shared.style import (
    GRID,
    categories,
    colormap,
    plain_ticks,
)
from torch_depthmup.errors import MeasurementError

__all__ = ["initial_figure", "monitor_figure"]


def monitor_figure(monitors: FeatureMonitor | Mapping[str, FeatureMonitor], quantity: str = "own") -> Any:
    """A quantity of the inner and outer layers and the residual streams' update over training steps.

    Args:
        monitors: one monitor, or several by label (runs of other depths or rules), a row of panels for each.
        quantity: a column of layer rows, such as ``"own"``, ``"gradient_alignment"`` or ``"own_share"``.

    Returns:
        A matplotlib figure. A line is a layer or stream, its colour the relative depth. Sizes have a log axis; own
        updates are shown without folded multipliers.

    Raises:
        MeasurementError: nothing was recorded, or the quantity is unknown.
        ImportError: matplotlib is not installed.
    """
    named = dict(monitors) if isinstance(monitors, Mapping) else {"": monitors}
    if quantity not in NUMBERS:
        raise MeasurementError(f"no quantity is called {quantity!r}. Write one of {', '.join(map(repr, NUMBERS))}")
    if not named or not all(monitor.rows for monitor in named.values()):
        raise MeasurementError("nothing was recorded yet. Call monitor.record(step) after a training step")
    size = (9.2, 2.7 * len(named) + 0.3)
    figure = needs("matplotlib.figure").Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(named), 3, squeeze=False, sharex=True, sharey="col")
    words = "own update" if quantity == "own" else quantity.replace("_", " ")
    kinds = (
        ("inner", quantity, f"inner layers: {words}"),
        ("outer", quantity, f"outer layers: {words}"),
        ("stream", "update", "residual stream: update"),
    )
    for axes, (label, monitor) in zip(panels, named.items(), strict=True):
        rule = "no plan" if monitor.plan is None else f"rule {monitor.plan.rule.name}"
        axes[0].set_ylabel(label or rule)
        for axis, (which, column, title) in zip(axes, kinds, strict=True):
            _lines(axis, monitor.rows, which, column)
            axis.set_title(title, fontsize="small")
            axis.grid(**GRID)
    for axis in panels[-1]:
        axis.set_xlabel("step")
    color = needs("matplotlib.cm").ScalarMappable(needs("matplotlib.colors").Normalize(0, 1), colormap())
    figure.colorbar(color, ax=panels, label="relative depth", shrink=0.8, aspect=30)
    return figure


def _lines(axis: Any, rows: Sequence[dict[str, Any]], which: str, column: str) -> None:
    shade = colormap()
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if (row["kind"] == "stream") if which == "stream" else (row["role"] == which):
            lines.setdefault((row["branch"], row["layer"]), []).append(row)
    for line in lines.values():
        values = [row[column] / (row["folded"] if column in ("own", "initial") else 1.0) for row in line]
        at = (line[0]["position"] + 1) / max(1, line[0]["additions"])
        axis.plot([row["step"] for row in line], values, color=shade(at), linewidth=1.1)
    if column not in ("gradient_alignment", "own_share"):
        axis.set_yscale("log")
        plain_ticks(axis)


def initial_figure(monitors: Mapping[str, FeatureMonitor]) -> Any:
    """The first record of networks beside each other: the residual stream and what its branches add, along the depth.

    Args:
        monitors: by label, each with a record made before training.

    Returns:
        A matplotlib figure: root mean squares against relative depth on a log axis, a line for each residual stream.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = needs("matplotlib.figure").Figure(figsize=(8.4, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    colors = categories(list(monitors))
    columns = (("size", "residual stream: size"), ("added", "branches: size of what each adds"))
    for axis, (column, title) in zip(panels, columns, strict=True):
        for label, monitor in monitors.items():
            rows = [row for row in monitor.rows if row["kind"] == "stream" and row["step"] == monitor.rows[0]["step"]]
            for stream in sorted({row["stream"] for row in rows}):
                mine = [row for row in rows if row["stream"] == stream]
                at = [(row["position"] + 1) / row["additions"] for row in mine]
                name = label if stream == rows[0]["stream"] else None
                values = [row[column] for row in mine]
                axis.plot(at, values, "o-", color=colors[label], markersize=3, linewidth=1.4, label=name)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        pad = max(1.0, math.sqrt(4 * low / high))  # a flat line should look flat
        axis.set_ylim(low / pad, high * pad)
        plain_ticks(axis)
        axis.set(xlabel="relative depth", xlim=(0, 1.02))
        axis.set_title(title, fontsize="small")
        axis.grid(**GRID)
    panels[0].legend(frameon=False, fontsize="small")
    return figure
