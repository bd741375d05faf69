"""A sweep as a table for the terminal."""

from __future__ import annotations

import math
import shutil
from statistics import fmean, stdev
from typing import Any

from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.diagnostics.transfer.result import Sweep

__all__ = ["table", "terminal"]


def terminal() -> Any:
    """A rich console as wide as the terminal, at most 100 columns."""
    return needs("rich.console").Console(width=min(100, shutil.get_terminal_size((100, 24)).columns))


def table(sweep: Sweep) -> Any:
    """A rich table: the best learning rate at each depth, its drift, and the deepest losses."""
    deepest = sweep.depths[-1]
    table = needs("rich.table").Table(box=needs("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title = f"best learning rate at each depth L; loss at depth {deepest}"
    headings = (*(f"L={depth}" for depth in sweep.depths), "moves by 2^", f"lr of L={sweep.depths[0]}", "best lr")
    for heading in ("rule", *headings):
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
    for rule in sweep.rules:
        optima = [sweep.optimum(rule, depth) for depth in sweep.depths]
        at_best = sweep.losses(rule, deepest, optima[-1].lr) or [math.inf]
        table.add_row(
            rule,
            *("none" if math.isnan(o.lr) else f"{o.lr:.2g}{'*' if o.at_edge else ''}" for o in optima),
            str(sweep.drift(rule, deepest)),
            _with_spread(sweep.transferred(rule, deepest)),
            _with_spread(at_best),
        )
    if any(sweep.optimum(rule, depth).at_edge for rule in sweep.rules for depth in sweep.depths):
        table.caption = "* at the edge of the grid: the optimum may lie beyond it"
    return table


def _with_spread(losses: list[float]) -> str:
    spread = f"±{stdev(losses):.3f}" if len(losses) > 1 and max(losses) < math.inf else ""
    return f"{fmean(losses):.3f}{spread}"
