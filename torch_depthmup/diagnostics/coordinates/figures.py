"""The figure of a coordinate check: sizes over depth and width, and profiles along the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch_depthmup.diagnostics.coordinates.check import CoordinateCheck
from torch_depthmup.diagnostics.coordinates.slopes import AXES, QUANTITIES, Point, Slope, exact
from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.diagnostics.shared.style import (
    ACCENT,
    GRID,
    MUTED,
    geometric,
    ink,
    plain_ticks,
    shades,
)

__all__ = ["coordinate_figure"]


def coordinate_figure(check: CoordinateCheck) -> Any:
    """Sizes against depth and width on log axes with the rule's slopes as guides; below, profiles along the network.

    Args:
        check: what `coordinate_check` returned.

    Returns:
        A matplotlib figure. Top row: a panel for each quantity against depth, a mark for each seed, the mean over seeds
        as a line for each width, and the rule's exponent dashed. Then, where widths were checked, the same against
        width. Bottom row: own and stream updates of the widest networks against relative depth. Depth is colour.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [row for axis in AXES if (row := [slope for slope in check.slopes if slope.axis == axis])]
    size = (2.7 * max(map(len, rows)) + 0.4, 3.1 * (len(rows) + 1))
    figure = needs("matplotlib.figure").Figure(figsize=size, layout="constrained")
    *parts, bottom = figure.subfigures(len(rows) + 1, 1)
    for part, row in zip(parts, rows, strict=True):
        for axis, slope in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
            _sizes_panel(axis, check, slope)
    profiles = [q for q in ("inner", "outer", "stream") if any(s.quantity == q for s in check.slopes)]
    for axis, quantity in zip(bottom.subplots(1, len(profiles), squeeze=False)[0], profiles, strict=True):
        _profile_panel(axis, check, quantity)
    depths, widths = _values(check.sizes(rows[0][0].quantity, rows[0][0].kind))
    marks = [_line(color=MUTED, linestyle="", marker=mark, label=f"{n}") for n, mark in _marks(widths).items()]
    lines = [_line(color=color, label=f"{depth}") for depth, color in shades(depths).items()]
    for part, handles, title in [(parts[0], marks, "width")] * (len(widths) > 1) + [(bottom, lines, "depth")]:
        part.legend(handles=handles, title=title, loc="outside right center", frameon=False, fontsize="small")
    figure.suptitle(f"{check.rule.name}, {check.family.name}: {check.verdict}")
    return figure


def _values(points: Iterable[Point]) -> tuple[list[int], list[int | None]]:
    """Depths and widths, ascending."""
    listed = list(points)
    return sorted({point[0] for point in listed}), sorted({point[1] for point in listed}, key=lambda width: width or 0)


def _marks(widths: Sequence[int | None]) -> dict[int | None, str]:
    """A mark for each width."""
    return {width: "os^DvP"[i % 6] for i, width in enumerate(widths)}


def _line(**looks: Any) -> Any:
    return needs("matplotlib.lines").Line2D([], [], **looks)


def _sizes_panel(axis: Any, check: CoordinateCheck, slope: Slope) -> None:
    """One quantity against the slope's axis, a line for each value of the other. Marks tell widths, colours depths."""
    points, place = check.sizes(slope.quantity, slope.kind), AXES.index(slope.axis)
    depths, widths = _values(points)
    colors, marks = shades(depths), _marks(widths)
    for (depth, width, _), size in points.items():
        axis.plot((depth, width)[place], size, marks[width], color=colors[depth], markersize=4, alpha=0.7)
    at, others = (depths, widths) if place == 0 else (widths, depths)
    means = [
        {x: geometric(size for p, size in points.items() if (p[place], p[1 - place]) == (x, other)) for x in at}
        for other in others
    ]
    for other, mean in zip(others, means, strict=True):
        color = ink() if place == 0 else colors[other]
        axis.plot(at, list(mean.values()), color=color, linewidth=1.4 if len(others) == 1 else 0.8)
    guide = _guide(means, slope.predicted)
    label = f"{check.rule.name} {slope.prediction}"
    (dashed,) = axis.plot(*zip(*guide.items(), strict=True), "--", color=ACCENT, linewidth=1.4, label=label)
    if not exact(slope.quantity, slope.predicted):  # anything between the two slopes is what the rule says
        flat = _guide(means, 0.0)
        axis.fill_between(at, list(flat.values()), list(guide.values()), color=ACCENT, alpha=0.12, linewidth=0)
    measured = _line(color=ink(), linewidth=1.4, label=f"measured {slope.measured:+.2f}")
    axis.legend(handles=[measured, dashed], frameon=False, fontsize="x-small")
    axis.set_title(
        f"{QUANTITIES[slope.quantity]}\n{slope.kind}{': ' if slope.kind else ''}{slope.verdict}", fontsize="small"
    )
    axis.set(yscale="log", xlabel=slope.axis)
    axis.set_xscale("log", base=2)
    axis.set_xticks(at, [str(x) for x in at])
    axis.minorticks_off()
    # A flat line should look flat: at least a factor of four is shown.
    low, high = min(*points.values(), *guide.values()), max(*points.values(), *guide.values())
    pad = max(1.15, math.sqrt(4 / (high / low)) if high / low < 4 else 1.15)
    axis.set_ylim(low / pad, high * pad)
    plain_ticks(axis)
    axis.grid(**GRID)


def _guide(lines: Sequence[Mapping[Any, float]], slope: float) -> dict[Any, float]:
    """The power law of that slope through the middle of all lines."""
    at = list(lines[0])
    middle = at[len(at) // 2]
    height = geometric(line[middle] for line in lines)
    return {x: height * (x / middle) ** slope for x in at}


def _profile_panel(axis: Any, check: CoordinateCheck, quantity: str) -> None:
    end = max(row["step"] for row in check.rows)
    widest = max((row["width"] for row in check.rows), key=lambda width: width or 0)
    kind, column = ("stream", "update") if quantity == "stream" else ("layer", "own")
    rows = [row for row in check.rows if (row["step"], row["kind"], row["width"]) == (end, kind, widest)]
    rows = [row for row in rows if kind == "stream" or row["role"] == quantity]
    depths = sorted({row["depth"] for row in rows})
    colors = shades(depths)
    for depth in depths:
        along: dict[float, list[float]] = {}
        for row in rows:
            if row["depth"] == depth:
                along.setdefault(row["relative_depth"], []).append(row[column] / row["folded"])
        places = sorted(along)
        values = [geometric(along[place]) for place in places]
        axis.plot(places, values, "-", color=colors[depth], linewidth=1.5)
    axis.set(yscale="log", xlabel="relative depth", xlim=(0, 1.02))
    low, high = axis.get_ylim()
    if high / low < 10:
        middle = math.sqrt(low * high)
        axis.set_ylim(middle / 10**0.5, middle * 10**0.5)
    plain_ticks(axis)
    at = "" if widest is None else f", width {widest}"
    axis.set_title(f"{QUANTITIES[quantity]} along the network{at}", fontsize="small")
    axis.grid(**GRID)
