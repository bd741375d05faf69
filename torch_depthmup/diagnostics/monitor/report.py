"""What a monitor's numbers mean, in plain language: collapse, repaired, exploding, lazy, healthy.

Reads rows and a plan, measures nothing. Thresholds stand at the top.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch_depthmup import rules
from torch_depthmup.errors import MeasurementError
from torch_depthmup.rules import Family, Rule, get_family
from torch_depthmup.scaling.plan import Plan
from torch_depthmup.tables import columns

__all__ = ["Finding", "Kind", "Report", "Stage", "Start", "StreamReport", "report"]

Kind = Literal["collapse", "repaired", "exploding", "lazy", "untrained", "healthy"]
Row = dict[str, Any]

EXPONENT = 0.25  # halfway between what vanishes as depth^(-1/2) and what stays
DEEPER = 1.5  # depth ratios below this say nothing about exponents
GROWN = 10.0  # a residual stream that is so many times its initial size explodes
THROUGH = 30.0  # and so does one that grows so much from its first to its last branch
STILL = 0.02  # features that moved by less than this share of their size are lazy ...
AHEAD = 10.0  # ... if the function moved so many times more


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say.

    Args:
        kind: ``"collapse"``, ``"repaired"``, ``"exploding"``, ``"lazy"``, ``"untrained"`` or ``"healthy"``.
        where: the stage or the stream, ``""`` for the whole model.
        text: a sentence or two.
    """

    kind: Kind
    where: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Stage:
    """The inner or outer layers of the branches that share a name prefix and a stream, at the last record.

    Args:
        name: the prefix, such as ``layer3``.
        role: ``"inner"`` or ``"outer"``.
        layers: how many weight operations.
        additions: of their stream.
        base_additions: of the base's stream, ``None`` where there is no base.
        own: root mean square of their own updates (W - W0) h, without folded multipliers.
        relative: the same of (W - W0) h over W0 h.
        share: mean share of a feature's change that its own layer learned.
        exponent: the rule's exponent in depth of ``own``, ``None`` without a plan, or where it leaves them out.
        factor: ``own`` over that of the base run, ``None`` without one.
    """

    name: str
    role: str
    layers: int
    additions: int
    base_additions: int | None
    own: float
    relative: float
    share: float
    exponent: float | None
    factor: float | None

    @property
    def ratio(self) -> float:
        """Additions over those of the base; 1 without a base."""
        return self.additions / self.base_additions if self.base_additions else 1.0

    @property
    def predicted(self) -> float | None:
        """The rule's factor on ``own`` relative to the base."""
        return None if self.exponent is None or self.base_additions is None else self.ratio**self.exponent


@dataclass(frozen=True)
class Start:
    """Sizes before training, which updates are compared with.

    Args:
        function: of the main output.
        streams: of the residual streams, by stream and position of the addition.
    """

    function: float
    streams: Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class StreamReport:
    """A residual stream at the last record.

    Args:
        name: its number, the prefix of its branches, its additions.
        update: at its end, relative to its initial size.
        growth: its size at its end over the initial one.
        gradient_alignment: the mean over its additions of the cosine between stream and gradient.
    """

    name: str
    update: float
    growth: float
    gradient_alignment: float


@dataclass(frozen=True)
class Report:
    """The last record of a monitor, summed up. ``print`` it.

    Args:
        step: of the last record.
        rule: the plan's rule, ``None`` without a plan.
        stages: measured own updates beside predicted exponents.
        streams: what each residual stream did.
        function: the function's relative update.
        findings: what it means.
        memory: bytes that the monitor keeps between records.
    """

    step: int
    rule: Rule | None
    stages: tuple[Stage, ...]
    streams: tuple[StreamReport, ...]
    function: float
    findings: tuple[Finding, ...]
    memory: int

    def __str__(self) -> str:
        named = f"rule {self.rule.name}" if self.rule else "no plan"
        lines = [f"step {self.step}, {named}; the monitor keeps {self.memory / 2**20:.3g} MiB", ""]
        header = ("layers", "role", "number", "own update", "own/W0h", "share", "exponent", "predicted", "measured")
        lines += columns(header, [(stage.name, _stage_cells(stage)) for stage in self.stages])
        lines.append("")
        cells = [
            (s.name, (f"{s.update:.3g}", f"{s.growth:.3g}x", f"{s.gradient_alignment:+.3f}")) for s in self.streams
        ]
        lines += columns(("residual stream", "update/h0", "size/h0", "gradient alignment"), cells)
        lines += ["", f"function: update/f0 {self.function:.3g}", ""]
        return "\n".join([*lines, *(f"- {finding.text}" for finding in self.findings)])


