"""depthmup choose: a rule and a learning rate for a depth that was not trained."""

from __future__ import annotations

import math

from sweeps import noisy, parabola

from torch_depthmup.commands.choose import predictions, recommendation
from torch_depthmup.diagnostics.transfer.result import Sweep

DEPTHS = (2, 4, 8, 16)


def test_the_best_rule_and_its_learning_rate_are_extrapolated() -> None:
    """Under mup the optimum drifts as 1 / depth; complete-p is worse, and its optima lie off the grid."""
    runs = [r for d in DEPTHS for r in noisy(-3 - math.log2(d), 3, 0.01, 0, d, rule="mup")]
    runs += [r for d in DEPTHS for r in parabola("complete-p", d, -20, floor=0.2, seeds=3)]
    sweep = Sweep(tuple(runs))
    header, rows = predictions(sweep, 64)
    assert header[1:] == ("drift: depth^", "best lr at 64", "depth 16 left out")
    assert rows[1] == ("complete-p", ("–", "–", "too few optima")) and rows[0][1][2] == "predicted"
    assert abs(float(rows[0][1][0].partition("±")[0]) + 1) < 0.2
    text = recommendation(sweep, 64)
    assert text.startswith(
        "Take mup: it has the lowest loss at depth 16. At depth 64 train with a learning rate of 0.00"
    )


def test_nothing_is_recommended_where_nothing_is_known() -> None:
    sweep = Sweep(tuple(r for d in DEPTHS for r in parabola("mup", d, -20)))
    assert recommendation(sweep, 64).startswith("No rule can be recommended")
