"""Carries a plan out on a model, measures that it did, and undoes it. Everything or nothing.

Also keeps track of which live modules have been parametrized, so that an optimizer that sees nothing but parameters
finds their plan again - by name, after copies and replacements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.errors import MeasurementError, PlanError
from torch_depthmup.rules import Rule, Width, get_rule
from torch_depthmup.running import is_sharded, unwrap, without_numbers
from torch_depthmup.scaling import width as widths
from torch_depthmup.scaling.freshness import warn_if_trained
from torch_depthmup.scaling.hooks import hang, hooked, take_off
from torch_depthmup.scaling.initialization import warn_of_shrinking
from torch_depthmup.scaling.plan import How, Plan, Stream
from torch_depthmup.scaling.planning import make_plan, match_streams, streams_at
from torch_depthmup.scaling.registry import ATTRIBUTE, Handle, forget, owner_of, refuse_shared_with_others
from torch_depthmup.scaling.verify import (
    Measured,
    check_branches,
    differing_output,
    filled,
    measured,
)
from torch_depthmup.tracing.branches import Pattern, Trace, trace
from torch_depthmup.tracing.census import check_census

__all__ = ["parametrize", "undo"]


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
) -> Plan:
    """Scales the residual branches of a freshly initialized model, in place, and plans its learning rates.

    At the base's depth and width nothing changes, bit for bit. After the act every branch's value on the example inputs
    is measured to be the planned multiple of what it was.

    Args:
        model: a residual network at initialization, on a real device.
        base: the shallower (and possibly narrower) model of the same family that one tunes on. Only its shapes count.
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

    Returns:
        The plan, found again by `plan_of`.

    Raises:
        PlanError: the model, base and rule do not give a plan, or the model was parametrized before.
        TracingError: the branches cannot be read off the forward pass; AmbiguousBranchError names one.
        MeasurementError: a branch, measured, is not the multiple planned. The model is as it was.

    Source: arXiv 2310.02244, section 4; arXiv 2512.21075; arXiv 2505.01618.
    """
    rule, model = get_rule(rule), _checked(model, how)
    if base is not None and depth_multiplier is not None:
        raise PlanError("pass base=small_model or depth_multiplier=number, not both")
    if rule.scales_depth and example_inputs is None:
        raise PlanError("branches are found by running the model once: pass example_inputs=, a small batch will do")
    if rule.scales_depth and base is None and depth_multiplier is None:
        raise PlanError(
            f"rule {rule.name!r} scales relative to a base: pass base=small_model, or depth_multiplier=<depth "
            "over that of the base> (1 for the base itself)"
        )
    options = {"include": include, "exclude": exclude, "branches": branches}
    with widths.shaped(model):
        found = Trace() if example_inputs is None else trace(model, example_inputs, **options)
    if rule.scales_depth and not found.branches:
        raise PlanError(
            f"{type(model).__name__} has no residual branches that could be found. Name them: branches=['<module "
            "whose output is added to the skip>'], or write rule='mup'"
        )
    streams = _streams(model, found, base, depth_multiplier, example_inputs, rule, options)
    width, scales, readouts = _widths(model, base, rule)
    plan = make_plan(model, found, streams, rule, how, widths=width, scales=scales, readouts=readouts)
    set_shapes = width is not None and widths.from_base_shapes(model) is None
    if any(entry.depth_multiplier != 1.0 or entry.scale != 1.0 for entry in plan.entries):
        warn_if_trained(model)
    _carry_out(model, plan, found, example_inputs, set_shapes=set_shapes)
    Handle.attach(model, plan, set_shapes)
    return plan


def _checked(model: nn.Module, how: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise PlanError(f"parametrize takes an nn.Module, not {type(model).__name__}")
    if how not in ("fold", "wrap"):
        raise PlanError(f"how={how!r} is not known. Write 'fold' or 'wrap'")
    compiled = [m for m in model.modules() if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None)]
    if how == "wrap" and compiled:
        raise PlanError(
            f"{type(compiled[0]).__name__} is compiled, and a hook added after the first compiled call is ignored. "
            "Call parametrize(how='wrap') first and torch.compile after it, or use how='fold'"
        )
    model = unwrap(model)
    if done := [name for name, module in model.named_modules() if ATTRIBUTE in vars(module)]:
        raise PlanError(
            f"{done[0] or type(model).__name__} was parametrized before: its branches are already scaled. Call "
            "dm.undo(model) first, or build a fresh model"
        )
    refuse_shared_with_others(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise PlanError(f"{name} is not initialized yet (a lazy module). Run the model once first")
        if is_sharded(parameter):
            raise PlanError(f"{name} is sharded. Call parametrize on the whole model first and shard it after that")
        if parameter.is_meta:
            raise PlanError(
                f"{name} is on the meta device: there are no values to scale or to measure. Call dm.find_branches to "
                "look at the branches; materialise and initialise the model, then call parametrize"
            )
    return model


def _streams(
    model: nn.Module,
    found: Trace,
    base: nn.Module | None,
    depth_multiplier: float | None,
    inputs: Any,
    rule: Rule,
    options: dict[str, Any],
) -> tuple[Stream, ...]:
    if base is None or not rule.scales_depth:
        if rule.scales_depth and depth_multiplier != 1:
            check_census(found)
        return streams_at(found.branches, depth_multiplier if rule.scales_depth else None)
    base = unwrap(base)
    with widths.shaped(base):
        small = trace(base, inputs, **options)
    streams = match_streams(found.branches, small.branches)
    if any(stream.depth_multiplier != 1 for stream in streams):
        check_census(found, small)
    warn_of_shrinking(model, found.branches, base, small.branches, streams, rule)
    return streams


def _widths(
    model: nn.Module, base: nn.Module | None, rule: Rule
) -> tuple[Mapping[str, Width] | None, dict[str, float], dict[str, float]]:
    """Each parameter's width, and what width changes: scales at initialization, multipliers of readouts."""
    if not rule.width:
        return None, {}, {}
    known = widths.from_base_shapes(model)
    if known is not None or base is None:
        return known, {}, {}
    matched = widths.match(model, unwrap(base))
    if matched is None:
        return None, {}, {}
    return matched, widths.initial_scales(model, matched), widths.readout_multipliers(model, matched)


