"""Figures of sweeps."""

from __future__ import annotations

from sweeps import parabola

from torch_depthmup.diagnostics.plots import transfer_figure
from torch_depthmup.diagnostics.transfer.result import Sweep


def test_the_figure_has_a_panel_for_each_rule_and_a_line_for_each_depth() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5) + parabola("mup", 64, -7) + parabola("complete-p", 4, -5)))
    figure = transfer_figure(Sweep(sweep.runs + tuple(parabola("complete-p", 64, -5, edge=-2))), title="curves")
    assert [axis.get_title() for axis in figure.axes] == ["mup", "complete-p"]
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["4", "64"]
