"""Measures that a plan was carried out, and says what to write where it was not: that is tried before it is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from torch_depthmup.errors import MeasurementError
from torch_depthmup.scaling.hooks import branch_hooks, hooked, targets
from torch_depthmup.scaling.plan import Hook, Plan
from torch_depthmup.scaling.planning import Seen
from torch_depthmup.scaling.refusals import OWN_MODULE, can_fold, can_wrap, leave_alone, used_elsewhere
from torch_depthmup.scaling.verify import Differences, Measured, differences, measured, scaled

__all__ = ["check_carried_out"]


def check_carried_out(model: nn.Module, plan: Plan, seen: Seen, carriers: Mapping[str, tuple[Tensor, float]]) -> None:
    """Measures that the multipliers do to branches and outputs what they should, and takes them off again.

    Args:
        model: with the values that its branches have without multipliers.
        plan: with the multipliers that are missing.
        seen: the model's forward pass.
        carriers: the parameters to fold into, by name, with their factors.

    Raises:
        MeasurementError: it names the first branch that is wrong, and what to write.
    """
    before = measured(model, seen.inputs, seen.found)
    supplied = [branch.supplied for branch in plan.planned_branches]
    hung = [hook for hook in plan.hooks if hook.branch is not None and not hook.is_copy]
    wrong = _with(model, seen, before, supplied, carriers.values(), hung)
    if wrong:
        raise MeasurementError(_named(model, plan, seen, before, carriers, wrong))


def _with(
    model: nn.Module,
    seen: Seen,
    before: Measured,
    multipliers: Sequence[float],
    multiplied: Iterable[tuple[Tensor, float]],
    hung: Sequence[Hook],
) -> Differences:
    """What differs from what these multipliers should do, with them in weights or on modules."""
    with scaled(multiplied), hooked(model, hung):
        return differences(model, seen.inputs, seen.found, before, multipliers)


def _named(
    model: nn.Module,
    plan: Plan,
    seen: Seen,
    before: Measured,
    carriers: Mapping[str, tuple[Tensor, float]],
    wrong: Differences,
) -> str:
    """What to say of a network that is not as planned: the first branch that alone makes it so, and the way out."""
    found, planned = seen.found, plan.planned_branches
    for i, branch in enumerate(plan.branches):
        alone = [carriers[name] for name in branch.carrier if name in carriers]
        hung = [hook for hook in plan.hooks if hook.branch == i and not hook.is_copy]
        if not alone and not hung:
            continue
        modules = {hook.module for hook in hung}
        served = {j for j in range(len(planned)) if modules & {name for name, _ in targets(model, found, j) or ()}}
        multipliers = [p.supplied if j == i or j in served else 1.0 for j, p in enumerate(planned)]
        seen_alone = _with(model, seen, before, multipliers, alone, hung)
        advice = f"The model is as it was. {_other_way(model, plan, seen, before)}{leave_alone(found, branch.name)}"
        if i in seen_alone.branches:
            return (
                f"{seen_alone.branches[i]}. What lies between its last weights and the addition is not linear. {advice}"
            )
        if seen_alone:
            reached = seen_alone.output or f"branch {found.branches[min(seen_alone.branches)].name}"
            return (
                f"{branch.name}: {used_elsewhere(branch, plan.how)}: {reached} is not what it would be with each "
                f"branch multiplied where it is added. {advice}"
            )
    what = wrong.output or next(iter(wrong.branches.values()))
    return (
        f"{what} is not what it would be with each branch multiplied where it is added, though each branch alone is "
        "right: branches share what carries their multipliers. The model is as it was. Exclude one of them"
    )


def _other_way(model: nn.Module, plan: Plan, seen: Seen, before: Measured) -> str:
    """``fold`` instead of ``wrap`` or the other way round, where that measures right; else a module of its own."""
    found, planned = seen.found, plan.planned_branches
    multipliers = [branch.supplied for branch in planned]
    parameters = dict(model.named_parameters())
    folded: dict[str, tuple[Tensor, float]] = {}
    hung: tuple[Hook, ...] = ()
    if plan.how == "fold" and can_wrap(model, planned, found):
        hung = branch_hooks(model, planned, found)
    elif plan.how == "wrap" and can_fold(planned, found):
        folded = {name: (parameters[name], p.supplied) for p in planned for name in p.branch.carrier}
    if (hung or folded) and not _with(model, seen, before, multipliers, folded.values(), hung):
        return f"Write how={'wrap' if hung else 'fold'!r}"
    return OWN_MODULE
