"""Traced branches and a base -> a plan. Changes nothing, and works on ``meta``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from torch_depthmup.errors import PlanError, TracingError
from torch_depthmup.rules import Role, Rule, Width, get_rule
from torch_depthmup.running import normalise_name, unwrap, without_numbers
from torch_depthmup.scaling import hooks, refusals
from torch_depthmup.scaling import width as widths
from torch_depthmup.scaling.copies import copied, find_copies, scaled_as_originals
from torch_depthmup.scaling.factors import seen_powers, with_factors
from torch_depthmup.scaling.heads import with_head_sizes
from torch_depthmup.scaling.initialization import default_bounds, forward_factor, initial_size, relative_sizes
from torch_depthmup.scaling.matching import counterparts
from torch_depthmup.scaling.materialising import initialized, warn_without_sizes
from torch_depthmup.scaling.plan import Copy, How, InitialSize, Plan, PlannedBranch, PlannedParameter, Stream
from torch_depthmup.scaling.readouts import missing_powers, refuse_computed, with_readouts
from torch_depthmup.scaling.sizes import corrections, current_sizes, resolve, unlike_zeros
from torch_depthmup.scaling.streams import are_alike, match_streams, streams_at
from torch_depthmup.tracing.branches import Branch, Pattern, Side, Trace, roles, trace
from torch_depthmup.tracing.census import check_census, check_parts
from torch_depthmup.tracing.streams import Numbers

__all__ = ["Initialization", "Seen", "look", "make_plan", "plan"]

Initialization = Literal["base", "keep"]
FROZEN = "; frozen: its initial size is left alone"


@dataclass(frozen=True)
class Seen:
    """A model and one forward pass of it; an empty trace where there are no example inputs."""

    model: nn.Module
    inputs: Any
    found: Trace = field(default_factory=Trace)

    @property
    def has_values(self) -> bool:
        """Whether every parameter is on a real device."""
        return not any(parameter.is_meta for parameter in self.model.parameters())


def plan(
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
    """The plan that `parametrize` would carry out. Changes nothing, and works on ``meta``; arguments as there.

    On ``meta`` a model has no values, so the plan says which sizes they should start with, and `apply` scales them once
    the model has been materialised and initialized. What the forward pass has already
    of a branch's multiplier is seen there if it is a number.

    >>> import torch, torch_depthmup as dm
    >>> def network(depth):
    ...     return torch.nn.Sequential(*[dm.Residual(torch.nn.Linear(8, 8)) for _ in range(depth)])
    >>> with torch.device("meta"):
    ...     deep, small = network(8), network(2)
    >>> dm.plan(deep, base=small, example_inputs=torch.ones(1, 8))["7.branch.weight"].folded
    0.5

    Raises:
        PlanError: model, base and rule do not give a plan.
        TracingError: the branches cannot be read off the forward pass; AmbiguousBranchError names one.
    """
    options = {"include": include, "exclude": exclude, "branches": branches}
    base = base if init is None else initialized(base, init)
    seen, other = look(model, base, depth_multiplier, example_inputs, get_rule(rule), options)
    return make_plan(seen, other, depth_multiplier, get_rule(rule), how, initialization)


def look(
    model: nn.Module,
    base: nn.Module | None,
    depth_multiplier: float | None,
    inputs: Any,
    rule: Rule,
    options: Mapping[str, Any],
) -> tuple[Seen, Seen | None]:
    """Model and base, each with a forward pass; arguments as `plan`'s."""
    if base is not None and depth_multiplier is not None:
        raise PlanError("pass base=small_model or depth_multiplier=number, not both")
    if rule.scales_depth and inputs is None:
        raise PlanError("branches are found by running the model once: pass example_inputs=, a small batch will do")
    if rule.scales_depth and base is None and depth_multiplier is None:
        raise PlanError(
            f"rule {rule.name!r} scales relative to a base: pass base=small_model, or depth_multiplier=<depth "
            "over that of the base> (1 for the base itself)"
        )
    seen = _seen(unwrap(model), inputs, options)
    if rule.scales_depth and not seen.found.branches:
        refusals.refuse_none(model, seen.found)
    if base is None:
        return seen, None
    refusals.refuse_unmatched(unwrap(base), options)
    return seen, _seen_beside(seen, unwrap(base), inputs, {**options, "like": seen.found})


def _seen_beside(seen: Seen, base: nn.Module, inputs: Any, options: Mapping[str, Any]) -> Seen:
    """The base, in which what is a branch in the model is one too: of a single layer it may not show."""
    try:
        found = _seen(base, inputs, options)
    except TracingError as error:
        raise type(error)(
            f"in the base, which gets the same inputs (build it as the model, of its dtype, on its device): {error}"
        ) from error
    if are_alike(seen.found, found.found):
        return found
    there = {branch.name for branch in found.found.branches}
    modules = dict(base.named_modules())
    missing = [_called(b.name, modules) for b in seen.found.branches if b.name in modules and b.name not in there]
    missing = [name for name in missing if name]
    if not missing:
        return found
    chosen = options["branches"] or ()
    declared = [chosen] if isinstance(chosen, str | type) else [*chosen]
    try:
        again = _seen(base, inputs, {**options, "branches": [*declared, *missing]})
    except TracingError:
        return found
    return again if are_alike(seen.found, again.found) else found


