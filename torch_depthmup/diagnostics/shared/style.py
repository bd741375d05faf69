"""What the figures share: colours that are read on the page's background, light or dark, and quiet axes.

Everything follows matplotlib's ``rcParams``, so that a user's own style sheet, dark ones too, is respected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch_depthmup.diagnostics.shared.extras import needs

__all__ = ["ACCENT", "DARK", "GRID", "MUTED", "colormap", "categories", "geometric", "ink", "plain_ticks", "shades"]

GRID = {"which": "major", "alpha": 0.25, "linewidth": 0.6}
MUTED = "0.55"  # guides, read on black as on white
ACCENT = "#e4572e"  # the theory's line, likewise
PAGE, TEXT = "#16181d", "#d8dce4"

DARK = {
    "figure.facecolor": PAGE, "axes.facecolor": PAGE, "savefig.facecolor": PAGE, "text.color": TEXT,
    "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "grid.color": TEXT,
    "legend.labelcolor": TEXT,
}  # fmt: skip
"""Settings for ``matplotlib.rc_context``: a figure for a dark page."""

RANGE = {
    False: (0.0, 0.85),
    True: (0.25, 1.0),
}  # of the colour map, without the end that the page swallows
MARKS = {  # Okabe and Ito's colours for the colour-blind, those that are read on white, and on black
    False: ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a7400", "#4a90c2", "#555555"),
    True: ("#56b4e9", "#e69f00", "#2fc79a", "#cc79a7", "#f0e442", "#7fb3ff", "#bbbbbb"),
}


def ink() -> Any:
    """The colour of text, for the lines of what was measured."""
    return needs("matplotlib").rcParams["text.color"]


def _dark() -> bool:
    colors = needs("matplotlib.colors")
    red, green, blue = colors.to_rgb(needs("matplotlib").rcParams["axes.facecolor"])
    return bool(0.299 * red + 0.587 * green + 0.114 * blue < 0.5)


def colormap() -> Any:
    """The map for ordered values, such as depth, from 0 to 1."""
    low, high = RANGE[_dark()]
    whole = needs("matplotlib").colormaps["viridis"]
    steps = [whole(low + (high - low) * i / 255) for i in range(256)]
    return needs("matplotlib.colors").ListedColormap(steps)


def shades(values: Sequence[Any]) -> dict[Any, Any]:
    """A colour for each of some ordered values."""
    shade = colormap()
    return {value: shade(i / max(1, len(values) - 1)) for i, value in enumerate(values)}


def categories(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each of some names without an order."""
    marks = MARKS[_dark()]
    return {name: marks[i % len(marks)] for i, name in enumerate(names)}


def plain_ticks(axis: Any) -> None:
    """Numbers at a few places of a logarithmic y axis whose limits are set, also where they are close."""
    ticker = needs("matplotlib.ticker")
    low, high = axis.get_ylim()
    places = (1.0, 2.0, 5.0) if high > 5 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=places, numticks=6))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.2g}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def geometric(values: Iterable[float]) -> float:
    """The geometric mean, which is the mean on a log axis."""
    listed = [math.log(value) for value in values if value > 0]
    return math.exp(sum(listed) / len(listed)) if listed else math.nan
