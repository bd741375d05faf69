"""Optimizer constructors: torch's own classes, with the plan's multipliers in their parameter groups."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from torch_depthmup.errors import OptimizerError
from torch_depthmup.families import refuse_unsuited
from torch_depthmup.groups import (
    Group,
    Parameters,
    Scaler,
    as_groups,
    as_list,
    check_groups,
    named,
    plans_for,
    refuse_vectors,
    tensor_of,
)
from torch_depthmup.resuming import matched_by_name
from torch_depthmup.rules import Family, Horizon, get_family
from torch_depthmup.scaling.registry import Planned, plan_of, warn_if_rewritten
from torch_depthmup.watching import watch

__all__ = ["SGD", "Adam", "AdamW", "Muon", "optimizer", "rescale"]

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
P = ParamSpec("P")


class Constructor(Generic[P, AnyOptimizer]):
    """An optimizer class as a constructor that scales its groups. Called as the class is."""

    def __init__(self, cls: type[AnyOptimizer], family: Family | None, measured: bool = True):
        self.cls, self.family, self.measured = cls, family, measured
        self.__name__ = self.__qualname__ = cls.__name__
        self.__signature__ = inspect.signature(cls)
        self.__doc__ = f"{cls.__name__} with the plan's multipliers in its groups; see `optimizer`.\n\n{_doc(cls)}"

    def __call__(self, params: Parameters | None = None, *args: P.args, **options: P.kwargs) -> AnyOptimizer:
        if params is None:
            raise OptimizerError(
                f"the parameters, groups or the model come first: dm.optimizer({self.__name__})(model, ...). Where the "
                "class wants parameters by other names, make it without dm.optimizer, and dm.rescale(optimizer, model)"
            )
        return _construct(self.cls, self.family, self.measured, params, args, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return Constructor, (self.cls, self.family, self.measured)

    def __repr__(self) -> str:
        return f"dm.optimizer({self.cls.__module__}.{self.cls.__qualname__})"


def optimizer(
    cls: Callable[Concatenate[Any, P], AnyOptimizer], family: str | Family | None = None
) -> Constructor[P, AnyOptimizer]:
    """A constructor for any optimizer class that scales learning rate, weight decay and eps as the plan says.

    How the class's steps answer to the gradient's scale, the weight's scale, eps and weight decay is measured on a toy
    of two small tensors, with the options that the constructor is called with, for each group. A class whose steps
    follow the weight's size (LAMB, LARS, Adafactor) cannot make up for a folded multiplier and needs ``how="wrap"``.

    What the constructor returns is a plain instance of ``cls``. Parameters of one group that share their multipliers
    stay in one group, so that foreach and fused paths stay fast. Groups added later are scaled too, also to a deep
    copy. A pickled optimizer loads without this package, and then adds groups as they are.

    Args:
        cls: an optimizer class with torch's interface, or ``ZeroRedundancyOptimizer``.
        family: ``"sgd"``, ``"adam"`` (normalised updates, L2 penalty), ``"adamw"`` (decoupled decay; also Lion),
            ``"muon"`` or ``"adafactor"``. The measurement has to agree; it is taken at its word where the class does
            not run on the toy. A group may have one of its own, ``{"params": ..., "family": "muon"}``.

    Returns:
        A callable that takes what ``cls`` takes, or the parametrized model itself in place of its parameters. It raises
        OptimizerError for parameters without a plan, and for steps that follow no family.

    Raises:
        OptimizerError: the family is unknown, or the class is known to follow none.

    >>> import torch, torch_depthmup as dm
    >>> block = lambda: dm.Residual(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)))
    >>> model = torch.nn.Sequential(*[block() for _ in range(8)])
    >>> _ = dm.parametrize(model, depth_multiplier=4, example_inputs=torch.randn(2, 4))
    >>> optimizer = dm.optimizer(torch.optim.NAdam)(model.parameters(), lr=0.1)
    >>> type(optimizer).__name__, [group["lr_multiplier"] for group in optimizer.param_groups]
    ('NAdam', [1.0, 0.25])
    """
    refuse_unsuited(cls)  # type: ignore[arg-type]
    return Constructor(cls, None if family is None else get_family(family))  # type: ignore[arg-type]


def _doc(cls: type) -> str:
    """The class's own documentation, without examples that would run as ours."""
    return inspect.cleandoc(cls.__doc__ or "").replace(">>> ", "")


