"""Parameter groups: what the user wrote, split by the plan's multipliers.

An optimizer knows no rule and no model. Each parameter is looked up in the plans of the live parametrized modules, by
identity at construction, and the plan is asked for numbers.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_depthmup.errors import OptimizerError
from torch_depthmup.families import MeasuredFamily, measure_family
from torch_depthmup.rules import Family, Horizon, Multipliers, get_family
from torch_depthmup.scaling.registry import Planned, discover, planned_parameters, refuse_replaced, way_out_of_folding

__all__ = [
    "Group",
    "Parameters",
    "Scaler",
    "as_groups",
    "check_groups",
    "named",
    "plans_for",
    "refuse_vectors",
    "tensor_of",
]

Group = dict[str, Any]
Plans = dict[int, Planned]
Parameters = nn.Module | Tensor | Iterable[Any]
"""What torch's constructors take - parameters, (name, parameter) pairs, groups - or the model itself."""

SCALED = {"lr": "lr", "initial_lr": "lr", "weight_decay": "weight_decay", "eps": "eps"}
"""Options of a group that are scaled, and by which multiplier."""


def as_groups(params: Parameters) -> list[Group]:
    """Groups as dictionaries of our own; the user's are left as they are."""
    if isinstance(params, nn.Module):
        return [{"params": list(params.named_parameters())}]
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or groups, or the model; it is a single tensor")
    listed = list(params)
    if not listed:
        return []  # torch has its own words for that
    if not isinstance(listed[0], dict):
        return [{"params": as_list(listed)}]
    return [{**group, "params": as_list(group["params"])} for group in listed]


def as_list(params: Any) -> list[Any]:
    """A group's parameters, or pairs of name and parameter, as a list."""
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, set):
        raise TypeError("a group's params must be ordered, and sets are not: pass a list")
    listed = list(params)
    if foreign := [item for item in listed if not isinstance(tensor_of(item), Tensor)]:
        raise TypeError(
            f"an optimizer takes tensors, or pairs of a name and a tensor; one of these is of type "
            f"{type(tensor_of(foreign[0])).__name__}"
        )
    return listed


def tensor_of(item: Any) -> Any:
    """The parameter of a pair, or the parameter itself."""
    return item[1] if isinstance(item, tuple) and len(item) == 2 else item


def named(group: Group) -> Group:
    """A group of an optimizer with its names beside its parameters again, as the constructor takes them."""
    group = dict(group)
    names = group.pop("param_names", None)
    group["params"] = list(zip(names, group["params"], strict=True)) if names else list(group["params"])
    return group


def plans_for(groups: list[Group], model: nn.Module | None = None) -> Plans:
    """The plans of the live parametrized modules, or of those in a model, by parameter."""
    plans = planned_parameters(model)
    if model is None and any(id(tensor_of(item)) not in plans for group in groups for item in group["params"]):
        discover()
        plans = planned_parameters()
    return plans


def check_groups(groups: list[Group], plans: Plans, *, first: int = 0, trouble: str | None = None) -> None:
    """Refuses parameters that are listed twice, have no plan, or were put in place of planned ones.

    Args:
        groups: with lists of parameters or pairs.
        plans: by parameter.
        first: number of the first group that is new; those before it have passed.
        trouble: what is wrong with parameters without a plan.
    """
    seen: dict[int, int] = {}
    for i, group in enumerate(groups):
        for tensor in map(tensor_of, group["params"]):
            if id(tensor) in seen:
                name = plans[id(tensor)][1] if id(tensor) in plans else f"of shape {tuple(tensor.shape)}"
                where = f"group {i}" if seen[id(tensor)] == i else f"groups {seen[id(tensor)]} and {i}"
                raise OptimizerError(f"the parameter {name} is listed twice, in {where}: list it once")
            seen[id(tensor)] = i
    for i, group in enumerate(groups[first:], first):
        if unknown := [item for item in group["params"] if id(tensor_of(item)) not in plans]:
            raise _unknown(unknown, i, trouble or "belong to no parametrized model")
    refuse_replaced(tensor_of(item) for group in groups[first:] for item in group["params"])


def _unknown(items: list[Any], index: int, trouble: str) -> OptimizerError:
    labels = [f"{item[0]} " if isinstance(item, tuple) else "" for item in items[:3]]
    shown = ", ".join(f"{label}{tuple(tensor_of(item).shape)}" for label, item in zip(labels, items, strict=False))
    return OptimizerError(
        f"{len(items)} parameters of group {index} {trouble}: {shown}"
        f"{', ...' if len(items) > 3 else ''}. Call dm.parametrize on the module that holds them first; put several "
        "modules into one parent"
    )


