"""A sweep in words and as text cells: nothing but its own numbers, and what they cannot tell apart."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from torch_depthmup.printing import Table, number

if TYPE_CHECKING:
    from torch_depthmup.diagnostics.optima import Sweep

__all__ = ["cells", "reading"]


def cells(sweep: Sweep) -> Table:
    """Header and rows of `Sweep.summary` as a person reads them; the base's own moves and regret are not numbers."""
    base = sweep.depths[0]
    header = (
        "rule", "depth", "best lr", "log2 lr", "moves by 2^", "edge", "best loss", f"with lr of {base}", "regret"
    )  # fmt: skip
    rows: list[tuple[str, tuple[str, ...]]] = []
    for row in sweep.summary():
        rule, depth = row["rule"], row["depth"]
        moves, regret = str(sweep.drift(rule, depth)), number(row["regret"])
        if not math.isnan(row["regret_error"]):
            regret += f" ± {number(row['regret_error'], 1)}"
        texts = (
            f"{depth}", f"{number(row['lr'])}{'*' if row['at_edge'] else ''}", f"{sweep.optimum(rule, depth).log2_lr}",
            "base" if depth == base else moves, "none" if math.isinf(row["edge"]) else number(row["edge"]),
            number(row["loss"]), number(row["transferred_loss"]), "base" if depth == base else regret,
        )  # fmt: skip
        rows.append((rule, texts))
    return header, rows


def reading(sweep: Sweep) -> str:
    """What this run says in words: nothing but its own numbers, and what they cannot tell apart."""
    deepest, base = sweep.depths[-1], sweep.depths[0]
    losses = {rule: sweep.transferred(rule, deepest) for rule in sweep.rules}
    best = min(losses, key=lambda rule: fmean(losses[rule]))
    if not math.isfinite(fmean(losses[best])):
        return f"In this run no rule trains at depth {deepest} with the learning rate tuned at depth {base}."
    alike = [rule for rule in sweep.rules if rule != best and _alike(losses[rule], losses[best])]
    told = f"; these seeds do not tell it from {', '.join(alike)}" if alike else ""
    return (
        f"In this run the learning rate tuned at depth {base} gives the lowest mean loss at depth {deepest} under "
        f"{best}{told}. ± over seeds: standard error (moves), deviation (loss)."
    )


def _alike(a: list[float], b: list[float]) -> bool:
    """Whether two means lie within two standard errors of their difference; with one seed nothing tells them apart."""
    if not all(map(math.isfinite, (*a, *b))):
        return False
    if min(len(a), len(b)) < 2:
        return True
    return abs(fmean(a) - fmean(b)) < 2 * math.hypot(stdev(a) / len(a) ** 0.5, stdev(b) / len(b) ** 0.5)