def _torchs(
    cls: Callable[Concatenate[Any, P], AnyOptimizer], family: str, note: str = ""
) -> Callable[Concatenate[Parameters, P], AnyOptimizer]:
    """A function of the class's name, signature and documentation, which `help` shows."""
    made: Any = cls  # a class, whose constructor's arguments the annotation passes on

    def construct(params: Parameters, *args: P.args, **options: P.kwargs) -> AnyOptimizer:
        return _construct(made, get_family(family), False, params, args, options)

    construct.__name__ = construct.__qualname__ = made.__name__
    construct.__module__ = __name__
    construct.__signature__ = inspect.signature(made).replace(return_annotation=made)  # type: ignore[attr-defined]
    construct.__doc__ = (
        f"``torch.optim.{made.__name__}`` with the plan's multipliers in its groups.\n\n"
        "``params`` may also be the parametrized model itself; ``lr``, ``weight_decay`` and ``eps`` are those of the "
        f"base model.{note}\n\nRaises:\n    OptimizerError: a parameter has no plan, or is listed twice.\n\n"
        f"The rest is torch's documentation.\n\n{_doc(made)}"
    )
    return construct


SGD = _torchs(torch.optim.SGD, "sgd")
Adam = _torchs(torch.optim.Adam, "adam")


def AdamW(
    params: Parameters,
    *args: Any,
    batch_multiplier: float = 1.0,
    duration_multiplier: float = 1.0,
    **options: Any,
) -> torch.optim.AdamW:
    """``torch.optim.AdamW`` with the plan's multipliers in its groups, and those of another batch size or duration.

    ``params`` may also be the parametrized model itself; ``lr``, ``betas``, ``weight_decay`` and ``eps`` are those of
    the base model. With ``r = batch_multiplier / duration_multiplier``, ``lr`` and ``weight_decay`` are multiplied by
    ``sqrt(r)``, ``eps`` by ``1 / sqrt(r)``, and ``1 - beta`` by ``r``.

    The rule holds while noise dominates the gradient, below the critical batch size, and for schedules that are given
    as fractions of the run. Other measurements of language models find a smaller power of the duration than 1/2.

    Args:
        params: parameters, pairs, groups or the model.
        args: those of torch's constructor, after the parameters.
        batch_multiplier: batch size, divided by that of the tuned run.
        duration_multiplier: samples or tokens seen in the whole run, divided by those of the tuned run.
        options: those of torch's constructor.

    Returns:
        A plain ``torch.optim.AdamW``.

    Raises:
        OptimizerError: a parameter has no plan or is listed twice; a multiplier is not positive, or asks for moments
            that forget more than all in one step.

    Source: arXiv 2512.22382, table 1; for the batch size arXiv 2205.10287.

    >>> import torch, torch_depthmup as dm
    >>> block = lambda: dm.Residual(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)))
    >>> model = torch.nn.Sequential(*[block() for _ in range(8)])
    >>> _ = dm.parametrize(model, depth_multiplier=1, example_inputs=torch.randn(2, 4))
    >>> group = dm.AdamW(model, lr=0.01, batch_multiplier=4).param_groups[0]
    >>> group["lr"], [round(beta, 3) for beta in group["betas"]]
    (0.02, [0.6, 0.996])
    """
    horizon = Horizon(batch_multiplier, duration_multiplier)
    return _construct(torch.optim.AdamW, get_family("adamw"), False, params, args, options, horizon)


_OWN = [p for p in inspect.signature(AdamW).parameters.values() if p.name.endswith("_multiplier")]
AdamW.__signature__ = (_TORCHS := inspect.signature(torch.optim.AdamW)).replace(  # type: ignore[attr-defined]
    parameters=[*_TORCHS.parameters.values(), *_OWN], return_annotation=torch.optim.AdamW
)

if hasattr(torch.optim, "Muon"):
    Muon = _torchs(
        torch.optim.Muon,
        "muon",
        " It trains matrices; width follows the spectral condition, for either ``adjust_lr_fn``.",
    )