def _stage_cells(stage: Stage) -> tuple[str, ...]:
    return (
        stage.role,
        str(stage.layers),
        f"{stage.own:.3g}",
        f"{stage.relative:.3g}",
        f"{stage.share:.2f}",
        "-" if stage.exponent is None else f"{stage.exponent:+.2f}",
        "-" if stage.predicted is None else f"{stage.predicted:.3g}x",
        "-" if stage.factor is None else f"{stage.factor:.3g}x",
    )


def report(
    rows: Sequence[Row],
    start: Start,
    *,
    plan: Plan | None = None,
    base: Any = None,
    family: str | Family = "adam",
    memory: int = 0,
) -> Report:
    """Sums up the last record among a monitor's rows.

    Args:
        rows: of a monitor with at least one record.
        start: the sizes before training.
        plan: of the network, if it has one.
        base: the rows of the base run, or its data frame; compared at the same step where they have it.
        family: the optimizer's family.
        memory: bytes that the monitor keeps.

    Raises:
        MeasurementError: nothing was recorded, or ``base`` is something else.
    """
    if not rows:
        raise MeasurementError("nothing was recorded yet. Call monitor.record(step) after a training step")
    family = get_family(family)
    last = _at(rows, rows[-1]["step"])
    base_rows = None if base is None else _base_rows(base, last[0]["step"])
    stages = tuple(_stages(last, base_rows, plan, family))
    streams = tuple(_streams(last, start))
    moved = _over(last[0]["update"], start.function)
    rule = None if plan is None else plan.rule
    found = [*_exploding(last, start), *_depth_findings(stages, rule, family), *_lazy(last, start, moved)]
    if not {finding.kind for finding in found} & {"exploding", "collapse", "lazy", "untrained"}:
        most = max(stream.update for stream in streams)
        text = f"features and function move together (streams by up to {most:.0%} of their size, "
        found.append(Finding("healthy", "", text + f"the function by {moved:.0%}): healthy"))
    return Report(last[0]["step"], rule, stages, streams, moved, tuple(found), memory)


def _at(rows: Iterable[Row], step: int) -> list[Row]:
    """The rows of the last record made at a step."""
    found = [row for row in rows if row["step"] == step]
    starts = [i for i, row in enumerate(found) if row["kind"] == "function"]
    return found[starts[-1] :] if starts else []


def _base_rows(base: Any, step: int) -> list[Row]:
    if not (isinstance(base, list) or hasattr(base, "to_dict")):
        raise MeasurementError(f"base must be a FeatureMonitor or its data frame, not {type(base).__name__}")
    rows: list[Row] = base if isinstance(base, list) else base.to_dict("records")
    if not rows:
        raise MeasurementError("base has no records. Record at the same steps in the base run")
    return _at(rows, step) or _at(rows, rows[-1]["step"])


