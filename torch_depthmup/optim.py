"""Optimizer constructors: torch's own classes, with the plan's multipliers in their parameter groups.

An optimizer knows no rule and no model. It looks each parameter up in the plans of the live parametrized models, by
identity at construction, and asks the plan for numbers.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_depthmup.errors import OptimizerError
from torch_depthmup.rules import FAMILIES, Family, Multipliers, get_family
from torch_depthmup.scaling.plan import Plan
from torch_depthmup.scaling.registry import owners, plan_of

__all__ = ["SGD", "Adam", "AdamW", "Muon", "optimizer", "per_group", "rescale"]

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
Group = dict[str, Any]
Plans = dict[int, tuple[Plan, str]]
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
    "Adadelta": "its step follows the size of its own earlier steps, not a learning rate alone",
    "ASGD": "its decay term lambd also sets its learning-rate schedule, so the two cannot be scaled apart",
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
    group, so that foreach and fused paths stay fast. Groups added later are scaled too, also to a copy; a pickled
    optimizer needs this package to be loaded (its ``state_dict`` does not).

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
    scaler = _Scaler(type(optimizer), None if family is None else get_family(family))
    plans = _plans(model)
    for i, group in enumerate(optimizer.param_groups):
        scaler.check(_named(group), i, plans, "are not parameters of this parametrized model")
    return _scale(optimizer, scaler, plans)


def _scale(made: AnyOptimizer, scaler: _Scaler, plans: Plans) -> AnyOptimizer:
    """Splits the groups of an optimizer, in place, once torch has filled in every option."""
    split = [scaler.split(_named(group), made.defaults, plans) for group in made.param_groups]
    made.param_groups.clear()
    for group in (group for part in split for group in part):
        made.add_param_group(group)
    scaled = any(group["lr_multiplier"] != 1.0 for group in made.param_groups)
    if scaled and made.defaults.get("initial_accumulator_value"):
        raise OptimizerError(
            "initial_accumulator_value is a gradient's scale that no multiplier reaches: leave it at 0"
        )
    user_group = [i for i, part in enumerate(split) for _ in part]
    _guard(made, scaler, user_group, [group.get("lr") for group in made.param_groups])
    return made


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
    scaler, plans = _Scaler(cls, family), _plans()
    groups = _as_groups(params)
    _refuse_twice(groups, plans)
    for i, group in enumerate(groups):
        scaler.check(group, i, plans)
    # The class fills in its own defaults first: no reading of signatures, which may say no more than **options.
    return _scale(cls(groups, *args, **options), scaler, plans)


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
        return [{"params": _as_list(listed)}]
    return [{**group, "params": _as_list(group["params"])} for group in listed]


def _as_list(params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, set):
        raise TypeError("a group's params must be ordered, and sets are not: pass a list")
    listed = list(params)
    if foreign := [item for item in listed if not isinstance(_tensor(item), Tensor)]:
        raise TypeError(
            f"an optimizer takes tensors, or pairs of a name and a tensor; one of these is of type "
            f"{type(_tensor(foreign[0])).__name__}"
        )
    return listed


def _tensor(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) and len(item) == 2 else item


def _refuse_twice(groups: list[Group], plans: Plans) -> None:
    seen: dict[int, int] = {}
    for i, group in enumerate(groups):
        for item in group["params"]:
            tensor = _tensor(item)
            if id(tensor) in seen:
                name = plans[id(tensor)][1] if id(tensor) in plans else f"of shape {tuple(tensor.shape)}"
                where = f"group {i}" if seen[id(tensor)] == i else f"groups {seen[id(tensor)]} and {i}"
                raise OptimizerError(f"the parameter {name} is listed twice, in {where}: list it once")
            seen[id(tensor)] = i


class _Scaler:
    """Splits groups by multipliers."""

    def __init__(self, cls: type[Optimizer], family: Family | None):
        self.family = family or get_family(_family_name(cls) or "")

    def check(self, group: Group, index: int, plans: Plans, trouble: str = "belong to no parametrized model") -> None:
        """Refuses parameters without a plan, and those that the family does not train."""
        if unknown := [item for item in group["params"] if id(_tensor(item)) not in plans]:
            raise _unknown(unknown, index, trouble)
        if self.family.name == "muon":
            _refuse_vectors(group["params"], plans)

    def split(self, group: Group, defaults: Group, plans: Plans) -> list[Group]:
        """One group for each distinct set of multipliers, in order of appearance. A group's options come first."""
        options = {**defaults, **group}
        family = self.family
        if options.get("decoupled_weight_decay") and family.name == "adam":
            family = get_family("adamw")
        parts: dict[Multipliers, list[Any]] = {}
        for item in group["params"]:
            plan, name = plans[id(_tensor(item))]
            parts.setdefault(plan.multipliers(name, family, adjust_lr=options.get("adjust_lr_fn")), []).append(item)
        return [_scaled(group, options, m, items) for m, items in (parts or {Multipliers(): []}).items()]