def _called(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The innermost module at or above a name that is called: a list of modules is not."""
    while isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
    return name


def _seen(model: nn.Module, inputs: Any, options: Mapping[str, Any]) -> Seen:
    if inputs is None:
        return Seen(model, inputs)
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None and device.type == "meta":
        inputs = _on(inputs, device)
    with widths.shaped(model):
        return Seen(model, inputs, trace(model, inputs, **options))


def _on(inputs: Any, device: Any) -> Any:
    """Example inputs on the device of a model on ``meta``; numbers are not looked at there."""
    if isinstance(inputs, Mapping):
        return {key: _on(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_on(value, device) for value in inputs)
    return inputs.to(device) if hasattr(inputs, "to") else inputs


def make_plan(
    seen: Seen,
    base: Seen | None,
    depth_multiplier: float | None,
    rule: Rule,
    how: How = "fold",
    initialization: Initialization = "base",
) -> Plan:
    """The plan for a model that has been looked at.

    Raises:
        PlanError: besides what `plan` says, a scaled branch shares its weights with others, contains another scaled
            stream, has no carrier to fold into, or has siblings that the example inputs did not reach.
    """
    if initialization not in ("base", "keep"):
        raise PlanError(f"initialization={initialization!r} is not known. Write 'base' or 'keep'")
    found = seen.found
    if base is None or not rule.scales_depth:
        streams = streams_at(found.branches, depth_multiplier if rule.scales_depth else None)
    else:
        streams = match_streams(found, base.found)
    copies = find_copies(seen.model, found)
    is_deeper = any(stream.depth_multiplier != 1 for stream in streams)
    if rule.scales_depth and (is_deeper or base is not None):
        check_census(found, None if base is None else base.found)
    if rule.scales_depth and is_deeper:
        check_parts(found)
        refusals.refuse_shared(found)
        refusals.refuse_nested(found, streams)
        refusals.refuse_unreached(seen.model, found, copies)
    entries = _entries(seen, base, rule, streams, copies)
    base_names = [] if base is None else [name for name, _ in base.model.named_parameters()]
    if base is not None and any(entry.width is not None and entry.width.widths for entry in entries):
        warn_without_sizes(base.model)
        entries = with_factors(found, base.found, base_names, entries)
    trained = {name for name, parameter in seen.model.named_parameters() if parameter.requires_grad}
    multipliers = [rule.branch_multiplier(streams[b.stream].depth_multiplier) for b in found.branches]
    planned = tuple(
        PlannedBranch(b, 1.0 if _is_frozen(b, trained, copies) else multiplier)
        for b, multiplier in zip(found.branches, multipliers, strict=True)
    )
    if rule.scales_depth and is_deeper and base is not None:
        planned = _what_is_there(seen, base, entries, planned, streams)
    refusals.refuse_impossible(seen.model, planned, found, how)
    if how == "fold":
        supplied = {name: branch.supplied for branch in planned for name in branch.branch.carrier}
        entries = [replace(entry, folded=entry.folded * supplied.get(entry.name, 1.0)) for entry in entries]
    if base is not None and any(entry.width is not None for entry in entries):
        entries = with_head_sizes(found, base.found, base_names, entries)
    entries, hung = with_readouts(seen.model, found, entries, copies, _missing_powers(seen, base, entries))
    if how == "wrap":
        hung = (*hooks.branch_hooks(seen.model, planned, found), *hung)
    entries, hung = scaled_as_originals(entries, hung, copies, found.reached)
    made = Plan(rule, how, streams, planned, tuple(entries), hung, copies, found.left_alone)
    return resolve(made, seen.model, keep=initialization == "keep")


def _missing_powers(seen: Seen, base: Seen | None, entries: Sequence[PlannedParameter]) -> dict[str, float]:
    """Of each readout's 1 / width_mult what the forward pass lacks; without values, as far as numbers tell."""
    if base is None or seen.inputs is None:
        return {}
    names = [name for name, _ in base.model.named_parameters()]
    powers = seen_powers(seen.found, base.found, names, entries)
    if not (seen.has_values and base.has_values):
        refuse_computed(seen.found, entries)
        return powers
    factors = {
        name: width * depth
        for name, (width, depth) in corrections(entries, seen.model, current_sizes(entries, seen.model)).items()
    }
    with widths.shaped(seen.model), widths.shaped(base.model):
        pair = (seen.model, seen.inputs), (base.model, base.inputs)
        return missing_powers(*pair, seen.found, base.found, entries, factors, powers)


def _is_frozen(branch: Branch, trained: set[str], copies: Sequence[Copy]) -> bool:
    """Whether a branch's parameters are frozen, so that it was trained at its own scale; a copy's follow others."""
    is_copy = all(copied(name, copies) is not None for name in _inside(branch))
    return not is_copy and trained.isdisjoint(_inside(branch))


# Roles, widths and sizes


def _entries(
    seen: Seen, base: Seen | None, rule: Rule, streams: Sequence[Stream], copies: Sequence[Copy]
) -> list[PlannedParameter]:
    """Every parameter with its role, its width and the size that it should start with; nothing folded yet."""
    places, found = _places(seen.found, streams), seen.found
    wide = _widths(seen, base, rule)
    sizes, kinds = _wanted_sizes(seen, base, wide)
    trunk = {without_numbers(name): stream for name, stream in found.trunk.items()}
    entries = []
    for name, parameter in seen.model.named_parameters():
        index, side = places.get(name, (None, None))
        role: Role = side or "outside"
        branch = None if index is None else found.branches[index]
        stream = None if branch is None else branch.stream
        if branch is None and without_numbers(name) in trunk:
            role, stream = "trunk", trunk[without_numbers(name)]
        left_alone = "" if parameter.requires_grad or copied(name, copies) else FROZEN
        entries.append(
            PlannedParameter(
                name=name,
                role=role,
                branch=branch.name if branch else None,
                depth_multiplier=1.0 if stream is None else streams[stream].depth_multiplier,
                folded=1.0,
                scale=None,
                width=(wide or {}).get(name),
                reason=_reason(name, role, branch, streams, found) + left_alone,
                initial=sizes.get(name),
                kind=kinds.get(name, ""),
            )
        )
    return entries


def _places(found: Trace, streams: Sequence[Stream]) -> dict[str, tuple[int, Side]]:
    """Each parameter's branch and side: the innermost one whose stream deepens, else the innermost one."""
    places = roles(found.branches)
    for i in sorted(range(len(found.traced)), key=lambda i: -len(found.traced[i].sides)):
        if streams and streams[found.branches[i].stream].depth_multiplier != 1 and found.traced[i].nested:
            places |= {
                name: (i, side)
                for name, side in found.traced[i].sides.items()
                if streams[found.branches[places[name][0]].stream].depth_multiplier == 1
            }
    return places


def _widths(seen: Seen, base: Seen | None, rule: Rule) -> Mapping[str, Width] | None:
    if not rule.width:
        return None
    known = widths.from_base_shapes(seen.model)
    if known is not None or base is None:
        return known
    found = widths.match(seen.model, base.model, seen.found, base.found)
    if found is not None and seen.inputs is None:
        raise PlanError(
            "the base is narrower, and what the network does with its widths is seen by running it once: pass "
            "example_inputs=, a small batch will do"
        )
    return found


def _wanted_sizes(
    seen: Seen, base: Seen | None, wide: Mapping[str, Width] | None
) -> tuple[dict[str, InitialSize], dict[str, str]]:
    """The size that each parameter should start with, from that of its counterpart in the base; and the kinds.

    Of hidden weights size = base size * width_mult ** -1/2, of all others the base's (arXiv 2203.03466, table 8).
    """
    if base is None or widths.from_base_shapes(seen.model) is not None:  # mup has rescaled by itself
        return {}, {}
    theirs = {normalise_name(name): parameter for name, parameter in base.model.named_parameters()}
    bounds = {normalise_name(name): bound for name, bound in default_bounds(base.model).items()}
    sizes, kinds = {}, {}
    ours = dict(seen.model.named_parameters())
    for name, other in counterparts(ours, theirs).items():
        if other is None or other.name not in theirs:
            continue
        kinds[name] = other.kind
        width = (wide or {}).get(name)
        resized = width is not None and bool(width.widths)
        if not resized and theirs[other.name].shape != ours[name].shape:  # numbers of each layer, say
            continue
        size = initial_size(theirs[other.name], bounds.get(other.name))
        if size is not None:
            factor = 1.0 if width is None else width.multiplier**width.size_exponent
            exact = None if size.exact is None else size.exact * factor
            sizes[name] = InitialSize(size.size * factor, size.error, exact)
    return sizes, kinds


def _reason(name: str, role: Role, branch: Branch | None, streams: Sequence[Stream], found: Trace) -> str:
    if role == "trunk":
        return "on the stream itself (a norm, a scaled skip), one for each addition: lr multiplier 1 / depth multiplier"
    if branch is None:
        if name in found.shared:
            return f"shared by the branches {', '.join(found.shared[name][:4])}: depth multiplier 1"
        if name not in found.reached:
            return "not reached by the example inputs: depth multiplier 1"
        return "outside every residual branch, or used by several: depth multiplier 1"
    stream = streams[branch.stream]
    place = f"{branch.position + 1} of {stream.additions}, base {stream.base_additions}"
    where = f"branch {branch.name or 'of the model'} ({place})"
    if role == "inner":
        return f"before the outer weight operation of {where}"
    carries = "; it carries the branch" if name in branch.carrier else ""
    return f"at or after the outer weight operation of {where}{carries}"


# What of the branch multipliers is there already


def _what_is_there(
    seen: Seen,
    base: Seen,
    entries: Sequence[PlannedParameter],
    planned: Sequence[PlannedBranch],
    streams: Sequence[Stream],
) -> tuple[PlannedBranch, ...]:
    """The branches with the factors that their initialization and the forward pass have already, kind by kind."""
    now = current_sizes(entries, seen.model)
    lacking = corrections(entries, seen.model, now)
    kind_of = {entry.name: entry.kind for entry in entries}
    base_kinds = {
        normalise_name(o.name): o.kind
        for o in counterparts(kind_of, (name for name, _ in base.model.named_parameters())).values()
        if o is not None
    }
    ours = [_kind(b, kind_of, seen.found) for b in seen.found.branches]
    its_kinds = {name: base_kinds.get(normalise_name(name), "") for b in base.found.branches for name in _inside(b)}
    theirs = [_kind(b, its_kinds, base.found) for b in base.found.branches]
    scales = {name: width * depth for name, (width, depth) in lacking.items()}
    sizes: list[dict[int, float]] = [{}, {}]
    if seen.has_values and base.has_values and any(branch.multiplier != 1 for branch in planned):
        with widths.shaped(seen.model), widths.shaped(base.model):
            sizes = [
                relative_sizes(seen.model, seen.inputs, seen.found, scales),
                relative_sizes(base.model, base.inputs, base.found),
            ]
    unlike = set(unlike_zeros(entries, now))  # a branch that holds one is not of the base's size for its own reason
    sizes[0] = {j: size for j, size in sizes[0].items() if unlike.isdisjoint(_inside(seen.found.branches[j]))}
    # Where the sizes of weights make up for numbers that multiply their product, none of those are left on the branch.
    made_up_for = {e.name for e in entries if e.present != 1}
    settled = {k for k, b in zip(ours, seen.found.branches, strict=True) if not made_up_for.isdisjoint(b.outer)}
    numbers = [
        [_number(t.numbers, scale, kinds[j] in settled) for j, t in enumerate(of.found.traced)]
        for of, kinds, scale in ((seen, ours, scales), (base, theirs, {}))
    ]
    result = []
    unclear: list[str] = []
    for i, branch in enumerate(planned):
        ratio = streams[branch.branch.stream].depth_multiplier
        weights = [name for name in branch.branch.carrier if lacking.get(name, (1.0, 1.0))[1] != 1.0]
        initial = 1 / lacking[weights[0]][1] if weights else 1.0
        mine, its = (
            [(number, known.get(j)) for j, number in enumerate(multiplied) if kinds[j] == ours[i]]
            for multiplied, known, kinds in zip(numbers, sizes, (ours, theirs), strict=True)
        )
        forward, is_unclear = forward_factor(mine, its, ratio) if branch.multiplier != 1 else (1.0, False)
        unclear += [branch.branch.name] * is_unclear
        result.append(replace(branch, initial=initial, forward=forward))
    if unclear:
        warnings.warn(
            f"{len(unclear)} branches ({', '.join(unclear[:3])}{', ...' if len(unclear) > 3 else ''}) are not of the "
            "base's size beside their skips, and not by one factor: the forward pass multiplies skips or branches by "
            "numbers of its own, layer upon layer. The rule's multipliers assume that it does not. Take those numbers "
            "out, or leave these branches alone with exclude=",
            UserWarning,
            stacklevel=5,
        )
    return tuple(result)


def _number(numbers: Numbers, scales: Mapping[str, float], is_settled: bool) -> float:
    """What numbers multiply a branch with beside its skip, once its scalars have the sizes that they should have."""
    on_branch = numbers.branch * math.prod(scales.get(name, 1.0) for name in numbers.scalars)
    return numbers.alpha * (1.0 if is_settled else on_branch) / numbers.skip


def _inside(branch: Branch) -> tuple[str, ...]:
    return (*branch.inner, *branch.outer)


def _kind(branch: Branch, kind_of: Mapping[str, str], found: Trace) -> tuple[str, ...]:
    """What the branches of one kind share: the kinds of their parameters, and their skip.

    A stack, which holds entries for every block, stands in the first of them only.
    """
    return (branch.skip, *sorted({kind_of[name] for name in _inside(branch) if name not in found.stacked}))
