"""What no plan can be made for, in words."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import nn

from torch_depthmup.errors import PlanError
from torch_depthmup.running import without_numbers
from torch_depthmup.scaling import hooks
from torch_depthmup.scaling.copies import copied
from torch_depthmup.scaling.plan import Copy, How, PlannedBranch, Stream
from torch_depthmup.tracing.branches import Branch, Trace, roles
from torch_depthmup.tracing.choosing import is_matched

__all__ = [
    "OWN_MODULE",
    "can_fold",
    "can_wrap",
    "leave_alone",
    "not_linear",
    "refuse_impossible",
    "refuse_nested",
    "refuse_none",
    "refuse_shared",
    "refuse_unmatched",
    "refuse_unreached",
    "used_elsewhere",
]


def refuse_unmatched(base: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuses patterns that match in the model and not in the base."""
    for option, patterns in options.items():
        for pattern in [patterns] if isinstance(patterns, str | type) else patterns or ():
            if is_matched(base, pattern):
                continue
            wider = re.sub(r"\d+", "*", pattern) if isinstance(pattern, str) else pattern
            advice = "Pass a base that has such modules too"
            if is_matched(base, wider):
                advice = f"Write a pattern that holds in both: {option}=[{wider!r}]"
            raise PlanError(
                f"{option}=[{pattern!r}] matches modules of the model and none of the base, so the two would "
                f"be counted in different ways. {advice}"
            )


def refuse_none(model: nn.Module, trace: Trace) -> NoReturn:
    """Refuses a model without branches."""
    advice = "Name them: branches=['<module whose output is added to the skip>'], or write rule='mup'"
    if trace.functions:
        hidden = " or ".join(trace.functions[:3])
        advice = f"{hidden}, an autograd Function, may hide its sums: write them with + while branches are looked for"
    raise PlanError(f"{type(model).__name__} has no residual branches that could be found. {advice}")


def refuse_shared(trace: Trace) -> None:
    """Refuses weights that several branches share."""
    for name, users in trace.shared.items():
        raise PlanError(
            f"{name} is used by {len(users)} branches ({', '.join(users[:4])}) or by a branch and the rest of the "
            "network: with tied weights no rule gives its learning rate. Untie it, or leave these branches alone: "
            f"exclude={sorted({user.partition('#')[0] or '*' for user in users})[:4]}"
        )


def refuse_nested(trace: Trace, streams: tuple[Stream, ...]) -> None:
    """Refuses branches that hold branches, where both depths change."""
    for traced in trace.traced:
        outer = traced.branch
        inside = [i for i in traced.nested if streams[trace.branches[i].stream].depth_multiplier != 1]
        if inside and streams[outer.stream].depth_multiplier != 1:
            raise PlanError(
                f"{outer.name}: the branch contains {len(inside)} residual branches of its own, such as "
                f"{trace.branches[inside[0]].name}, and both depths change. Change one of the two: pass a base in "
                "which the outer depth, or that of the streams inside, is the model's"
            )


def refuse_unreached(model: nn.Module, trace: Trace, copies: Sequence[Copy]) -> None:
    """Refuses parameters that the example inputs did not reach and that belong into a branch, such as experts."""
    inside = {without_numbers(name): trace.branches[i] for name, (i, _) in roles(trace.branches).items()}
    for name, _ in model.named_parameters(remove_duplicate=True):
        branch = inside.get(without_numbers(name))
        if name not in trace.reached and branch is not None and copied(name, copies) is None:
            raise PlanError(
                f"{name} was not reached by the example inputs, while its like lies in branch {branch.name}. Pass "
                "example inputs that reach every part of the network (for a mixture of experts, more tokens)"
            )


OWN_MODULE = (
    "Let each such addition take what a module of its own returns, x + self.out(branch) with self.out = nn.Identity() "
    "made in __init__, and write how='wrap'"
)


def refuse_impossible(model: nn.Module, planned: Sequence[PlannedBranch], found: Trace, how: How) -> None:
    """Refuses branches whose multiplier can be put nowhere in this way, and says in which it can."""
    for i, branch in enumerate(planned):
        why = "" if branch.supplied == 1 else (_not_foldable if how == "fold" else _not_wrappable)(model, found, i)
        if why:
            if how == "fold":
                advice = "Write how='wrap'" if can_wrap(model, planned, found) else OWN_MODULE
            else:
                advice = "Write how='fold'" if can_fold(planned, found) else OWN_MODULE
            name = branch.branch.name
            raise PlanError(f"{name or 'the model'}: {why}. {advice}{leave_alone(found, name)}")


def can_fold(planned: Sequence[PlannedBranch], found: Trace) -> bool:
    """Whether every multiplier that is missing has weights of its own to be folded into."""
    return not any(
        b.supplied != 1 and (not b.branch.carrier or found.traced[i].is_tapped) for i, b in enumerate(planned)
    )


def can_wrap(model: nn.Module, planned: Sequence[PlannedBranch], found: Trace) -> bool:
    """Whether every multiplier that is missing has a module to be hung on."""
    return not any(b.supplied != 1 and hooks.targets(model, found, i) is None for i, b in enumerate(planned))


def _not_foldable(model: nn.Module, found: Trace, i: int) -> str:
    branch = found.branches[i]
    return not_linear(branch) or (used_elsewhere(branch, "fold") if found.traced[i].is_tapped else "")


def not_linear(branch: Branch) -> str:
    """Why no parameter can carry a branch's multiplier; empty where some can."""
    if branch.carrier:
        return ""
    if not branch.inner and not branch.outer:
        return "the branch has no parameters of its own, so its multiplier cannot be folded"
    return (
        "the branch is not linear in its last parameters (a gate, an activation or a reparametrized weight comes "
        "last), so its multiplier cannot be folded"
    )


def _not_wrappable(model: nn.Module, found: Trace, i: int) -> str:
    branch = found.branches[i]
    if hooks.targets(model, found, i) is not None:
        return ""
    return (
        f"no module returns the value of branch {branch.position} of stream {branch.stream}, and of nothing else, so "
        "there is nothing to wrap"
    )


def used_elsewhere(branch: Branch, how: How) -> str:
    """What to say of a branch whose multiplier would reach more than the addition."""
    carrier = f" {', '.join(branch.carrier)}" if how == "fold" else ""
    return (
        f"what its last weights{carrier} give is used for something else besides the residual addition (returned, or "
        f"added elsewhere), and how={how!r} would scale that too"
    )


def leave_alone(found: Trace, name: str) -> str:
    """How to leave branches of this kind out, as the end of an advice; empty where that would leave no branch."""
    pattern = without_numbers(name).replace("#", "*")
    others = [b.name for b in found.branches if not any(fnmatch.fnmatchcase(o, pattern) for o in _path(b.name))]
    return f", or leave such branches alone: exclude=['{pattern}']" if pattern and others else ""


def _path(name: str) -> list[str]:
    """A module and all those above it."""
    parts = name.partition("#")[0].split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