def _scaled(group: Group, options: Group, multipliers: Multipliers, items: list[Any]) -> Group:
    part = {**group, "params": items}
    for key in SCALED:
        factor, value = getattr(multipliers, key), options.get(key)
        if factor != 1.0 and isinstance(value, int | float | Tensor):
            part[key] = value * factor  # a tensor of its own: the user's stays as it is
        part[f"{key}_multiplier"] = factor
    return part


def _plans(model: nn.Module | None = None) -> Plans:
    """The plan and the planned name of every parameter of the live parametrized modules, or of those in a model."""
    inside = None if model is None else set(model.modules())
    return {
        id(parameter): (plan, name)
        for module, plan in owners()
        if inside is None or module in inside
        for name, parameter in module.named_parameters(remove_duplicate=True)
    }


def _unknown(items: list[Any], index: int, trouble: str) -> OptimizerError:
    labels = [f"{item[0]} " if isinstance(item, tuple) else "" for item in items[:3]]
    shown = ", ".join(f"{label}{tuple(_tensor(item).shape)}" for label, item in zip(labels, items, strict=False))
    return OptimizerError(
        f"{len(items)} parameters of group {index} {trouble}: {shown}"
        f"{', ...' if len(items) > 3 else ''}. Call dm.parametrize on the module that holds them first; put several "
        "modules into one parent"
    )


def _refuse_vectors(items: list[Any], plans: Plans) -> None:
    vectors = [plans[id(_tensor(item))][1] for item in items if _tensor(item).ndim != 2]
    if vectors:
        raise OptimizerError(
            f"Muon takes matrices; {len(vectors)} parameters are none: {', '.join(vectors[:3])}, .... Give Muon the "
            "hidden matrices, and the rest to dm.AdamW"
        )


def _guard(made: Optimizer, scaler: _Scaler, user_group: list[int], planned: list[Any]) -> None:
    """Scales groups that are added later, and watches that schedulers keep the ratios of the learning rates.

    Both live on this instance, whose class stays torch's own; copying and pickling carry them along.

    Args:
        made: the optimizer with scaled groups.
        scaler: what scales further groups.
        user_group: for each group, which of the user's groups it is a part of.
        planned: for each group, its learning rate as scaled.
    """
    add = made.add_param_group

    def add_param_group(self: Optimizer, group: Group) -> None:
        own = {**group, "params": _as_list(group["params"])}
        plans, number = _plans(), max(user_group, default=-1) + 1
        # Everything is refused before the first part is added, so that a failure adds nothing.
        _refuse_twice([*map(_named, self.param_groups), own], plans)
        scaler.check(own, number, plans)
        for part in scaler.split(own, self.defaults, plans):
            add(part)
            user_group.append(number)
            planned.append(self.param_groups[-1].get("lr"))

    def reduce(self: Optimizer, protocol: Any) -> tuple[Any, ...]:
        return _revive, (type(self), self.__getstate__(), scaler, user_group, planned)

    made.add_param_group = types.MethodType(add_param_group, made)  # type: ignore[method-assign]
    made.__reduce_ex__ = types.MethodType(reduce, made)  # type: ignore[method-assign]
    warned = False

    def watch(self: Optimizer, args: Any, options: Any) -> None:
        nonlocal warned
        if not warned and (found := _overwritten(self.param_groups, planned, user_group)):
            warned = True
            warnings.warn(found, UserWarning, stacklevel=4)

    made.register_step_pre_hook(watch)


def _revive(cls: type[Optimizer], state: Any, scaler: _Scaler, user_group: list[int], planned: list[Any]) -> Optimizer:
    """A copied or unpickled optimizer, guarded as the one that it was made from."""
    made = cls.__new__(cls)
    made.__setstate__(state)
    _guard(made, scaler, list(user_group), list(planned))
    return made


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
