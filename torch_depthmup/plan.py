"""The plan: what will be scaled by how much, and why. Data that prints, compares, and goes to JSON and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from torch_depthmup import rules
from torch_depthmup.errors import PlanError
from torch_depthmup.graph import normalise_name
from torch_depthmup.rules import Family, Multipliers, Role, Rule, Width
from torch_depthmup.tracing import Branch, Trace

__all__ = ["How", "Plan", "PlannedParameter", "Stream", "make_plan", "match_streams", "streams_at"]

How = Literal["fold", "wrap"]
FORMAT = 1


@dataclass(frozen=True)
class Stream:
    """A residual stream's depth (number of residual additions) beside that of its base."""

    depth: int
    base_depth: int

    @property
    def ratio(self) -> float:
        """``depth / base_depth``."""
        return self.depth / self.base_depth


@dataclass(frozen=True)
class PlannedParameter:
    """What a plan says of one parameter.

    Args:
        name: the parameter's name in the model.
        role: ``"outside"`` of every branch, ``"inner"`` or ``"outer"``.
        branch: name of its branch, or ``None``.
        depth_ratio: depth ratio of its stream; 1 outside.
        folded: the forward multiplier that its value now contains, 1 where there is none.
        scale: the factor on its value at initialization.
        width: its dimensions beside its base's, or ``None`` without width scaling.
        reason: the role in words.
    """

    name: str
    role: Role
    branch: str | None
    depth_ratio: float
    folded: float
    scale: float
    width: Width | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every branch and every parameter of a model with its multipliers and the reason. Made by `parametrize`.

    ``print(plan)`` gives a table; `explain` a parameter's story; `multipliers` its numbers; `to_json` and `from_json`
    carry a plan between runs.
    """

    rule: Rule
    how: How
    streams: tuple[Stream, ...]
    branches: tuple[Branch, ...]
    entries: tuple[PlannedParameter, ...]

    @cached_property
    def parameters(self) -> Mapping[str, PlannedParameter]:
        """The planned parameters by name."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def _normalised(self) -> dict[str, PlannedParameter]:
        return {normalise_name(entry.name): entry for entry in self.entries}

    def branch_multiplier(self, branch: Branch) -> float:
        """The factor m on the branch's value."""
        return self.rule.branch_multiplier(self.streams[branch.stream].ratio)

    def __getitem__(self, name: str) -> PlannedParameter:
        """The planned parameter of that name; wrappers' and parametrizations' prefixes do not matter.

        Raises:
            PlanError: the plan has no such parameter.
        """
        found = self.parameters.get(name) or self._normalised.get(normalise_name(name))
        if found is None:
            close = [known for known in self.parameters if known.rpartition(".")[0] == name][:3]
            hint = f". Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise PlanError(
                f"the plan has no parameter {name!r}{hint or '. See plan.parameters'}. One that was added after "
                "dm.parametrize has no plan: add it before"
            )
        return found

    def multipliers(self, name: str, family: str | Family, *, adjust_lr: str | None = None) -> Multipliers:
        """Factors on learning rate, weight decay and eps of one parameter under one optimizer family.

        Args:
            name: the parameter.
            family: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"muon"``, ``"adafactor"``, or a `Family`.
            adjust_lr: Muon's ``adjust_lr_fn``.

        Raises:
            PlanError: the plan has no such parameter.
            OptimizerError: the family is unknown, or cannot train what the plan did.
        """
        entry, family = self[name], rules.get_family(family)
        return (
            rules.depth_multipliers(self.rule, family, entry.role, entry.depth_ratio)
            * rules.fold_multipliers(family, entry.folded)
            * rules.width_multipliers(self.rule, family, entry.width, adjust_lr=adjust_lr)
        )

    def explain(self, name: str) -> str:
        """A parameter's role, its reason and its multipliers, in a few lines.

        Raises:
            PlanError: the plan has no such parameter.
        """
        entry = self[name]
        lines = [f"{entry.name}: {entry.role}", f"  {entry.reason}"]
        if entry.scale != 1.0:
            lines.append(f"  its value at initialization is multiplied by {entry.scale:.6g}")
        if entry.folded != 1.0:
            lines.append(
                f"  it contains a forward multiplier of {entry.folded:.6g}; the numbers below make up for that"
            )
        if entry.width is not None and entry.width.infinite:
            lines.append(
                f"  width: shape {entry.width.dims}, base {entry.width.base}, {entry.width.multiplier:g} x base"
            )
        for family in ("sgd", "adam", "adamw"):
            m = self.multipliers(entry.name, family)
            lines.append(f"  {family:<6} lr x {m.lr:<10.6g} weight_decay x {m.weight_decay:<10.6g} eps x {m.eps:.6g}")
        return "\n".join(lines)

    def to_json(self, *, indent: int | None = 1) -> str:
        """The plan as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the text is not such a plan.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(f"this plan has format {data['format']}, this version of torch_depthmup reads {FORMAT}")
            return cls(
                rule=Rule(**data["rule"]),
                how=data["how"],
                streams=tuple(Stream(**stream) for stream in data["streams"]),
                branches=tuple(Branch(**{k: _tuples(v) for k, v in branch.items()}) for branch in data["branches"]),
                entries=tuple(
                    PlannedParameter(**{**entry, "width": _width(entry["width"])}) for entry in data["entries"]
                ),
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a plan written by Plan.to_json: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        from torch_depthmup.printing import table

        return table(self)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _width(data: dict[str, Any] | None) -> Width | None:
    return None if data is None else Width(tuple(data["dims"]), tuple(data["base"]), data["main"])


def streams_at(branches: Sequence[Branch], base_depth: int | None) -> tuple[Stream, ...]:
    """The streams with a base depth given as a number; ``None`` is the depth itself.

    Raises:
        PlanError: the number is not a positive integer, is larger than the depth, or is given for several streams.
    """
    depths = {branch.stream: branch.depth for branch in branches}
    if base_depth is None:
        return tuple(Stream(depths[i], depths[i]) for i in sorted(depths))
    if isinstance(base_depth, bool) or not isinstance(base_depth, int) or base_depth < 1:
        raise PlanError(f"base_depth must be a positive integer, the number of residual additions, not {base_depth!r}")
    if len(set(depths.values())) > 1:
        raise PlanError(
            f"the model has {len(depths)} residual streams of depths {[depths[i] for i in sorted(depths)]}, so one "
            "base_depth does not say which. Pass the shallow model: base=small_model"
        )
    for depth in depths.values():
        if base_depth > depth:
            raise PlanError(
                f"base_depth={base_depth} is deeper than the model, whose stream has {depth} residual additions. "
                "base_depth counts additions (a transformer layer has two); the base is the model one tunes on"
            )
    return tuple(Stream(depths[i], base_depth) for i in sorted(depths))


def match_streams(branches: Sequence[Branch], base: Sequence[Branch]) -> tuple[Stream, ...]:
    """The streams beside those of a base model.

    Raises:
        PlanError: the base has other streams or other kinds of branches, or is deeper.
    """
    if not base:
        raise PlanError("the base model has no residual branches. Pass the shallow model of the same family")
    ours, theirs = _kinds(branches), _kinds(base)
    if len(ours) != len(theirs):
        raise PlanError(
            f"the model has {len(ours)} residual streams and the base {len(theirs)}: another family. Build both with "
            "the same code, so that every stage has at least one residual block in the base"
        )
    streams = []
    for i, (kinds, base_kinds) in enumerate(zip(ours, theirs, strict=True)):
        if {kind[1:] for kind in kinds} != {kind[1:] for kind in base_kinds} or not kinds & base_kinds:
            unlike = sorted(f"{name or 'root'} ({levels} levels)" for name, levels in kinds ^ base_kinds)
            raise PlanError(f"stream {i}: the base is of another family; only one of the two has {', '.join(unlike)}")
        depth, base_depth = (next(b.depth for b in group if b.stream == i) for group in (branches, base))
        if base_depth > depth:
            raise PlanError(
                f"stream {i}: the base is deeper ({base_depth} residual additions) than the model ({depth}). The base "
                "is the shallow model one tunes on; swap the two"
            )
        streams.append(Stream(depth, base_depth))
    return tuple(streams)


def _kinds(branches: Sequence[Branch]) -> list[set[tuple[str, int]]]:
    """For each stream the kinds of its branches: names without numbers, and levels."""
    count = max((branch.stream for branch in branches), default=-1) + 1
    return [{(re.sub(r"\d+", "", b.name), b.levels) for b in branches if b.stream == i} for i in range(count)]


def make_plan(
    model: nn.Module,
    trace: Trace,
    streams: tuple[Stream, ...],
    rule: Rule,
    how: How = "fold",
    *,
    widths: Mapping[str, Width] | None = None,
    scales: Mapping[str, float] | None = None,
    readouts: Mapping[str, float] | None = None,
) -> Plan:
    """The plan for a traced model. Changes nothing, and works on ``meta``.

    Args:
        model: the traced model.
        trace: what `tracing.trace` returned for it.
        streams: depths and base depths, from `streams_at` or `match_streams`.
        rule: the exponents.
        how: ``"fold"`` or ``"wrap"``.
        widths: each parameter's dimensions beside its base's.
        scales: width's factors on values at initialization.
        readouts: width's forward multipliers, folded into readouts.

    Raises:
        PlanError: a scaled branch shares its weights with others, contains another scaled stream, has no carrier to
            fold into, or has siblings that the example inputs did not reach.
    """
    active = rule.scales_depth and any(stream.ratio != 1 for stream in streams)
    if active:
        _refuse_shared(trace, streams)
        _refuse_nested(trace, streams)
        _refuse_unreached(model, trace)
        if how == "fold":
            _refuse_without_carrier(trace, streams, rule)
    places: dict[str, tuple[Role, Branch]] = {}
    folded: dict[str, float] = {}
    for branch in trace.branches:
        places.update({name: ("inner", branch) for name in branch.inner})
        places.update({name: ("outer", branch) for name in branch.outer})
        if how == "fold":
            multiplier = rule.branch_multiplier(streams[branch.stream].ratio)
            folded.update(dict.fromkeys(branch.carrier, multiplier))
    entries = []
    for name, _ in model.named_parameters():
        place = places.get(name)
        role: Role = place[0] if place else "outside"
        branch_ = place[1] if place else None
        ratio = streams[branch_.stream].ratio if branch_ else 1.0
        readout = (readouts or {}).get(name, 1.0)
        factor = folded.get(name, 1.0) * readout
        entries.append(
            PlannedParameter(
                name=name,
                role=role,
                branch=branch_.name if branch_ else None,
                depth_ratio=ratio,
                folded=factor,
                scale=factor * (scales or {}).get(name, 1.0),
                width=(widths or {}).get(name),
                reason=_reason(name, role, branch_, streams, trace),
            )
        )
    return Plan(rule, how, streams, trace.branches, tuple(entries))


def _reason(name: str, role: Role, branch: Branch | None, streams: tuple[Stream, ...], trace: Trace) -> str:
    if branch is None:
        if name in trace.shared:
            return f"shared by the branches {', '.join(trace.shared[name][:4])}: depth multiplier 1"
        if name not in trace.reached:
            return "not reached by the example inputs: depth multiplier 1"
        return "outside every residual branch, or used by several: depth multiplier 1"
    stream = streams[branch.stream]
    where = (
        f"branch {branch.name or 'of the model'} ({branch.position + 1} of {stream.depth}, base {stream.base_depth})"
    )
    if role == "inner":
        return f"before the outer weight operation of {where}"
    carries = "; it carries the branch" if name in branch.carrier else ""
    return f"at or after the outer weight operation of {where}{carries}"


def _refuse_shared(trace: Trace, streams: tuple[Stream, ...]) -> None:
    for name, users in trace.shared.items():
        raise PlanError(
            f"{name} is used by {len(users)} branches ({', '.join(users[:4])}) or by a branch and the rest of the "
            "network: with tied weights no rule gives its learning rate. Untie it, or leave these branches alone: "
            f"exclude={sorted({user.partition('#')[0] or '*' for user in users})[:4]}"
        )


def _refuse_nested(trace: Trace, streams: tuple[Stream, ...]) -> None:
    for i, inside in enumerate(trace.contains):
        outer = trace.branches[i]
        if inside and streams[outer.stream].ratio != 1:
            raise PlanError(
                f"{outer.name}: the branch contains {len(inside)} residual branches of its own, such as "
                f"{trace.branches[inside[0]].name}, and both depths change. Scale one of the two: "
                f"exclude=['{outer.name}'], or a base in which the outer depth is the same"
            )


def _refuse_unreached(model: nn.Module, trace: Trace) -> None:
    inside = {re.sub(r"\d+", "{}", name): b for b in trace.branches for name in (*b.inner, *b.outer)}
    for name, _ in model.named_parameters(remove_duplicate=True):
        branch = inside.get(re.sub(r"\d+", "{}", name))
        if name not in trace.reached and branch is not None:
            raise PlanError(
                f"{name} was not reached by the example inputs, while its like lies in branch {branch.name}. Pass "
                "example inputs that reach every part of the network (for a mixture of experts, more tokens)"
            )


def _refuse_without_carrier(trace: Trace, streams: tuple[Stream, ...], rule: Rule) -> None:
    for branch in trace.branches:
        if not branch.carrier and rule.branch_multiplier(streams[branch.stream].ratio) != 1:
            raise PlanError(
                f"{branch.name}: the branch is not linear in its last parameters (a gate, an activation or a "
                "reparametrized weight comes last), so its multiplier cannot be folded. Write how='wrap', or "
                f"exclude=['{branch.name.partition('#')[0] or '*'}']"
            )
