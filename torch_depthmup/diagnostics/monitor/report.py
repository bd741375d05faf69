"""What a monitor's rows mean, in plain language. Reads rows and a plan, measures nothing, and knows no monitor.

Thresholds stand at the top.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch_depthmup import rules
from torch_depthmup.diagnostics.monitor.beside import Beside, beside
from torch_depthmup.errors import MeasurementError
from torch_depthmup.rules import Family, Rule
from torch_depthmup.scaling.plan import Plan
from torch_depthmup.tables import columns

__all__ = ["Finding", "Kind", "Report", "Row", "Stage", "base_rows", "report"]

Kind = Literal[
    "diverged", "exploding", "collapsed", "frozen", "collapse", "repaired", "predicted", "lazy", "untrained",
    "healthy", "unknown", "agrees", "differs",
]  # fmt: skip
WRONG = {"diverged", "exploding", "collapsed", "frozen", "collapse", "lazy", "untrained"}
Row = dict[str, Any]

EXPONENT = 0.25  # halfway between what vanishes as depth^(-1/2) and what stays
DEEPER = 1.5  # depth ratios below this say nothing about exponents
GROWN = 10.0  # a residual stream explodes if it is so many times its initial size (with a base: its growth in the base)
FASTER = 1.5  # ... and has grown by so much in the second half of the training so far
THROUGH = 30.0  # a stream that grows so much from its first to its last branch explodes at initialization
ALIKE = 0.01  # features whose samples differ by less than this share of their size have collapsed
STILL = 0.02  # features that moved by less than this share of their size are lazy ...
AHEAD = 10.0  # ... if the function moved so many times more


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say.

    Args:
        kind: ``"diverged"`` (not finite), ``"exploding"`` (still growing fast), ``"collapsed"`` (all samples alike),
            ``"frozen"`` (weights that do not change), ``"lazy"`` (only the readout learns), ``"untrained"``;
            ``"collapse"`` or ``"repaired"`` where inner layers learn less than in the base run, or as much;
            ``"predicted"`` where there is no base run and only the rule says so; ``"healthy"`` where nothing is wrong;
            ``"unknown"`` where that cannot be told without a base run; ``"agrees"`` or ``"differs"`` where there is a
            prediction.
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
class StreamMove:
    """A residual stream at the last record.

    Args:
        name: its index, the prefix of its branches and how many additions it has.
        update: of its end, relative to its initial size.
        growth: its size over its initial size.
        gradient_alignment: mean cosine with its gradient.
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
        beside: the last record beside a prediction of `nfd.predict`, ``None`` without one.
    """

    step: int
    rule: Rule | None
    stages: tuple[Stage, ...]
    streams: tuple[StreamMove, ...]
    function: float
    findings: tuple[Finding, ...]
    beside: Beside | None = None

    def __str__(self) -> str:
        header = ("layers", "role", "number", "own", "own/W0h", "share", "exponent", "predicted", "measured")
        lines = [f"step {self.step}, {f'rule {self.rule.name}' if self.rule else 'no plan'}", ""]
        lines += [*columns(header, [(s.name, _stage_cells(s)) for s in self.stages]), ""]
        cells = [
            (s.name, (f"{s.update:.3g}", f"{s.growth:.3g}x", f"{s.gradient_alignment:+.3f}")) for s in self.streams
        ]
        lines += columns(("residual stream", "update/h0", "size/h0", "gradient alignment"), cells)
        lines += ["", f"function: update/f0 {self.function:.3g}", ""]
        if self.beside is not None:
            lines += [str(self.beside), ""]
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
    rows: list[Row],
    plan: Plan | None,
    base: list[Row] | None,
    family: Family,
    predicted: Sequence[list[Row]] | None = None,
) -> Report:
    """Sums up the last record among a monitor's rows.

    Args:
        rows: of one monitor, with at least one record.
        plan: of the model, ``None`` without one.
        base: the rows of the base run, which must hold the same step, or ``None``.
        family: the optimizer's family.
        predicted: rows of each seed of a prediction, or ``None``.

    Raises:
        MeasurementError: nothing was recorded, or the base run or the prediction has no record at that step.
    """
    if not rows:
        raise MeasurementError("nothing was recorded yet. Call monitor.record(step) after a training step")
    step = rows[-1]["step"]
    last, last_of_base = _at(rows, step), _base_at(base, step)
    stages = tuple(_stages(last, last_of_base, plan, family))
    streams = tuple(_streams(last))
    function = next(row for row in last if row["kind"] == "function")
    moved = _over(function["update"], function["start"])
    rule = None if plan is None else plan.rule
    found = [*_not_finite(last)]
    if not found:
        found += [*_exploding(rows, last, last_of_base), *_collapsed(last), *_lazy(last, moved)]
        if not any(finding.kind == "untrained" for finding in found):
            found += [*_frozen(last), *_depth_findings(stages, rule, family)]
    if not {finding.kind for finding in found} & WRONG:
        found.append(_nothing_wrong(streams, moved, last_of_base is not None or _is_base(stages, rule)))
    compared = None if predicted is None else beside([rows], predicted)
    if compared is not None:
        found.append(Finding("agrees" if compared.agrees else "differs", "", compared.verdict))
    return Report(step, rule, stages, streams, moved, tuple(found), compared)


def _at(rows: Iterable[Row], step: int) -> list[Row]:
    """The rows of the last record made at a step."""
    found = [row for row in rows if row["step"] == step]
    starts = [i for i, row in enumerate(found) if row["kind"] == "function"]
    return found[starts[-1] :] if starts else []


def base_rows(base: Any) -> list[Row] | None:
    """The rows of a monitor or of its data frame; ``None`` of ``None``.

    Raises:
        MeasurementError: it is something else, or has no records.
    """
    if base is None:
        return None
    if not (hasattr(base, "rows") or hasattr(base, "to_dict")):
        raise MeasurementError(f"base must be a FeatureMonitor or its data frame, not {type(base).__name__}")
    rows: list[Row] = base.rows if hasattr(base, "rows") else base.to_dict("records")
    if not rows:
        raise MeasurementError("base has no records. Record at the same steps in the base run")
    return rows


def _base_at(rows: list[Row] | None, step: int) -> list[Row] | None:
    if rows is None:
        return None
    if found := _at(rows, step):
        return found
    steps = sorted({row["step"] for row in rows})
    raise MeasurementError(
        f"base has no record at step {step}, only at {', '.join(map(str, steps[-5:]))}. Learning at different steps "
        "cannot be compared: record at the same steps in both runs"
    )


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


def _streams(rows: list[Row]) -> Iterable[StreamMove]:
    for stream, members in _stream_rows(rows).items():
        last = members[-1]
        alignment = _mean(row["gradient_alignment"] for row in members)
        name = f"{stream}: {_prefix(members[0]['branch'])}, {last['additions']} additions"
        yield StreamMove(name, _over(last["update"], last["start"]), _growth(last), alignment)


def _growth(row: Row) -> float:
    return _over(row["size"], row["start"])


# Findings


def _not_finite(rows: list[Row]) -> Iterable[Finding]:
    # The function stands first among the rows and comes last in the network.
    broken = next((row for row in [*rows[1:], rows[0]] if not math.isfinite(row["size"])), None)
    if broken is not None:
        where = broken["layer"] or broken["branch"] or "the function"
        yield Finding("diverged", where, f"{where} is not finite at step {broken['step']}: diverged; lower the lr")


def _exploding(rows: list[Row], last: list[Row], base: list[Row] | None) -> Iterable[Finding]:
    before = _stream_rows(_at(rows, _halfway(rows)))
    in_base = {stream: max(map(_growth, members)) for stream, members in _stream_rows(base or []).items()}
    for stream, members in _stream_rows(last).items():
        worst = max(members, key=_growth)
        half = next((_growth(r) for r in before.get(stream, ()) if r["position"] == worst["position"]), 1.0)
        if _growth(worst) >= GROWN * in_base.get(stream, 1.0) and _growth(worst) >= FASTER * half:
            text = (
                f"the residual stream at {worst['branch']} is {_growth(worst):.3g}x its initial size and still grows: "
                "exploding; lower the lr"
            )
            yield Finding("exploding", worst["branch"], text)
        through = _over(members[-1]["start"], members[0]["start"])
        if through >= THROUGH:
            text = (
                f"the residual stream grows {through:.3g}x from {members[0]['branch']} to {members[-1]['branch']} at "
                "initialization: exploding; rule depth-mup-corrected or complete-p bounds it"
            )
            yield Finding("exploding", members[-1]["branch"], text)


def _halfway(rows: list[Row]) -> int:
    """The recorded step that is nearest to half of the last one."""
    steps = sorted({row["step"] for row in rows})
    return min(steps, key=lambda step: abs(2 * step - steps[-1]))


def _collapsed(rows: list[Row]) -> Iterable[Finding]:
    for members in _stream_rows(rows).values():
        alike = next((row for row in members if row["spread"] < ALIKE), None)
        if alike is not None:
            where = alike["branch"]
            text = (
                f"after {where} the features of all samples are alike to {alike['spread']:.1g} of their size: collapsed"
            )
            yield Finding("collapsed", where, text)


def _frozen(rows: list[Row]) -> Iterable[Finding]:
    groups = _grouped(rows)
    for (_, name, role), members in groups.items():
        still = [row["layer"] for row in members if row["weight_update"] == 0]
        if still:
            which = f"{len(still)} of {len(members)} {role} layers of {name}"
            text = f"{which} have not changed since initialization ({still[0]}): frozen; are they in the optimizer?"
            yield Finding("frozen", name, text)


def _is_base(stages: Iterable[Stage], rule: Rule | None) -> bool:
    """Whether the plan says that this is the base run itself, or one of nearly its depth."""
    known = rule is not None and rule.scales_depth
    return known and all(stage.base_additions is not None and stage.ratio < DEEPER for stage in stages)


def _nothing_wrong(streams: Iterable[StreamMove], moved: float, compared: bool) -> Finding:
    most = max(stream.update for stream in streams)
    text = (
        f"features and function move together (streams by up to {most:.0%} of their size, the function by {moved:.0%})"
    )
    if compared:
        return Finding("healthy", "", text + ": healthy")
    return Finding(
        "unknown", "", text + "; whether layers learn as much as in a shallow network is not known: pass base="
    )


def _depth_findings(stages: Iterable[Stage], rule: Rule | None, family: Family) -> Iterable[Finding]:
    for stage in stages:
        if stage.role == "inner" and stage.ratio >= DEEPER:
            finding = _measured(stage, rule, family) if stage.factor is not None else _expected(stage, rule, family)
            if finding is not None:
                yield finding


def _measured(stage: Stage, rule: Rule | None, family: Family) -> Finding | None:
    """Compares with the base run."""
    assert stage.factor is not None
    where, base = f"inner layers of {stage.name}", f"in the base of {stage.base_additions} additions"
    if not math.isfinite(stage.factor):
        return Finding(
            "unknown", stage.name, f"{where} did not learn in the base run: there is nothing to compare with"
        )
    if stage.factor <= 0:
        return Finding("collapse", stage.name, f"{where} learn nothing with {stage.additions} additions: collapse")
    exponent = math.log(stage.factor) / math.log(stage.ratio)
    if exponent < -EXPONENT:
        text = f"{where} learn {1 / stage.factor:.2g}x less than {base}: collapse"
        return Finding("collapse", stage.name, text + _why(stage, rule, family))
    more = "as much as" if 0.8 < stage.factor < 1.25 else f"{stage.factor:.2g}x what they learn"
    if exponent > EXPONENT:
        text = f"{where} learn {stage.factor:.2g}x what they learn {base}: exploding with depth"
        return Finding("exploding", stage.name, text + (f", not predicted for {rule.name}" if rule else ""))
    if rule is not None and rule.alpha > 0 and stage.exponent == 0:
        text = f"{where} learn {more} {base}: repaired by {rule.name}"
        return Finding("repaired", stage.name, text + _price(stage, rule, family))
    return None


def _expected(stage: Stage, rule: Rule | None, family: Family) -> Finding | None:
    """Without a base run there is only the rule to go by, and the text says so."""
    if rule is None or stage.exponent is None or stage.predicted is None or rule.alpha == 0:
        return None
    hint = "not measured: pass base= the base run's monitor"
    where = f"inner layers of {stage.name} should learn"
    beside = f"in the base of {stage.base_additions} additions under {rule.name} ({hint})"
    if stage.exponent < -EXPONENT:
        text = f"{where} {1 / stage.predicted:.2g}x less than {beside}; {_repair(rule, family)}"
    elif stage.exponent == 0:
        text = f"{where} as much as {beside}{_price(stage, rule, family)}"
    else:
        return None
    return Finding("predicted", stage.name, text)


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


def _lazy(rows: list[Row], function: float) -> Iterable[Finding]:
    if all(row["update"] == 0 for row in rows if row["kind"] != "layer"):
        yield Finding("untrained", "", "nothing has moved since initialization: record after training steps")
        return
    features = max(_over(row["update"], row["start"]) for row in rows if row["kind"] == "stream")
    if features < STILL and function > AHEAD * features:
        text = (
            f"the function moved by {function:.2g} of its size while the residual streams moved by {features:.2g}: "
            "lazy; the readout learns, features do not. Raise the lr of the branches, or lower the readout's scale"
        )
        yield Finding("lazy", "", text)