else:

    def Muon(params: Parameters, *args: Any, **options: Any) -> Optimizer:  # type: ignore[misc]
        """torch's Muon, which this version of torch does not have."""
        raise OptimizerError(f"torch {torch.__version__} has no Muon; torch 2.9 and newer have")


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
    refuse_unsuited(type(optimizer))
    plan_of(model)
    groups = [named(group) for group in optimizer.param_groups]
    plans = plans_for(groups, model)
    check_groups(groups, plans, trouble="are not parameters of this parametrized model")
    scaler = Scaler.of(optimizer, None if family is None else get_family(family))
    return _scale(optimizer, scaler, plans)


def _construct(
    cls: type[AnyOptimizer],
    family: Family | None,
    measured: bool,
    params: Parameters,
    args: Any,
    options: Group,
    horizon: Horizon | None = None,
) -> AnyOptimizer:
    groups = as_groups(params)
    plans = plans_for(groups)
    check_groups(groups, plans)
    warn_if_rewritten(tensor_of(item) for group in groups for item in group["params"])
    for group in groups:
        if group.get("family", family.name if family else "") == "muon":
            refuse_vectors(group["params"], plans)
    if cls.__name__ == "ZeroRedundancyOptimizer" and cls.__module__.startswith("torch."):
        return _construct_zero(cls, family, groups, plans, args, options)
    scaler = Scaler(cls, family, args, options, measured, horizon)
    # The class fills in its own defaults first: no reading of signatures, which may say no more than **options.
    made = cls([_without_family(group) for group in groups], *args, **options)
    return _scale(made, scaler, plans, groups)


def _without_family(group: Group) -> Group:
    return {key: value for key, value in group.items() if key != "family"}


def _scale(
    made: AnyOptimizer, scaler: Scaler, plans: dict[int, Planned], user: list[Group] | None = None
) -> AnyOptimizer:
    """Splits the groups of an optimizer, in place, once its class has filled in every option."""
    groups = [named(group) for group in made.param_groups]
    written = user if user is not None and len(user) == len(groups) else groups
    split = [
        scaler.split(group, made.defaults, plans, i, own)
        for i, (group, own) in enumerate(zip(groups, written, strict=True))
    ]
    made.param_groups.clear()
    parts = [part for parts in split for part in parts]
    for part in parts:
        made.add_param_group({**part, "params": [tensor for _, tensor in part["params"]]})
    for group, part in zip(made.param_groups, parts, strict=True):
        group["param_names"] = [name for name, _ in part["params"]]
    _guard(made, scaler)
    return made


def _construct_zero(
    cls: Any, family: Family | None, groups: list[Group], plans: dict[int, Planned], args: Any, options: Group
) -> Any:
    """ZeroRedundancyOptimizer keeps its own book of groups, so it is given the split ones."""
    wanted = inspect.signature(cls).parameters
    inner: Any = options.get("optimizer_class", args[0] if args else None)
    own = {key: value for key, value in options.items() if key not in wanted}
    scaler = Scaler(inner, family, (), own)
    filled = inner([_without_family(group) for group in groups], **own)
    parts = [
        part
        for i, (group, user) in enumerate(zip(map(named, filled.param_groups), groups, strict=True))
        for part in scaler.split(group, filled.defaults, plans, i, user)
    ]
    made = cls([{**part, "params": [tensor for _, tensor in part["params"]]} for part in parts], *args, **options)
    watch(made)
    return made


def _guard(made: Optimizer, scaler: Scaler) -> None:
    """Scales groups that are added later, and matches a loaded state by name.

    Both live on this instance, whose class stays torch's own; deep copies carry them along, pickles do not.
    """
    add = made.add_param_group

    def add_param_group(self: Optimizer, group: Group) -> None:
        own = {**group, "params": as_list(group["params"])}
        present = [named(g) for g in self.param_groups]
        plans = plans_for([own])
        # Everything is refused before the first part is added, so that a failure adds nothing.
        check_groups([*present, own], plans, first=len(present))
        number = 1 + max((g.get("user_group", 0) for g in self.param_groups), default=-1)
        for part in scaler.split(own, self.defaults, plans, number):
            add(part)
        watch(self)

    def deepcopy(self: Optimizer, memo: dict[int, Any]) -> Optimizer:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        _guard(copied, scaler)
        return copied

    made.add_param_group = types.MethodType(add_param_group, made)  # type: ignore[method-assign]
    made.__deepcopy__ = types.MethodType(deepcopy, made)  # type: ignore[attr-defined]
    made.register_load_state_dict_pre_hook(matched_by_name)
    watch(made)
