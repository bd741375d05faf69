"""Optimizer constructors: torch's own classes, with the plan's multipliers in their parameter groups.

An optimizer knows no rule and no model. It looks each parameter up in the plans of the live parametrized models, by
identity at construction, and asks the plan for numbers.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_depthmup.errors import OptimizerError
from torch_depthmup.parametrize import owners, plan_of
from torch_depthmup.plan import Plan
from torch_depthmup.rules import FAMILIES, Family, Multipliers, get_family

__all__ = ["SGD", "Adam", "AdamW", "Muon", "optimizer", "per_group", "rescale"]

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
Group = dict[str, Any]
Parameters = nn.Module | Tensor | Iterable[Any]
"""What torch's constructors take - parameters, (name, parameter) pairs, groups - or the model itself."""

KNOWN = {
    "SGD": "sgd",
    "Adam": "adam",
    "NAdam": "adam",
    "Adamax": "adam",
    "RMSprop": "adam",
    "AdamW": "adamw",
    "Muon": "muon",
    "Adafactor": "adafactor",
}
"""Families of torch's own classes. A class that is not here needs ``family=``."""

UNSUITED = {
    "RAdam": "its first steps are not normalised by the gradient's scale and the later ones are, so no one rule holds",
    "LBFGS": "its step does not scale with the learning rate of a group",
    "Rprop": "its step sizes are its own, whatever the learning rate",
}
"""torch's classes that no family describes, and why."""

SCALED = ("lr", "weight_decay", "eps")
DRIFT = 0.01  # how far ratios of learning rates may move before a scheduler is taken to have overwritten them


class _Constructor(Generic[AnyOptimizer]):
    """A torch optimizer class as a constructor that scales its groups. Called as the class is."""

    def __init__(self, cls: type[AnyOptimizer], family: Family | None):
        self.cls, self.family = cls, family
        self.__name__, self.__doc__ = cls.__name__, f"{cls.__name__} with the plan's multipliers; see `optimizer`."

    def __call__(self, params: Parameters, *args: Any, **options: Any) -> AnyOptimizer:
        return _construct(self.cls, self.family, params, args, options)

    def __repr__(self) -> str:
        return f"dm.optimizer({self.cls.__module__}.{self.cls.__qualname__})"


def optimizer(cls: type[AnyOptimizer], family: str | Family | None = None) -> Callable[..., AnyOptimizer]:
    """A constructor for an optimizer class that scales learning rate, weight decay and eps as the plan says.

    What it returns is a plain instance of ``cls``. Parameters of one group that share their multipliers stay in one
    group, so that foreach and fused paths stay fast.

    Args:
        cls: a torch optimizer class, or one with torch's interface.
        family: ``"sgd"``, ``"adam"`` (normalised updates, L2 penalty), ``"adamw"`` (decoupled decay; also Lion),
            ``"muon"`` or ``"adafactor"``; may be left out for torch's own classes.

    Returns:
        A callable that takes what ``cls`` takes, or the parametrized model itself in place of its parameters. It raises
        OptimizerError for parameters without a plan.

    Raises:
        OptimizerError: the family is unknown or not given.
    """
    for name in (c.__name__ for c in cls.__mro__ if c.__module__.startswith("torch.optim")):
        if name in UNSUITED:
            raise OptimizerError(f"{name} cannot be scaled: {UNSUITED[name]}. Use dm.AdamW, dm.Adam or dm.SGD")
    if family is None and _family_name(cls) is None:
        raise OptimizerError(
            f"the family of {cls.__name__} is not known. Write dm.optimizer({cls.__name__}, family=...) with one of "
            f"{', '.join(map(repr, FAMILIES))}: how does its step depend on the gradient's scale?"
        )
    return _Constructor(cls, None if family is None else get_family(family))


def SGD(params: Parameters, lr: float | Tensor = 1e-3, *args: Any, **options: Any) -> torch.optim.SGD:
    """``torch.optim.SGD`` with the plan's multipliers in its groups.

    Args:
        params: the parametrized model, its parameters, named parameters, or groups with options of their own.
        lr: the base model's learning rate.
        args: further arguments of ``torch.optim.SGD``.
        options: likewise.

    Raises:
        OptimizerError: a parameter has no plan, or is listed twice.
    """
    return _construct(torch.optim.SGD, get_family("sgd"), params, (lr, *args), options)


def Adam(params: Parameters, lr: float | Tensor = 1e-3, *args: Any, **options: Any) -> torch.optim.Adam:
    """``torch.optim.Adam`` (L2 penalty) with the plan's multipliers in its groups; arguments and errors as `SGD`."""
    return _construct(torch.optim.Adam, None, params, (lr, *args), options)


def AdamW(params: Parameters, lr: float | Tensor = 1e-3, *args: Any, **options: Any) -> torch.optim.AdamW:
    """``torch.optim.AdamW`` with the plan's multipliers in its groups; arguments and errors as `SGD`."""
    return _construct(torch.optim.AdamW, get_family("adamw"), params, (lr, *args), options)


