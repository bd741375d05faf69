"""Measured rows beside predicted ones: the same feature updates, layer by layer, with standard errors and a verdict.

Takes rows, whoever made them: a prediction is a few runs of the same network, whose features a monitor watched too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch_depthmup.diagnostics.shared.extras import frame
from torch_depthmup.errors import MeasurementError
from torch_depthmup.tables import columns, number

__all__ = ["Beside", "Compared", "beside"]

Row = dict[str, Any]

QUANTITIES = ("size", "update", "own", "initial", "below", "added", "spread", "own_share")
"""What does not depend on the width, as far as the network has a limit of infinite width. A cosine with a gradient is
not among them: of a single output it is a sign."""
FAR = 4.0  # standard errors beyond which a difference is called one
ALLOWED = 0.01  # share of values that may be farther
SHOWN = 16  # layers in a printed table


@dataclass(frozen=True)
class Compared:
    """One number of a row.

    Args:
        kind: of the row: ``"function"``, ``"stream"`` or ``"layer"``.
        name: the layer's weight, the stream's branch, or ``"function"``.
        role: of the layer.
        quantity: the row's column.
        measured: mean over networks.
        predicted: mean over the prediction's seeds.
        error: standard error of their difference.
        z: difference over error, as a normal number would have it: with few seeds, an error is uncertain itself.
    """

    kind: str
    name: str
    role: str
    quantity: str
    measured: float
    predicted: float
    error: float
    z: float


@dataclass(frozen=True)
class Beside:
    """A measurement beside a prediction, at one step. ``print`` it.

    Args:
        step: of both.
        networks: how many were measured.
        seeds: of the prediction.
        values: each number of each row.
    """

    step: int
    networks: int
    seeds: int
    values: tuple[Compared, ...]

    @property
    def far(self) -> tuple[Compared, ...]:
        """What differs by more than four standard errors."""
        return tuple(value for value in self.values if abs(value.z) > FAR)

    @property
    def agrees(self) -> bool:
        """Whether at most a hundredth of the values is far."""
        return len(self.far) <= ALLOWED * len(self.values)

    @property
    def verdict(self) -> str:
        """In words, with the worst value where they differ."""
        near = f"{len(self.values) - len(self.far)} of {len(self.values)} numbers within {FAR:g} standard errors"
        if self.agrees:
            return f"features move as predicted: {near}"
        worst = max(self.far, key=lambda value: abs(value.z))
        ratio = f", {worst.measured / worst.predicted:.3g}x" if worst.predicted else ""
        return (
            f"features do not move as predicted: {near}; farthest is {worst.quantity} of {worst.name}: "
            f"{worst.measured:.3g}, predicted {worst.predicted:.3g}{ratio}"
        )

    def frame(self) -> Any:
        """Tidy pandas frame, a row for each value, with the fields of `Compared` as columns."""
        names = list(Compared.__dataclass_fields__)
        return frame([{name: getattr(value, name) for name in names} for value in self.values], names)

    def __str__(self) -> str:
        layers: dict[tuple[str, str], dict[str, Compared]] = {}
        for value in self.values:
            layers.setdefault((value.kind, value.name), {})[value.quantity] = value
        worst = {key: max((abs(v.z) for v in found.values()), default=0.0) for key, found in layers.items()}
        shown = [key for key in layers if key[0] != "stream"]
        if len(shown) > SHOWN:
            farthest = set(sorted(shown, key=lambda key: -worst[key])[:SHOWN])
            shown = [key for key in shown if key in farthest]
        cells = [(key[1], (*_ratios(layers[key]), f"{worst[key]:.1f}")) for key in shown]
        header = ("measured / predicted", "update", "own update", "farthest z")
        lines = columns(header, cells)
        left = sum(key[0] != "stream" for key in layers) - len(shown)
        return "\n".join([*lines, *([f"and {left} layers that are nearer"] if left else [])])


def _ratios(values: dict[str, Compared]) -> tuple[str, str]:
    def ratio(name: str) -> str:
        value = values.get(name)
        if value is None or not value.predicted:
            return "-"
        return f"{value.measured / value.predicted:.3f} ± {number(value.error / abs(value.predicted), 1)}"

    return ratio("update"), ratio("own")


def beside(measured: Sequence[list[Row]], predicted: Sequence[list[Row]]) -> Beside:
    """The last record of measured networks beside that of predicted ones at the same step.

    Where a single network was measured, its spread is taken to be that of the predicted ones, so these should have its
    width.

    Args:
        measured: the rows of each network's monitor.
        predicted: the rows of each seed of the prediction.

    Raises:
        MeasurementError: nothing was measured, the prediction has a single seed or no rows, or not of this step or of
            these layers.
    """
    if not measured or not all(measured):
        raise MeasurementError("nothing was recorded yet. Call monitor.record(step) after a training step")
    if not predicted:
        raise MeasurementError("the prediction was not watched: nfd.predict(..., probe=inputs) keeps its rows")
    if len(predicted) < 2:
        raise MeasurementError("a prediction of one seed has no standard error: seeds=4 or so in nfd.predict")
    step = measured[0][-1]["step"]
    runs, others = ([_at(rows, step, who) for rows in group] for group, who in
                    ((measured, "a network"), (predicted, "the prediction")))  # fmt: skip
    _check_keys([*runs, *others])
    values = []
    for key, row in runs[0].items():
        for quantity in QUANTITIES:
            ours, theirs = ([float(run[key][quantity]) for run in group] for group in (runs, others))
            if all(map(math.isnan, ours)) and all(map(math.isnan, theirs)):
                continue
            name = row["layer"] or row["branch"] or "function"
            values.append(Compared(row["kind"], name, row["role"], quantity, *_compared(ours, theirs)))
    return Beside(step, len(measured), len(predicted), tuple(values))


def _at(rows: list[Row], step: int, who: str) -> dict[tuple[Any, ...], Row]:
    found = [row for row in rows if row["step"] == step]
    starts = [i for i, row in enumerate(found) if row["kind"] == "function"]
    if not starts:
        steps = sorted({row["step"] for row in rows})
        raise MeasurementError(
            f"{who} has no record at step {step}, only at {', '.join(map(str, steps[-5:]))}: predict as many steps as "
            "were measured"
        )
    return {(row["kind"], row["branch"], row["position"], row["layer"]): row for row in found[starts[-1] :]}


def _check_keys(records: list[dict[tuple[Any, ...], Row]]) -> None:
    for record in records[1:]:
        if odd := records[0].keys() ^ record.keys():
            kind, branch, _, layer = min(odd)
            raise MeasurementError(
                f"{layer or branch or kind}: watched in one of the runs only. Predict the same network, with the same "
                "layers, as was measured"
            )


def _compared(ours: list[float], theirs: list[float]) -> tuple[float, float, float, float]:
    """Means, the standard error of their difference (Welch's), and z."""
    mean, other = statistics.fmean(ours), statistics.fmean(theirs)
    if math.isnan(mean) or math.isnan(other):
        return mean, other, math.nan, math.inf
    spread = statistics.variance(theirs)
    parts = [(spread, len(theirs))]
    if len(ours) > 1:
        parts.append((statistics.variance(ours), len(ours)))
    shares = [(variance / count, count - 1) for variance, count in parts]
    square = sum(share for share, _ in shares)
    freedom = square**2 / sum(share**2 / free for share, free in shares) if square else 1.0
    error = math.sqrt(square + (spread if len(ours) == 1 else 0.0))
    difference = mean - other
    # What float32 makes of exact equality is no difference.
    if abs(difference) <= 1e-5 * max(abs(mean), abs(other)):
        return mean, other, error, 0.0
    return mean, other, error, _normal(difference / error, freedom) if error else math.copysign(math.inf, difference)


def _normal(t: float, freedom: float) -> float:
    """The normal number that is as rare as a t of so many degrees of freedom. Source: Wallace (1959), eq. 1.1."""
    size = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return math.copysign(size, t)
