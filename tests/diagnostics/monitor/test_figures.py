"""Figures of monitored runs."""

from __future__ import annotations

import pytest
from trained import run

from torch_depthmup.diagnostics.plots import monitor_figure
from torch_depthmup.errors import MeasurementError


def test_the_monitor_figure_draws_a_line_for_each_layer() -> None:
    monitor = run(6, "depth-mup-corrected")
    inner, outer, stream = monitor_figure({"depth 6": monitor}).axes[:3]
    assert len(inner.lines) == len(outer.lines) == len(stream.lines) == 6
    row = [r for r in monitor.rows if r["layer"] == "blocks.0.outer.weight"]
    assert list(outer.lines[0].get_ydata()) == pytest.approx([r["own"] / r["folded"] for r in row])
    with pytest.raises(MeasurementError, match="no quantity is called"):
        monitor_figure(monitor, "speed")