def _carry_out(model: nn.Module, plan: Plan, found: Trace, inputs: Any, *, set_shapes: bool) -> None:
    """Scales values and adds hooks, measures the branches, and puts everything back if anything is wrong."""
    parameters = dict(model.named_parameters())
    depth = {name: plan.branch_multiplier(b) for b in plan.branches for name in b.carrier if plan.how == "fold"}
    width = {e.name: e.scale / depth.get(e.name, 1.0) for e in plan.entries}
    touched = [name for name in parameters if width[name] != 1.0 or depth.get(name, 1.0) != 1.0]
    multipliers = [plan.branch_multiplier(branch) for branch in plan.branches]
    with _restored_on_error(model, {name: parameters[name] for name in touched}), torch.no_grad():
        if set_shapes:
            widths.set_shapes(model, {entry.name: entry.width for entry in plan.entries if entry.width})
        for name in touched:
            parameters[name].mul_(width[name])
        if all(m == 1.0 for m in multipliers):
            return
        with filled(parameters.values()):
            before = measured(model, inputs, found)
            with _scaled([(parameters[name], m) for name, m in depth.items()]), hooked(model, plan, found):
                check_branches(model, inputs, found, before, multipliers)
                wrong = differing_output(model, inputs, found, before)
            if wrong:
                raise MeasurementError(_reaches_elsewhere(model, plan, found, inputs, before, wrong))
        for name, m in depth.items():
            parameters[name].mul_(m)
        hang(model, plan, found)


def _reaches_elsewhere(model: nn.Module, plan: Plan, found: Trace, inputs: Any, before: Measured, output: str) -> str:
    """What to say of a network whose branches are right and whose outputs are not: the first branch that does it."""
    parameters = dict(model.named_parameters())
    for i, branch in enumerate(plan.branches):
        m = plan.branch_multiplier(branch)
        alone = [(parameters[name], m) for name in branch.carrier if plan.how == "fold"]
        with _scaled(alone), hooked(model, plan, found, only=i):
            reached = differing_output(model, inputs, found, before)
        if reached:
            carrier = f" {', '.join(branch.carrier)}" if plan.how == "fold" else ""
            pattern = without_numbers(branch.name).replace("#", "*") or "*"
            return (
                f"{branch.name}: what its last weights{carrier} give is used for something else besides the residual "
                f"addition (returned, or added elsewhere), and how={plan.how!r} would scale that too: {reached} is not "
                "what it would be with each branch multiplied where it is added. The model is as it was. Give the "
                f"branch last weights of its own, or leave such branches alone: exclude=['{pattern}']"
            )
    return (
        f"{output} is not what it would be with each branch multiplied where it is added, though each branch alone is "
        "right: branches share what carries their multipliers. The model is as it was. Exclude one of them"
    )


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


@contextlib.contextmanager
def _scaled(parameters: Sequence[tuple[Tensor, float]]) -> Iterator[None]:
    """Parameters times their multipliers, for as long as the branches are measured."""
    saved = [parameter.detach().clone() for parameter, _ in parameters]
    try:
        for parameter, m in parameters:
            parameter.mul_(m)
        yield
    finally:
        for (parameter, _), value in zip(parameters, saved, strict=True):
            parameter.copy_(value)


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
            if entry.scale != 1.0:
                wide = parameter.double() if parameter.device.type != "mps" else parameter.float()
                parameter.copy_(wide / entry.scale)
    if handle.set_shapes:
        widths.clear_shapes(owner)
    take_off(owner)
    forget(owner)
