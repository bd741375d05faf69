"""Figures of coordinate checks."""

from __future__ import annotations

import numpy as np
import pytest
from canonical import Canonical
from torch import nn
from trained import check

from torch_depthmup.diagnostics.plots import coordinate_figure


def test_the_coordinate_figure_draws_the_rules_slope_through_the_data() -> None:
    result = check(depths=(2, 4, 8))
    figure = coordinate_figure(result)
    top = figure.subfigs[0].axes
    assert len(top) == len(result.slopes)
    for axis, slope in zip(top, result.slopes, strict=True):
        assert axis.get_xscale() == axis.get_yscale() == "log"
        (guide,) = [line for line in axis.lines if str(line.get_label()).startswith("depth-mup-corrected ")]
        x, y = (np.log(np.asarray(values, float)) for values in guide.get_data())
        assert np.polyfit(x, y, 1)[0] == pytest.approx(slope.predicted, abs=1e-9)
    assert len(figure.subfigs[1].axes) == 3


def test_the_coordinate_figure_of_a_grid_has_a_row_for_widths() -> None:
    def make(depth: int, width: int) -> nn.Module:
        return Canonical(depth, width)

    result = check(depths=(2, 4), widths=(16, 32, 64), steps=1, make=make)
    depth, width, profiles = coordinate_figure(result).subfigs
    assert [len(part.axes) for part in (depth, width, profiles)] == [5, 4, 3]
    for axis in width.axes:
        assert axis.get_xlabel() == "width" and [tick.get_text() for tick in axis.get_xticklabels()] == [
            "16",
            "32",
            "64",
        ]
    told = [[text.get_text() for text in part.legends[0].get_texts()] for part in (depth, profiles)]
    assert told == [["16", "32", "64"], ["2", "4"]]