def _over(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0


def _prefix(branch: str) -> str:
    """What a branch's name says before the block's number: ``layer3.1.conv`` -> ``layer3``."""
    parts = itertools.takewhile(lambda part: not part.isdigit(), branch.partition("#")[0].split("."))
    return ".".join(parts) or "blocks"


def _grouped(rows: Iterable[Row]) -> dict[tuple[int, str, str], list[Row]]:
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "layer" and row["role"] != "outside":
            groups.setdefault((row["stream"], _prefix(row["branch"]), row["role"]), []).append(row)
    return groups


def _mean_square(values: Iterable[float]) -> float:
    listed = list(values)
    return math.sqrt(sum(v * v for v in listed) / len(listed)) if listed else math.nan


def _mean(values: Iterable[float]) -> float:
    """The mean of what is a number; a layer behind dead units has no share."""
    listed = [v for v in values if not math.isnan(v)]
    return sum(listed) / len(listed) if listed else math.nan


def _stages(rows: list[Row], base: list[Row] | None, plan: Plan | None, family: Family) -> Iterable[Stage]:
    slopes = {} if plan is None else rules.predicted_slopes(plan.rule, family)
    # By name: a plan may leave out branches that the monitor watches, and number the streams otherwise.
    planned = {} if plan is None else {branch.name: plan.streams[branch.stream] for branch in plan.branches}
    groups, others = _grouped(rows), _grouped(base or [])
    for (stream, name, role), group in groups.items():
        own = _mean_square(row["own"] / row["folded"] for row in group)
        counted = planned.get(group[0]["branch"])
        additions, base_additions = (
            (counted.additions, counted.base_additions) if counted else (group[0]["additions"], None)
        )
        factor = None
        if other := others.get((stream, name, role)):
            additions, base_additions = group[0]["additions"], other[0]["additions"]
            factor = _over(own, _mean_square(row["own"] / row["folded"] for row in other))
        yield Stage(
            name=name,
            role=role,
            layers=len(group),
            additions=additions,
            base_additions=base_additions,
            own=own,
            relative=_mean_square(_over(row["own"], row["initial"]) for row in group),
            share=_mean(row["own_share"] for row in group),
            exponent=slopes.get(role) if counted or not planned else None,
            factor=factor,
        )


def _stream_rows(rows: Iterable[Row]) -> dict[int, list[Row]]:
    streams: dict[int, list[Row]] = {}
    for row in rows:
        if row["kind"] == "stream":
            streams.setdefault(row["stream"], []).append(row)
    return streams


def _streams(rows: list[Row], start: Start) -> Iterable[StreamReport]:
    for stream, members in _stream_rows(rows).items():
        last = members[-1]
        begun = start.streams[stream, last["position"]]
        alignment = _mean(row["gradient_alignment"] for row in members)
        name = f"{stream}: {_prefix(members[0]['branch'])}, {last['additions']} additions"
        yield StreamReport(name, _over(last["update"], begun), _over(last["size"], begun), alignment)


# Findings


def _exploding(rows: list[Row], start: Start) -> Iterable[Finding]:
    # The function stands first among the rows and comes last in the network.
    broken = next((row for row in [*rows[1:], rows[0]] if not math.isfinite(row["size"])), None)
    if broken is not None:
        where = broken["layer"] or broken["branch"] or "the function"
        yield Finding("exploding", where, f"{where} is not finite at step {broken['step']}: exploding; lower the lr")
        return
    for stream, members in _stream_rows(rows).items():
        worst = max(members, key=lambda row: _over(row["size"], start.streams[stream, row["position"]]))
        grown = _over(worst["size"], start.streams[stream, worst["position"]])
        if grown >= GROWN:
            text = f"the residual stream at {worst['branch']} is {grown:.3g}x its initial size: exploding; lower the lr"
            yield Finding("exploding", worst["branch"], text)
        first, last = (start.streams[stream, end["position"]] for end in (members[0], members[-1]))
        if _over(last, first) >= THROUGH:
            text = (
                f"the residual stream grows {_over(last, first):.3g}x from {members[0]['branch']} to "
                f"{members[-1]['branch']} at initialization: exploding; rule depth-mup-corrected or "
                "complete-p bounds it"
            )
            yield Finding("exploding", members[-1]["branch"], text)


def _depth_findings(stages: Iterable[Stage], rule: Rule | None, family: Family) -> Iterable[Finding]:
    for stage in stages:
        if stage.role == "inner" and stage.ratio >= DEEPER:
            finding = _measured(stage, rule, family) if stage.factor is not None else _expected(stage, rule, family)
            if finding is not None:
                yield finding


def _measured(stage: Stage, rule: Rule | None, family: Family) -> Finding | None:
    """Compares with the base run."""
    assert stage.factor is not None
    where = f"inner layers of {stage.name}"
    if not math.isfinite(stage.factor):
        return None
    if stage.factor <= 0:
        return Finding("collapse", stage.name, f"{where} learn nothing at depth {stage.additions}: collapse")
    exponent = math.log(stage.factor) / math.log(stage.ratio)
    if exponent < -EXPONENT:
        text = f"{where} learn {1 / stage.factor:.2g}x less than at depth {stage.base_additions}: collapse"
        return Finding("collapse", stage.name, text + _why(stage, rule, family))
    more = "as much as" if 0.8 < stage.factor < 1.25 else f"{stage.factor:.2g}x what they learn"
    if exponent > EXPONENT:
        text = (
            f"{where} learn {stage.factor:.2g}x what they learn at depth {stage.base_additions}: exploding with depth"
        )
        return Finding("exploding", stage.name, text + (f", not predicted for {rule.name}" if rule else ""))
    if rule is not None and rule.alpha > 0 and stage.exponent == 0:
        text = f"{where} learn {more} at depth {stage.base_additions}: repaired by {rule.name}"
        return Finding("repaired", stage.name, text + _price(stage, rule, family))
    return None


def _expected(stage: Stage, rule: Rule | None, family: Family) -> Finding | None:
    """Without a base run there is only the rule to go by, and the text says so."""
    if rule is None or stage.exponent is None or stage.predicted is None or rule.alpha == 0:
        return None
    hint = "predicted, not measured: pass base= the base run's monitor"
    if stage.exponent < -EXPONENT:
        text = (
            f"inner layers of {stage.name} learn {1 / stage.predicted:.2g}x less than at depth {stage.base_additions} "
            f"under {rule.name}: collapse ({hint}); {_repair(rule, family)}"
        )
        return Finding("collapse", stage.name, text)
    if stage.exponent == 0:
        text = f"inner layers of {stage.name} learn as much as at depth {stage.base_additions}: repaired by {rule.name}"
        text += f" ({hint})"
        return Finding("repaired", stage.name, text + _price(stage, rule, family))
    return None


def _why(stage: Stage, rule: Rule | None, family: Family) -> str:
    if rule is None or stage.predicted is None:
        return ""
    if stage.exponent is not None and stage.exponent < -EXPONENT:
        return f", as predicted for {rule.name} ({1 / stage.predicted:.2g}x); {_repair(rule, family)}"
    return f", not predicted for {rule.name}: check that the optimizer is dm.{family.name.capitalize()} or its like"


def _repair(rule: Rule, family: Family) -> str:
    """The known rule of the same branch multiplier under which inner layers learn at any depth."""
    good = [r for r in rules.RULES.values() if r.alpha > 0 and rules.predicted_slopes(r, family)["inner"] == 0]
    same = [r for r in good if r.alpha == rule.alpha] or good
    return f"rule {same[0].name} repairs it"


def _price(stage: Stage, rule: Rule, family: Family) -> str:
    """A correction is not free, and the report says so."""
    growth = rules.predicted_slopes(rule, family)["stream"]
    if growth <= 0:
        return ""
    return f"; the price: the residual stream's update grows as depth^{growth:g}, up to {stage.ratio**growth:.2g}x here"


def _lazy(rows: list[Row], start: Start, function: float) -> Iterable[Finding]:
    if all(row["update"] == 0 for row in rows if row["kind"] != "layer"):
        yield Finding("untrained", "", "nothing has moved since initialization: record after training steps")
        return
    features = max(
        _over(row["update"], start.streams[row["stream"], row["position"]]) for row in rows if row["kind"] == "stream"
    )
    if features < STILL and function > AHEAD * features:
        text = (
            f"the function moved by {function:.2g} of its size while the residual streams moved by {features:.2g}: "
            "lazy; the readout learns, features do not. Raise the lr of the branches, or lower the readout's scale"
        )
        yield Finding("lazy", "", text)