class Scaler:
    """Splits groups by multipliers.

    Args:
        cls: the optimizer class.
        family: its family; ``None`` measures it.
        args: positional arguments of the class after the parameters.
        options: keyword arguments of the class.
        measured: whether a family that is given is checked by measuring.
        horizon: batch size and length of training beside the tuned ones.
    """

    def __init__(
        self,
        cls: type[Optimizer],
        family: Family | None,
        args: tuple[Any, ...],
        options: Group,
        measured: bool = True,
        horizon: Horizon | None = None,
    ):
        self.cls, self.family, self.args, self.options, self.measured = cls, family, args, options, measured
        self.horizon = horizon or Horizon()

    @classmethod
    def of(cls, optimizer: Optimizer, family: Family | None) -> Scaler:
        """The scaler of an optimizer that exists; its groups hold its options, filled in."""
        wanted = inspect.signature(type(optimizer)).parameters.values()
        required = {p.name for p in list(wanted)[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        return cls(type(optimizer), family, (), {k: v for k, v in optimizer.defaults.items() if k in required})

    def family_of(self, group: Group, defaults: Group) -> MeasuredFamily:
        """The family of one of the user's groups: the group's own, the given one, or what its steps say."""
        own = group.get("family")
        family = self.family if own is None else get_family(own)
        if family is not None and not self.measured and own is None:
            options = {**defaults, **group}
            if family.name == "adam" and options.get("decoupled_weight_decay"):
                family = get_family("adamw")
            return MeasuredFamily(family, None, options.get("adjust_lr_fn"))
        rest = {k: v for k, v in group.items() if k not in ("params", "param_names", "family", "initial_lr")}
        rest = {k: v for k, v in rest.items() if not k.endswith("_multiplier") and k != "user_group"}
        matrices = all(tensor_of(item).ndim == 2 for item in group["params"])
        return measure_family(
            lambda groups: self.cls(groups, *self.args, **self.options),
            rest,
            label=self.cls.__name__,
            named=family,
            matrices=matrices,
        )

    def split(self, group: Group, defaults: Group, plans: Plans, number: int, user: Group | None = None) -> list[Group]:
        """One group for each distinct set of multipliers, in order of appearance. A group's options come first.

        Args:
            group: with a list of parameters or pairs, and options.
            defaults: the class's options.
            plans: by parameter.
            number: which of the user's groups it is.
            user: the group as the user wrote it, where the class has filled in options since.
        """
        measured = self.family_of(user or group, defaults)
        if measured.family.name == "muon":
            refuse_vectors(group["params"], plans)
        parts: dict[Multipliers, list[Any]] = {}
        for item in group["params"]:
            plan, name = plans[id(tensor_of(item))]
            supplied = plan[name].folded * plan[name].present
            if measured.answers is not None and supplied != 1.0 and not measured.family.foldable:
                raise OptimizerError(
                    f"{self.cls.__name__} does not train {name}, into which a multiplier is folded, as it would with "
                    f"the multiplier in the network (measured on a toy: {measured.answers}). Write "
                    f"{way_out_of_folding([tensor_of(item)])}"
                )
            multipliers = plan.multipliers(name, measured.family, adjust_lr=measured.adjust_lr)
            multipliers *= self.horizon.multipliers()
            parts.setdefault(multipliers, []).append((item[0] if isinstance(item, tuple) else name, tensor_of(item)))
        group = {key: value for key, value in group.items() if key != "family"}
        made = [
            _scaled(group, {**defaults, **group}, m, items)
            for m, items in (parts or {self.horizon.multipliers(): []}).items()
        ]
        for i, part in enumerate(made):
            part["user_group"] = number
            if self.horizon != Horizon():
                part["betas"] = self.horizon.betas({**defaults, **group}["betas"])
            if i and isinstance(part.get("name"), str):
                part["name"] = f"{part['name']}.{i}"  # Lightning's monitor wants names that differ
        return made


def _scaled(group: Group, options: Group, multipliers: Multipliers, items: list[Any]) -> Group:
    part = {**group, "params": items}
    for key, which in SCALED.items():
        factor, value = getattr(multipliers, which), options.get(key)
        number = as_number(value)
        if isinstance(number, Tensor):
            part[key] = number.clone() if factor == 1.0 else number * factor  # a tensor of its own for each group
        elif number is not None:
            part[key] = value if factor == 1.0 else number * factor
    for key in ("lr", "weight_decay", "eps"):
        part[f"{key}_multiplier"] = getattr(multipliers, key)
    return part


def as_number(value: Any) -> float | Tensor | None:
    """A number of any library as a float, a tensor as it is; None for what is no single number."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0:
        return float(value)
    return None


def refuse_vectors(items: list[Any], plans: Plans) -> None:
    """Refuses what Muon does not train."""
    vectors = [plans[id(tensor_of(item))][1] for item in items if tensor_of(item).ndim != 2]
    if vectors:
        raise OptimizerError(
            f"Muon takes matrices; {len(vectors)} parameters are none: {', '.join(vectors[:3])}, .... Give Muon the "
            "hidden matrices, and the rest to dm.AdamW"
        )
