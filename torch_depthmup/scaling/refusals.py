"""What no plan can be made for, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from torch_depthmup.errors import PlanError
from torch_depthmup.running import without_numbers
from torch_depthmup.scaling.copies import copied
from torch_depthmup.scaling.plan import Copy, PlannedBranch, Stream
from torch_depthmup.tracing.branches import Trace, roles

__all__ = ["refuse_nested", "refuse_shared", "refuse_unreached", "refuse_without_carrier"]


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
        inside, outer = traced.nested, traced.branch
        if inside and streams[outer.stream].depth_multiplier != 1:
            raise PlanError(
                f"{outer.name}: the branch contains {len(inside)} residual branches of its own, such as "
                f"{trace.branches[inside[0]].name}, and both depths change. Scale one of the two: "
                f"exclude=['{outer.name}'], or a base in which the outer depth is the same"
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


def refuse_without_carrier(branches: Iterable[PlannedBranch]) -> None:
    """Refuses branches that have nothing to fold a multiplier into."""
    for planned in branches:
        name = planned.branch.name
        if not planned.branch.carrier and planned.supplied != 1:
            raise PlanError(
                f"{name}: the branch is not linear in its last parameters (a gate, an activation or a "
                "reparametrized weight comes last), so its multiplier cannot be folded. Write how='wrap', or "
                f"exclude=['{name.partition('#')[0] or '*'}']"
            )
