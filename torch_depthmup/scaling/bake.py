"""From one way of carrying the multipliers to another: a wrapped model -> a plain one, fold's checkpoints -> wrap's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.errors import MeasurementError, PlanError
from torch_depthmup.running import main_output, normalise_name, quiet, trial
from torch_depthmup.scaling.checkpoints import converted
from torch_depthmup.scaling.copies import copied
from torch_depthmup.scaling.hooks import hang, hang_again, take_off
from torch_depthmup.scaling.plan import Plan
from torch_depthmup.scaling.refusals import not_linear
from torch_depthmup.scaling.registry import forget, owner_of, plan_of, refuse_replaced

__all__ = ["bake", "convert_state_dict"]

TOLERANCE = 1000  # in units of the dtype's rounding error: the factors are rounded in every layer
COARSEST = 0.02


@torch.no_grad()
def bake(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Folds a wrapped model's multipliers into its weights, in place: what is left is a plain model.

    For after training: train with ``how="wrap"`` where gradients are looked at, and keep a model that needs no package.
    The plan is taken off, so the result is not for further training. A readout that is tied to an embedding keeps its
    multiplier's hook, and its model needs this package to be unpickled: a weight cannot be scaled for one of its users.

    Args:
        model: a model parametrized with ``how="wrap"``, or a wrapper around it; trained or not.
        example_inputs: where given, the outputs before and after are compared.

    Returns:
        The same model.

    Raises:
        PlanError: the model is not wrapped, or a branch is not linear in its last parameters.
        MeasurementError: the outputs differ. The model is as it was.

    >>> import torch, torch_depthmup as dm
    >>> block = lambda: dm.Residual(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)))
    >>> model, x = torch.nn.Sequential(*[block() for _ in range(8)]), torch.randn(2, 4)
    >>> _ = dm.parametrize(model, depth_multiplier=4, example_inputs=x, how="wrap")
    >>> before = model(x)
    >>> torch.allclose(dm.bake(model)(x), before)
    True
    """
    owner, plan = owner_of(model), plan_of(model)
    if plan.how != "wrap":
        raise PlanError("this model is folded, so its multipliers are in its weights already: there is nothing to bake")
    multipliers = {planned.branch.name: planned.supplied for planned in plan.planned_branches}
    for branch in plan.branches:
        if multipliers[branch.name] != 1.0 and (why := not_linear(branch)):
            raise PlanError(f"{branch.name}: {why}. Keep the hooks; the model works as it is")
    parameters = {plan[name].name: p for name, p in owner.named_parameters() if _is_planned(plan, name)}
    factors = {name: multipliers[b.name] for b in plan.branches for name in b.carrier}
    for entry in plan.entries:
        original = copied(entry.name, plan.copies)
        if original in factors:
            factors[entry.name] = factors[original]
    carriers = [(parameters[name], factor) for name, factor in factors.items()]
    refuse_replaced(parameter for parameter, _ in carriers)
    before = _outputs(owner, example_inputs)
    saved = [parameter.detach().clone() for parameter, _ in carriers] if before is not None else []
    for parameter, m in carriers:
        parameter.mul_(m)
    taken = take_off(owner)
    hang(owner, [hook for hook in plan.hooks if hook.branch is None])  # of tied readouts
    if before is not None and not _same(before, after := _outputs(owner, example_inputs)):
        for (parameter, _), value in zip(carriers, saved, strict=True):
            parameter.copy_(value)
        take_off(owner)
        take_off(owner)
        hang_again(taken)
        assert after is not None
        raise MeasurementError(
            f"the outputs differ by {float((after - before).norm() / before.norm()):.2g} of their size. The model is "
            "as it was. Keep the hooks; the model works with them"
        )
    forget(owner)
    return model


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module, plan: Plan | None = None) -> dict[str, Any]:
    """A checkpoint of a folded model for a wrapped one, and back: values with the multipliers that the model expects.

    Parametrized models note in the metadata of their state_dicts which multipliers the values contain, and refuse to
    load values that contain others. The metadata is lost where a state_dict is copied key by key. An optimizer's state
    is not converted: its moments belong to the other weights.

    Args:
        state_dict: of a model of the same plan but for ``how``; it is left as it is.
        model: the parametrized model that is to load it, or a wrapper around it.
        plan: that of the model which saved it, where the state_dict has no metadata.

    Returns:
        The converted state_dict.

    Raises:
        PlanError: nothing tells what the values contain, or the branches had other multipliers.

    >>> import torch, torch_depthmup as dm
    >>> block = lambda: dm.Residual(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)))
    >>> folded, wrapped = (torch.nn.Sequential(*[block() for _ in range(8)]) for _ in range(2))
    >>> x = torch.randn(2, 4)
    >>> _ = dm.parametrize(folded, depth_multiplier=4, example_inputs=x)
    >>> _ = dm.parametrize(wrapped, depth_multiplier=4, example_inputs=x, how="wrap")
    >>> wrapped.load_state_dict(dm.convert_state_dict(folded.state_dict(), wrapped))
    <All keys matched successfully>
    >>> torch.allclose(wrapped(x), folded(x))
    True
    """
    owner = owner_of(model)
    path = next(name for name, module in model.named_modules() if module is owner)
    prefix = normalise_name(f"{path}.x").removesuffix("x") if path else ""
    return converted(state_dict, plan_of(model), plan, prefix)


def _is_planned(plan: Any, name: str) -> bool:
    try:
        plan[name]
    except PlanError:
        return False
    return True


def _outputs(model: nn.Module, example_inputs: Any) -> Tensor | None:
    if example_inputs is None:
        return None
    with quiet(model), torch.no_grad():
        return main_output(trial(model, example_inputs)).detach().clone()


def _same(before: Tensor, after: Tensor | None) -> bool:
    assert after is not None
    tolerance = min(COARSEST, TOLERANCE * torch.finfo(before.dtype).eps)
    return bool((after - before).norm() <= tolerance * before.norm())
