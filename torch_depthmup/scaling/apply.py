"""Carries a plan out on a model, measures that it did, and undoes it. Everything or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.errors import PlanError
from torch_depthmup.rules import Rule, get_rule
from torch_depthmup.running import is_sharded, normalise_name, unwrap
from torch_depthmup.scaling import width as widths
from torch_depthmup.scaling.copies import refuse_unequal
from torch_depthmup.scaling.freshness import warn_if_trained
from torch_depthmup.scaling.hooks import hang, take_off
from torch_depthmup.scaling.materialising import initialized
from torch_depthmup.scaling.measuring import check_carried_out
from torch_depthmup.scaling.plan import How, Plan, PlannedParameter
from torch_depthmup.scaling.planning import Initialization, Seen, look, make_plan
from torch_depthmup.scaling.registry import ATTRIBUTE, Handle, forget, owner_of, refuse_shared_with_others
from torch_depthmup.scaling.sizes import resolve
from torch_depthmup.scaling.verify import filled
from torch_depthmup.tracing.branches import Pattern

__all__ = ["apply", "attach", "parametrize", "undo"]


def parametrize(
    model: nn.Module,
    *,
    base: nn.Module | None = None,
    depth_multiplier: float | None = None,
    example_inputs: Any = None,
    rule: str | Rule = "depth-mup-corrected",
    how: How = "fold",
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern | None = None,
    branches: Sequence[Pattern] | Pattern | None = None,
    initialization: Initialization = "base",
    init: Callable[[nn.Module], object] | None = None,
) -> Plan:
    """Scales the residual branches of a freshly initialized model, in place, and plans its learning rates.

    At the base's depth and width nothing changes, bit for bit. After the act every branch's value on the example inputs
    is measured to be the planned multiple of what it was.

    Args:
        model: a residual network at initialization, on a real device.
        base: the shallower (and possibly narrower) model of the same family that one tunes on. Its shapes count,
            and the sizes that its values start with; on ``meta`` only the shapes.
        depth_multiplier: instead of ``base``, the model's depth over that of the base, whether one counts layers or
            additions; 1 for the base itself.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; a small batch will do.
        rule: ``"sp"``, ``"mup"``, ``"depth-mup"``, ``"depth-mup-corrected"`` (with the correction of the inner
            learning rates), ``"complete-p"``, or a `Rule`. The first two do not scale depth and need no base.
        how: ``"fold"`` multiplies the carrier weights and leaves modules alone; ``"wrap"`` hangs a `BranchMultiplier`
            on the module whose output is the branch. Both train identically.
        include: name patterns or module classes; only their branches are scaled.
        exclude: name patterns or module classes whose branches are left alone.
        branches: name patterns or module classes that are declared to be branches.
        initialization: ``"base"`` takes initial values to the sizes that the base's have, as width and depth ask for,
            whatever the library's initialization is; ``"keep"`` leaves them alone and warns where they differ.
        init: initializes a model in place, ``init(module)``. A base on ``meta`` has no sizes to compare with; given
            this, a copy of it on the CPU gets some.

    Returns:
        The plan, found again by `plan_of`.

    >>> import torch, torch_depthmup as dm
    >>> model = torch.nn.Sequential(*[dm.Residual(torch.nn.Linear(8, 8)) for _ in range(8)])
    >>> plan = dm.parametrize(model, depth_multiplier=4, example_inputs=torch.ones(1, 8))
    >>> [group["lr"] for group in dm.AdamW(model.parameters(), lr=0.1).param_groups]
    [0.025]

    Raises:
        PlanError: the model, base and rule do not give a plan, or the model was parametrized before.
        TracingError: the branches cannot be read off the forward pass; AmbiguousBranchError names one.
        MeasurementError: a branch, measured, is not the multiple planned. The model is as it was.

    Source: arXiv 2310.02244, section 4; arXiv 2512.21075; arXiv 2505.01618.
    """
    model = _checked(model, how)
    for name, parameter in model.named_parameters():
        _refuse_without_values(name, parameter)
    options = {"include": include, "exclude": exclude, "branches": branches}
    base = base if init is None else initialized(base, init)
    seen, other = look(model, base, depth_multiplier, example_inputs, get_rule(rule), options)
    plan = make_plan(seen, other, depth_multiplier, get_rule(rule), how, initialization)
    if any(entry.depth_multiplier != 1.0 or entry.scale != 1.0 for entry in plan.entries):
        warn_if_trained(model)
    _carry_out(model, plan, seen)
    return plan


def apply(model: nn.Module, plan: Plan) -> Plan:
    """Carries a plan out on a freshly initialized model, in place: values are scaled, multipliers hung, rates known.

    Between planning and applying the model may be materialised, initialized and sharded (FSDP2, tensor parallel).
    Unlike `parametrize` it does not measure the branches, since it runs nothing.

    Args:
        model: the model that was planned, or one of the same parameters; not scaled before.
        plan: from `plan`.

    Returns:
        The plan with the factors on the values that were found, which `plan_of` finds again.

    >>> import torch, torch_depthmup as dm
    >>> with torch.device("meta"):
    ...     model, x = torch.nn.Sequential(*[dm.Residual(torch.nn.Linear(8, 8)) for _ in range(8)]), torch.ones(1, 8)
    >>> plan = dm.plan(model, depth_multiplier=4, example_inputs=x)
    >>> model = model.to_empty(device="cpu")  # and initialize it
    >>> dm.apply(model, plan) == dm.plan_of(model)
    True

    Raises:
        PlanError: the plan is another model's, the model was scaled before, or it is on ``meta``.
    """
    model = _checked(model, _is_plan(plan).how)
    _refuse_another_plan(model, plan)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError("the model is on the meta device: materialise and initialise it, then call dm.apply")
    refuse_unequal(model, plan.copies)
    plan = resolve(plan, model) if any(entry.scale is None for entry in plan.entries) else plan
    _carry_out(model, plan, None)
    return plan


def attach(model: nn.Module, plan: Plan, *, rates_only: bool = False) -> Plan:
    """Makes a plan known for a model whose values are left alone: resumed, loaded, or fine-tuned.

    Args:
        model: a model with the parameters that the plan names.
        plan: from `plan_of`, `plan`, or `Plan.from_json`.
        rates_only: the values do not contain the plan's multipliers (a model that was trained without it): nothing is
            hung on modules, and learning rates are not made up for multipliers that are not there.

    Returns:
        The plan that `plan_of` now finds.

    Raises:
        PlanError: the plan is another model's, or the model has a plan.
    """
    model = _checked(model, _is_plan(plan).how)
    _refuse_another_plan(model, plan)
    if rates_only:
        plain = tuple(replace(entry, folded=1 / entry.present, scale=1.0, rows_scale=1.0) for entry in plan.entries)
        plan = replace(plan, entries=plain, hooks=())
    hang(model, plan.hooks)
    Handle.attach(model, plan, False)
    return plan


def _checked(model: nn.Module, how: str) -> nn.Module:
    """The user's own module, refused where nothing can be carried out on it."""
    own = unwrap(model)
    if how not in ("fold", "wrap"):
        raise PlanError(f"how={how!r} is not known. Write 'fold' or 'wrap'")
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None)]
    if how == "wrap" and compiled:
        raise PlanError(
            f"{type(compiled[0]).__name__} is compiled, and a hook added after the first compiled call is ignored. "
            "Call parametrize(how='wrap') first and torch.compile after it, or use how='fold'"
        )
    if done := [name for name, module in own.named_modules() if ATTRIBUTE in vars(module)]:
        raise PlanError(
            f"{done[0] or type(own).__name__} was parametrized before: its branches are already scaled. Call "
            "dm.undo(model) first, or build a fresh model"
        )
    refuse_shared_with_others(own)
    return own