def Muon(params: Parameters, lr: float | Tensor = 1e-3, *args: Any, **options: Any) -> Optimizer:
    """``torch.optim.Muon`` with the plan's multipliers in its groups; arguments and errors as `SGD`.

    Width follows the spectral condition, for either ``adjust_lr_fn``.

    Raises:
        OptimizerError: besides, this torch has no Muon, or a parameter is not a matrix.
    """
    cls = getattr(torch.optim, "Muon", None)
    if cls is None:
        raise OptimizerError(f"torch {torch.__version__} has no Muon; torch 2.9 and newer have")
    return _construct(cls, get_family("muon"), params, (lr, *args), options)


def per_group(optimizer: Optimizer, value: float) -> list[float]:
    """One value for each group, scaled as its learning rate is: for ``OneCycleLR(max_lr=...)`` and the like.

    Args:
        optimizer: made by this module.
        value: a learning rate of the base model.

    Raises:
        OptimizerError: the optimizer carries no multipliers.
    """
    if any("lr_multiplier" not in group for group in optimizer.param_groups):
        raise OptimizerError(f"{type(optimizer).__name__} was not made by dm; call dm.rescale(optimizer, model) first")
    return [value * group["lr_multiplier"] for group in optimizer.param_groups]


def rescale(optimizer: AnyOptimizer, model: nn.Module, *, family: str | Family | None = None) -> AnyOptimizer:
    """Puts the plan's multipliers into an optimizer that exists, in place; its state is kept.

    Args:
        optimizer: a torch optimizer over parameters of the model.
        model: the parametrized model.
        family: as in `optimizer`.

    Returns:
        The same optimizer.

    Raises:
        OptimizerError: it is scaled already, has a scheduler, or holds parameters that the model does not have.
    """
    if any("lr_multiplier" in group for group in optimizer.param_groups):
        raise OptimizerError(f"this {type(optimizer).__name__} is scaled already")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise OptimizerError(
            "a scheduler is attached and remembers the old groups: rescale first, then make schedulers"
        )
    if family is None and _family_name(type(optimizer)) is None:
        raise OptimizerError(
            f"the family of {type(optimizer).__name__} is not known. Write dm.rescale(optimizer, model, family=...) "
            f"with one of {', '.join(map(repr, FAMILIES))}"
        )
    plan_of(model)
    scaler = _Scaler(type(optimizer), None if family is None else get_family(family), optimizer.defaults)
    groups = [_named(group) for group in optimizer.param_groups]
    split = [scaler.split(group, i) for i, group in enumerate(groups)]
    optimizer.param_groups.clear()
    for group in (group for part in split for group in part):
        optimizer.add_param_group(group)
    _guard(optimizer, scaler, [len(part) for part in split])
    return optimizer


def _named(group: Group) -> Group:
    """A group of an optimizer with its names beside its parameters again, as the constructor takes them."""
    group = dict(group)
    names = group.pop("param_names", None)
    group["params"] = list(zip(names, group["params"], strict=True)) if names else list(group["params"])
    return group


def _family_name(cls: type[Optimizer]) -> str | None:
    return next(
        (KNOWN[c.__name__] for c in cls.__mro__ if c.__module__.startswith("torch.optim") and c.__name__ in KNOWN), None
    )


def _construct(
    cls: type[AnyOptimizer], family: Family | None, params: Parameters, args: Sequence[Any], options: Group
) -> AnyOptimizer:
    signature = inspect.signature(cls)
    bound = signature.bind(params, *args, **options)
    first = next(iter(bound.arguments))
    given = {key: value for key, value in bound.arguments.items() if key != first}
    given.update(given.pop("kwargs", {}))
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not inspect.Parameter.empty}
    scaler = _Scaler(cls, family, {**defaults, **given})
    groups = _as_groups(params)
    _refuse_twice(groups)
    split = [scaler.split(group, i) for i, group in enumerate(groups)]
    made = cls([group for part in split for group in part], **given)
    _guard(made, scaler, [len(part) for part in split])
    return made


def _as_groups(params: Parameters) -> list[Group]:
    """Groups as dictionaries of our own; the user's are left as they are."""
    if isinstance(params, nn.Module):
        return [{"params": list(params.named_parameters())}]
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or groups, or the model; it is a single tensor")
    listed = list(params)
    if not listed:
        return []  # torch has its own words for that
    if not isinstance(listed[0], dict):
        return [{"params": listed}]
    return [{**group, "params": _as_list(group["params"])} for group in listed]


def _as_list(params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, set):
        raise TypeError("a group's params must be ordered, and sets are not: pass a list")
    return list(params)


