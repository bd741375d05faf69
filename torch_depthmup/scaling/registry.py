"""Which live modules have which plan: found again by name, after copies and replacements."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from torch_depthmup.errors import PlanError
from torch_depthmup.scaling.plan import Plan

__all__ = ["ATTRIBUTE", "Handle", "owner_of", "owners", "plan_of"]


ATTRIBUTE = "_torch_depthmup"


class Handle:
    """A plan on its module. Copies and pickles with the module, and makes the copy known too."""

    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __init__(
        self,
        owner: nn.Module | None,
        plan: Plan,
        versions: Mapping[str, int] | None = None,
        set_shapes: bool = False,
    ):
        self.owner = None if owner is None else weakref.ref(owner)
        self.plan = plan
        self.versions = versions  # how often each parameter had been written to; None on a copy
        self.set_shapes = set_shapes  # whether parametrize put mup's infshape on the parameters
        if owner is not None:
            self.alive.add(owner)

    @staticmethod
    def attach(model: nn.Module, plan: Plan, set_shapes: bool) -> None:
        versions = {name: parameter._version for name, parameter in model.named_parameters()}
        vars(model)[ATTRIBUTE] = Handle(model, plan, versions, set_shapes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        # A module is in the memo before its attributes are copied.
        return Handle(memo.get(id(self.owner())) if self.owner else None, self.plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, (self.owner() if self.owner else None, self.plan)


def owners() -> list[tuple[nn.Module, Plan]]:
    """All live parametrized modules with their plans, copies included."""
    return [(module, vars(module)[ATTRIBUTE].plan) for module in Handle.alive if ATTRIBUTE in vars(module)]


def plan_of(model: nn.Module) -> Plan:
    """The plan of a parametrized model, looked for through wrappers (compile, DDP, EMA) and in submodules.

    Raises:
        PlanError: the model has no plan, or several.
    """
    return vars(owner_of(model))[ATTRIBUTE].plan


def owner_of(model: nn.Module) -> nn.Module:
    found = [module for module in model.modules() if ATTRIBUTE in vars(module)]
    if not found:
        raise PlanError(f"{type(model).__name__} has no plan. Call dm.parametrize(model, ...) first")
    if len(found) > 1:
        raise PlanError(f"{type(model).__name__} holds {len(found)} parametrized modules. Ask for the plan of one")
    return found[0]