def _refuse_without_values(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise PlanError(f"{name} is not initialized yet (a lazy module). Run the model once first")
    if is_sharded(parameter):
        raise PlanError(
            f"{name} is sharded. Call parametrize on the whole model first and shard it after that, or "
            "dm.plan(model on meta, ...) and dm.apply(sharded model, plan)"
        )
    if parameter.is_meta:
        raise PlanError(
            f"{name} is on the meta device: there are no values to scale or to measure. Call dm.plan(model, ...), "
            "materialise and initialise the model, then call dm.apply(model, plan)"
        )


def _is_plan(plan: Plan) -> Plan:
    if not isinstance(plan, Plan):
        raise PlanError(f"this takes a Plan, not a {type(plan).__name__}. Of a saved one, dm.Plan.from_json(text)")
    return plan


def _refuse_another_plan(model: nn.Module, plan: Plan) -> None:
    names = {normalise_name(name) for name, _ in model.named_parameters()}
    planned = {normalise_name(entry.name) for entry in plan.entries}
    if names != planned:
        unlike = sorted(names ^ planned)
        raise PlanError(
            f"the plan was made for another model: only one of the two has {', '.join(unlike[:3])}"
            f"{', ...' if len(unlike) > 3 else ''}. Plan this model, dm.plan(model, ...)"
        )


def _carry_out(model: nn.Module, plan: Plan, seen: Seen | None) -> None:
    """Scales values and adds hooks, measures the branches if they were seen, and puts everything back on failure."""
    parameters = {normalise_name(name): parameter for name, parameter in model.named_parameters()}
    carriers = {name: p.supplied for p in plan.planned_branches for name in p.branch.carrier if plan.how == "fold"}
    scales = {e.name: 1.0 if e.scale is None else e.scale for e in plan.entries}
    touched = {
        e.name: parameters[normalise_name(e.name)]
        for e in plan.entries
        if scales[e.name] != 1.0 or e.rows_scale != 1.0 or e.name in carriers
    }
    has_widths = any(entry.width is not None for entry in plan.entries)
    set_shapes = has_widths and widths.from_base_shapes(model) is None
    supplied = [branch.supplied for branch in plan.planned_branches]
    with _restored_on_error(model, touched), torch.no_grad():
        if set_shapes:
            widths.set_shapes(model, {normalise_name(e.name): e.width for e in plan.entries if e.width})
        if seen is not None and any(factor != 1.0 for factor in supplied):
            unscaled = {name: parameter.detach().clone() for name, parameter in touched.items()}
            for name, parameter in touched.items():
                parameter.mul_(scales[name] / carriers.get(name, 1.0))
            with filled(parameters.values()):
                check_carried_out(model, plan, seen, {name: (touched[name], m) for name, m in carriers.items()})
            for name, value in unscaled.items():
                touched[name].copy_(value)
        for entry in plan.entries:
            if entry.name in touched:
                touched[entry.name].mul_(scales[entry.name] * _rows(touched[entry.name], entry))
        hang(model, plan.hooks)
        Handle.attach(model, plan, set_shapes)


@contextlib.contextmanager
def _restored_on_error(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    had_shapes = any(hasattr(parameter, "infshape") for parameter in model.parameters())
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, value in saved.items():
                parameters[name].copy_(value)
        take_off(model)
        if not had_shapes:
            widths.clear_shapes(model)
        raise


def _rows(parameter: Tensor, entry: PlannedParameter) -> Tensor | float:
    """The factors on rows: one for all where no part of the parameter differs."""
    width = entry.width
    if entry.rows_scale == 1.0 or width is None or width.summed is None:
        return 1.0
    kept = 1 - width.summed
    rows = torch.ones(width.dims[kept], device=parameter.device)
    for start, end in width.unnormalised:
        rows[start:end] = entry.rows_scale
    rows = rows.reshape([-1 if dim == kept else 1 for dim in range(parameter.ndim)])
    sharded: Any = parameter.data
    return type(sharded).from_local(rows, sharded.device_mesh) if hasattr(sharded, "device_mesh") else rows


def _widest(parameter: Tensor) -> torch.dtype:
    """The precision in which a factor is taken back, so that nothing but the rounding of the result is left of it."""
    if parameter.is_complex():
        return torch.complex128
    return torch.float64 if parameter.device.type != "mps" else torch.float32


def undo(model: nn.Module) -> None:
    """Takes an untrained model's scaling back: values to the last bit of rounding, modules and attributes exactly.

    Args:
        model: the module that `parametrize` was called on, or a wrapper around it.

    Raises:
        PlanError: the model has no plan, or its parameters were written to since: trained, loaded, or copied.
    """
    owner = owner_of(model)
    handle: Handle = vars(owner)[ATTRIBUTE]
    if handle.versions is None:
        raise PlanError("this model is a copy of a parametrized one, and may be trained. Undo works on the original")
    parameters = dict(owner.named_parameters())
    for name, parameter in parameters.items():
        if handle.versions.get(name) != parameter._version:
            raise PlanError(
                f"{name} has changed since parametrize (trained or loaded), so there is no untrained model to restore. "
                "Build a fresh one"
            )
    with torch.no_grad():
        for entry in handle.plan.entries:
            parameter = parameters[entry.name]
            if entry.scale is not None and (entry.scale, entry.rows_scale) != (1.0, 1.0):
                wide = parameter.to(_widest(parameter))
                parameter.copy_(wide / entry.scale / _rows(parameter, entry))
    if handle.set_shapes:
        widths.clear_shapes(owner)
    take_off(owner)
    forget(owner)