def _tensor(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item


def _refuse_twice(groups: list[Group]) -> None:
    seen: dict[int, str] = {}
    for i, group in enumerate(groups):
        for j, item in enumerate(group["params"]):
            label = item[0] if isinstance(item, tuple) else f"number {j} of group {i}, shape {tuple(item.shape)}"
            if id(_tensor(item)) in seen:
                raise OptimizerError(f"a parameter is listed twice: {seen[id(_tensor(item))]}, and {label}")
            seen[id(_tensor(item))] = label


class _Scaler:
    """Splits groups by multipliers. ``options`` are the constructor's, which a group's own override."""

    def __init__(self, cls: type[Optimizer], family: Family | None, options: Group):
        self.cls, self.options = cls, options
        self.family = family or get_family(_family_name(cls) or "")

    def split(self, group: Group, index: int) -> list[Group]:
        """One group for each distinct set of multipliers, in order of appearance."""
        plans = _plans()
        family = self.family
        if self._option(group, "decoupled_weight_decay") and family.name == "adam":
            family = get_family("adamw")
        unknown = [item for item in group["params"] if id(_tensor(item)) not in plans]
        if unknown:
            raise _unknown(unknown, index)
        if family.name == "muon":
            _refuse_vectors(group["params"], plans)
        parts: dict[Multipliers, list[Any]] = {}
        for item in group["params"]:
            plan, name = plans[id(_tensor(item))]
            key = plan.multipliers(name, family, adjust_lr=self._option(group, "adjust_lr_fn"))
            parts.setdefault(key, []).append(item)
        return [
            self._scaled(group, multipliers, items) for multipliers, items in (parts or {Multipliers(): []}).items()
        ]

    def _scaled(self, group: Group, multipliers: Multipliers, items: list[Any]) -> Group:
        part = {**group, "params": items}
        for key in SCALED:
            factor, value = getattr(multipliers, key), self._option(group, key)
            if factor != 1.0 and isinstance(value, int | float | Tensor):
                part[key] = value * factor  # a tensor of its own: the user's stays as it is
            part[f"{key}_multiplier"] = factor
        return part

    def _option(self, group: Group, key: str) -> Any:
        return group.get(key, self.options.get(key))


def _plans() -> dict[int, tuple[Plan, str]]:
    """The plan and the planned name of every parameter of the live parametrized modules."""
    return {
        id(parameter): (plan, name)
        for module, plan in owners()
        for name, parameter in module.named_parameters(remove_duplicate=True)
    }


def _unknown(items: list[Any], index: int) -> OptimizerError:
    labels = [f"{item[0]} " if isinstance(item, tuple) else "" for item in items[:3]]
    shown = ", ".join(f"{label}{tuple(_tensor(item).shape)}" for label, item in zip(labels, items, strict=False))
    return OptimizerError(
        f"{len(items)} parameters of group {index} belong to no parametrized model: {shown}"
        f"{', ...' if len(items) > 3 else ''}. Call dm.parametrize on the module that holds them first; put several "
        "modules into one parent"
    )


def _refuse_vectors(items: list[Any], plans: dict[int, tuple[Plan, str]]) -> None:
    vectors = [plans[id(_tensor(item))][1] for item in items if _tensor(item).ndim != 2]
    if vectors:
        raise OptimizerError(
            f"Muon takes matrices; {len(vectors)} parameters are none: {', '.join(vectors[:3])}, .... Give Muon the "
            "hidden matrices, and the rest to dm.AdamW"
        )


def _guard(made: Optimizer, scaler: _Scaler, sizes: list[int]) -> None:
    """Scales groups that are added later, and watches that schedulers keep the ratios of the learning rates.

    Both live on this instance: a copied or unpickled optimizer keeps its scaled groups and is plain torch otherwise.
    """
    user_group = [i for i, size in enumerate(sizes) for _ in range(size)]
    planned = [group.get("lr") for group in made.param_groups]
    add = made.add_param_group

    def add_param_group(self: Optimizer, group: Group) -> None:
        own = {**group, "params": _as_list(group["params"])}
        number = max(user_group, default=-1) + 1
        for part in scaler.split(own, number):
            add(part)
            user_group.append(number)
            planned.append(self.param_groups[-1].get("lr"))

    made.add_param_group = types.MethodType(add_param_group, made)  # type: ignore[method-assign]
    warned = False

    def watch(self: Optimizer, args: Any, options: Any) -> None:
        nonlocal warned
        if not warned and (found := _overwritten(self.param_groups, planned, user_group)):
            warned = True
            warnings.warn(found, UserWarning, stacklevel=4)

    made.register_step_pre_hook(watch)


def _overwritten(groups: list[Group], planned: list[Any], user_group: list[int]) -> str | None:
    """What is wrong where groups that were one to the user no longer have the planned ratio; plain floats only."""
    factors: dict[int, tuple[float, int]] = {}
    for i, (group, lr, user) in enumerate(zip(groups, planned, user_group, strict=False)):
        if not isinstance(lr, float) or not isinstance(group["lr"], float) or lr <= 0:
            continue
        factor = group["lr"] / lr
        first, at = factors.setdefault(user, (factor, i))
        if abs(factor - first) > DRIFT * max(abs(factor), abs(first)):
            return (
                f"the learning rates of groups {at} and {i} are {groups[at]['lr']:.4g} and {group['lr']:.4g}, and no "
                f"longer in the planned ratio {planned[at] / lr:.4g}: a scheduler wrote one value into all groups. "
                "Write OneCycleLR(optimizer, max_lr=dm.per_group(optimizer, ...)), CosineAnnealingLR(eta_min=0), "
                "ReduceLROnPlateau(min_lr=dm.per_group(...)), or a scheduler that works by ratios"
            )
    return None
