"""Traced branches and a base -> a plan; and the refusals where none can be made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from torch_depthmup.errors import PlanError
from torch_depthmup.rules import Role, Rule, Width
from torch_depthmup.running import without_numbers
from torch_depthmup.scaling.plan import How, Plan, PlannedParameter, Stream
from torch_depthmup.tracing.branches import Branch, Trace, roles

__all__ = ["make_plan", "match_streams", "streams_at"]

WHOLE = 0.01  # how far from a whole number the base's additions may come out: multipliers are written rounded


def streams_at(branches: Sequence[Branch], depth_multiplier: float | None) -> tuple[Stream, ...]:
    """The streams with one depth multiplier for all of them; ``None`` is 1.

    Raises:
        PlanError: it is not a finite number of at least 1, or a stream's additions are not a multiple of it.
    """
    additions = {branch.stream: branch.additions for branch in branches}
    multiplier = 1.0 if depth_multiplier is None else depth_multiplier
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not math.isfinite(multiplier):
        raise PlanError(f"depth_multiplier must be a number, the depth over that of the base, not {multiplier!r}")
    if multiplier < 1:
        raise PlanError(
            f"depth_multiplier must be at least 1, not {multiplier!r}: it is the model's depth over that of the base, "
            "which is the shallow model one tunes on"
        )
    for stream, count in sorted(additions.items()):
        base = count / multiplier
        if round(base) < 1 or abs(base - round(base)) > WHOLE * round(base):
            raise PlanError(
                f"stream {stream} has {count} residual additions, and depth_multiplier={multiplier:g} would give "
                f"{base:.3g} in the base. Pass the shallow model itself, base=small_model, with at least one residual "
                "block in every stage"
            )
    return tuple(Stream(count, float(multiplier)) for _, count in sorted(additions.items()))


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
        additions, base_additions = (next(b.additions for b in group if b.stream == i) for group in (branches, base))
        if base_additions > additions:
            raise PlanError(
                f"stream {i}: the base is deeper ({base_additions} residual additions) than the model ({additions}). "
                "The base is the shallow model one tunes on; swap the two"
            )
        streams.append(Stream(additions, additions / base_additions))
    return tuple(streams)


def _kinds(branches: Sequence[Branch]) -> list[set[tuple[str, int]]]:
    """For each stream the kinds of its branches: names without numbers, and levels."""
    count = max((branch.stream for branch in branches), default=-1) + 1
    return [{(without_numbers(b.name), b.levels) for b in branches if b.stream == i} for i in range(count)]


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
    active = rule.scales_depth and any(stream.depth_multiplier != 1 for stream in streams)
    if active:
        _refuse_shared(trace, streams)
        _refuse_nested(trace, streams)
        _refuse_unreached(model, trace)
        if how == "fold":
            _refuse_without_carrier(trace, streams, rule)
    places = roles(trace.branches)
    folded: dict[str, float] = {}
    for branch in trace.branches if how == "fold" else ():
        multiplier = rule.branch_multiplier(streams[branch.stream].depth_multiplier)
        folded.update(dict.fromkeys(branch.carrier, multiplier))
    entries = []
    for name, _ in model.named_parameters():
        index, side = places.get(name, (None, None))
        role: Role = side or "outside"
        branch_ = None if index is None else trace.branches[index]
        ratio = streams[branch_.stream].depth_multiplier if branch_ else 1.0
        readout = (readouts or {}).get(name, 1.0)
        factor = folded.get(name, 1.0) * readout
        entries.append(
            PlannedParameter(
                name=name,
                role=role,
                branch=branch_.name if branch_ else None,
                depth_multiplier=ratio,
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
    place = f"{branch.position + 1} of {stream.additions}, base {stream.base_additions}"
    where = f"branch {branch.name or 'of the model'} ({place})"
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
    for traced in trace.traced:
        inside, outer = traced.nested, traced.branch
        if inside and streams[outer.stream].depth_multiplier != 1:
            raise PlanError(
                f"{outer.name}: the branch contains {len(inside)} residual branches of its own, such as "
                f"{trace.branches[inside[0]].name}, and both depths change. Scale one of the two: "
                f"exclude=['{outer.name}'], or a base in which the outer depth is the same"
            )


def _refuse_unreached(model: nn.Module, trace: Trace) -> None:
    inside = {without_numbers(name): trace.branches[i] for name, (i, _) in roles(trace.branches).items()}
    for name, _ in model.named_parameters(remove_duplicate=True):
        branch = inside.get(without_numbers(name))
        if name not in trace.reached and branch is not None:
            raise PlanError(
                f"{name} was not reached by the example inputs, while its like lies in branch {branch.name}. Pass "
                "example inputs that reach every part of the network (for a mixture of experts, more tokens)"
            )


def _refuse_without_carrier(trace: Trace, streams: tuple[Stream, ...], rule: Rule) -> None:
    for branch in trace.branches:
        if not branch.carrier and rule.branch_multiplier(streams[branch.stream].depth_multiplier) != 1:
            raise PlanError(
                f"{branch.name}: the branch is not linear in its last parameters (a gate, an activation or a "
                "reparametrized weight comes last), so its multiplier cannot be folded. Write how='wrap', or "
                f"exclude=['{branch.name.partition('#')[0] or '*'}']"
            )
