"""The residual streams of a model beside those of its base: how many additions, and how many times as many."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch_depthmup.errors import PlanError
from torch_depthmup.running import without_numbers
from torch_depthmup.scaling.plan import Stream
from torch_depthmup.tracing.branches import Branch, Trace

__all__ = ["are_alike", "match_streams", "streams_at"]

Kinds = set[tuple[str, int]]

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


def match_streams(found: Trace, base: Trace) -> tuple[Stream, ...]:
    """The streams beside those of a base model.

    Raises:
        PlanError: the base has other streams or other kinds of branches, or is deeper.
    """
    if not base.branches:
        raise PlanError("the base model has no residual branches. Pass the shallow model of the same family")
    ours, theirs = _kinds(found), _kinds(base)
    streams = []
    for i, j in enumerate(_counterparts(found, base, ours, theirs)):
        kinds, base_kinds = ours[i], theirs[j]
        if {kind[1:] for kind in kinds} != {kind[1:] for kind in base_kinds} or not kinds & base_kinds:
            raise PlanError(f"stream {i}: the base is of another family: {_difference(kinds, base_kinds)}")
        additions, base_additions = _additions(found, i), _additions(base, j)
        if base_additions > additions:
            raise PlanError(
                f"stream {i}: the base is deeper ({base_additions} residual additions) than the model ({additions}). "
                "The base is the shallow model one tunes on; swap the two"
            )
        streams.append(Stream(additions, additions / base_additions))
    return tuple(streams)


def are_alike(found: Trace, base: Trace) -> bool:
    """Whether the base has the same streams and kinds of branches."""
    try:
        return bool(match_streams(found, base))
    except PlanError:
        return False


def _counterparts(found: Trace, base: Trace, ours: list[Kinds], theirs: list[Kinds]) -> list[int]:
    """The base's stream for each of the model's, in order; of streams inside of branches it may have fewer."""
    inside, base_inside = _inside(found), _inside(base)
    tops = [j for j in range(len(theirs)) if j not in base_inside]
    if len(ours) - len(inside) != len(tops):
        if len(ours) > len(theirs) and all(kinds in theirs for kinds in ours):
            raise PlanError(
                f"the model has {len(ours)} residual streams and the base {len(theirs)}, of the same branches: layers "
                "without a skip end each stream, so that depth adds streams and makes none longer, and no rule is "
                "known for that. Write rule='mup', which scales width alone"
            )
        raise PlanError(
            f"the model has {len(ours)} residual streams and the base {len(theirs)}: another family. Build both with "
            "the same code, so that every stage has at least one residual block in the base"
        )
    found_for = []
    for i, kinds in enumerate(ours):
        if i not in inside:
            found_for.append(tops.pop(0))
            continue
        alike = [j for j in sorted(base_inside) if kinds & theirs[j]]
        before = sum(k in inside and bool(ours[k] & kinds) for k in range(i))
        if not alike:
            raise PlanError(
                f"stream {i}, inside of branches of the model, has no counterpart in the base: "
                f"{', '.join(sorted(name for name, _ in kinds))}. Build both with the same code, so that every stage "
                "has at least one residual block in the base"
            )
        found_for.append(alike[min(before, len(alike) - 1)])
    return found_for


def _inside(found: Trace) -> set[int]:
    """The streams that lie inside of branches."""
    return {found.branches[i].stream for outer in found.traced for i in outer.nested}


def _additions(found: Trace, stream: int) -> int:
    return next(b.additions for b in found.branches if b.stream == stream)


def _kinds(found: Trace) -> list[Kinds]:
    """For each stream the kinds of its branches: names without numbers, and levels.

    The levels of a branch with a stream inside are not told: they grow with that stream.
    """
    count = max((branch.stream for branch in found.branches), default=-1) + 1
    kinds: list[Kinds] = [set() for _ in range(count)]
    for traced in found.traced:
        branch = traced.branch
        kinds[branch.stream].add((without_numbers(branch.name), 0 if traced.nested else branch.levels))
    return kinds


def _difference(kinds: Kinds, base_kinds: Kinds) -> str:
    levels, base_levels = ({level for _, level in group} for group in (kinds, base_kinds))
    if levels != base_levels:
        ours, theirs = (" or ".join(map(str, sorted(group))) for group in (levels, base_levels))
        return (
            f"branches have {ours} weight layers in the model and {theirs} in the base. Build both from the same "
            "kind of block"
        )
    names = sorted(name or "the model itself" for name, _ in kinds ^ base_kinds)
    return f"only one of the two has branches called {', '.join(names)}. Build both with the same code"
