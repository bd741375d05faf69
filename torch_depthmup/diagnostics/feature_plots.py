"""Figures of feature learning: a monitored run over its steps, and a coordinate check over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_depthmup.diagnostics.extras import needs
from torch_depthmup.diagnostics.style import ACCENT, GRID, categories, colormap, geometric, ink, plain_ticks, shades
from torch_depthmup.errors import MeasurementError

if TYPE_CHECKING:
    from torch_depthmup.diagnostics.coordinates import CoordinateCheck, Slope
    from torch_depthmup.diagnostics.monitor import FeatureMonitor

__all__ = ["coordinate_figure", "initial_figure", "monitor_figure"]


def coordinate_figure(check: CoordinateCheck) -> Any:
    """Sizes against depth on log axes with the rule's slopes as guides; below, profiles along the network.

    Args:
        check: what `coordinate_check` returned.

    Returns:
        A matplotlib figure. Top row: a panel for each quantity, a dot for each seed, the mean over seeds as a line and
        the rule's exponent dashed. Bottom row: own and stream updates against relative depth, depth as colour.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from torch_depthmup.diagnostics.coordinates import QUANTITIES

    slopes = [slope for slope in check.slopes if slope.axis == "depth"]
    figure = needs("matplotlib.figure").Figure(figsize=(2.7 * len(slopes) + 0.4, 6.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    for axis, slope in zip(top.subplots(1, len(slopes), squeeze=False)[0], slopes, strict=True):
        _sizes_panel(axis, check, slope, QUANTITIES[slope.quantity])
    profiles = [q for q in ("inner", "outer", "stream") if any(s.quantity == q for s in slopes)]
    for axis, quantity in zip(bottom.subplots(1, len(profiles), squeeze=False)[0], profiles, strict=True):
        _profile_panel(axis, check, quantity, QUANTITIES[quantity], last=quantity == profiles[-1])
    figure.suptitle(f"{check.rule.name}, {check.family.name}: {check.verdict}")
    return figure


def _sizes_panel(axis: Any, check: CoordinateCheck, slope: Slope, title: str) -> None:
    from torch_depthmup.diagnostics.coordinates import exact

    points = check.sizes(slope.quantity)
    depths = sorted({depth for depth, _ in points})
    colors = shades(depths)
    for (depth, _), size in points.items():
        axis.plot(depth, size, "o", color=colors[depth], markersize=4, alpha=0.7)
    means = [geometric(size for (d, _), size in points.items() if d == depth) for depth in depths]
    axis.plot(depths, means, color=ink(), linewidth=1.4, label=f"measured {slope.measured:+.2f}")
    middle = len(depths) // 2
    guide = [means[middle] * (depth / depths[middle]) ** slope.predicted for depth in depths]
    label = f"{check.rule.name} {'' if exact(slope.quantity, slope.predicted) else 'up to '}{slope.predicted:+.2f}"
    axis.plot(depths, guide, "--", color=ACCENT, linewidth=1.2, label=label)
    axis.set(xscale="log", yscale="log", xlabel="depth", title=f"{title}\n{slope.verdict}")
    axis.set_xscale("log", base=2)
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.title.set_fontsize("small")
    # A flat line should look flat: at least a factor of four is shown.
    low, high = min(*points.values(), *guide), max(*points.values(), *guide)
    pad = max(1.15, math.sqrt(4 / (high / low)) if high / low < 4 else 1.15)
    axis.set_ylim(low / pad, high * pad)
    plain_ticks(axis)
    axis.grid(**GRID)
    axis.legend(frameon=False, fontsize="x-small")


def _profile_panel(axis: Any, check: CoordinateCheck, quantity: str, title: str, *, last: bool) -> None:
    end = max(row["step"] for row in check.rows)
    kind, column = ("stream", "update") if quantity == "stream" else ("layer", "own")
    rows = [row for row in check.edge if row["step"] == end and row["kind"] == kind]
    rows = [row for row in rows if kind == "stream" or row["role"] == quantity]
    depths = sorted({row["total_depth"] for row in rows})
    colors = shades(depths)
    for depth in depths:
        along: dict[float, list[float]] = {}
        for row in rows:
            if row["total_depth"] == depth:
                along.setdefault(row["relative_depth"], []).append(row[column] / row["folded"])
        places = sorted(along)
        values = [geometric(along[place]) for place in places]
        axis.plot(places, values, "-", color=colors[depth], linewidth=1.5, label=str(depth))
    axis.set(yscale="log", xlabel="relative depth", xlim=(0, 1.02))
    low, high = axis.get_ylim()
    if high / low < 10:
        middle = math.sqrt(low * high)
        axis.set_ylim(middle / 10**0.5, middle * 10**0.5)
    plain_ticks(axis)
    axis.set_title(f"{title} along the network", fontsize="small")
    axis.grid(**GRID)
    if last:
        axis.legend(title="depth", frameon=False, fontsize="x-small")


def monitor_figure(monitors: FeatureMonitor | Mapping[str, FeatureMonitor], quantity: str = "own") -> Any:
    """A quantity of the inner and outer layers and the residual streams' update over training steps.

    Args:
        monitors: one monitor, or several by label (runs of other depths or rules), a row of panels for each.
        quantity: a column of layer rows, such as ``"own"``, ``"alignment"`` or ``"own_share"``.

    Returns:
        A matplotlib figure. A line is a layer or stream, its colour the relative depth. Sizes have a log axis; own
        updates are shown without folded multipliers.

    Raises:
        MeasurementError: nothing was recorded, or the quantity is unknown.
        ImportError: matplotlib is not installed.
    """
    from torch_depthmup.diagnostics.monitor import NUMBERS

    named = dict(monitors) if isinstance(monitors, Mapping) else {"": monitors}
    if quantity not in NUMBERS:
        raise MeasurementError(f"no quantity is called {quantity!r}. Write one of {', '.join(map(repr, NUMBERS))}")
    if not named or not all(monitor.rows for monitor in named.values()):
        raise MeasurementError("nothing was recorded yet. Call monitor.record(step) after a training step")
    size = (9.2, 2.7 * len(named) + 0.3)
    figure = needs("matplotlib.figure").Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(named), 3, squeeze=False, sharex=True, sharey="col")
    kinds = (
        ("inner", quantity, f"inner layers: {quantity}"),
        ("outer", quantity, f"outer layers: {quantity}"),
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
        at = (line[0]["position"] + 1) / max(1, line[0]["depth"])
        axis.plot([row["step"] for row in line], values, color=shade(at), linewidth=1.1)
    if column not in ("alignment", "own_share"):
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
                at = [(row["position"] + 1) / row["depth"] for row in mine]
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
