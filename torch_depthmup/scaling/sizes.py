"""The values that a model has, taken to the sizes that they should have beside the base's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torch_depthmup.scaling.copies import copied
from torch_depthmup.scaling.initialization import correction, default_bounds, initial_size
from torch_depthmup.scaling.plan import InitialSize, Plan, PlannedParameter

__all__ = ["corrections", "current_sizes", "resolve", "unlike_zeros"]

NOTABLE = 0.05  # relative distance from its size at which "keep" warns


def current_sizes(entries: Sequence[PlannedParameter], model: nn.Module) -> dict[str, InitialSize | None]:
    """What the values have now, of parameters that have a counterpart."""
    parameters, bounds = dict(model.named_parameters()), default_bounds(model)
    return {e.name: initial_size(parameters[e.name], bounds.get(e.name)) for e in entries if e.initial is not None}


def corrections(
    entries: Sequence[PlannedParameter], model: nn.Module, sizes: Mapping[str, InitialSize | None]
) -> dict[str, tuple[float, float]]:
    """For each parameter the factors for width and for depth that its initial value lacks, alike for a kind."""
    parameters = dict(model.named_parameters())
    deepest = max((entry.depth_multiplier for entry in entries), default=1.0)
    widest = max((entry.width.multiplier for entry in entries if entry.width is not None), default=1.0)
    groups: dict[tuple[Any, ...], list[PlannedParameter]] = {}
    for entry in entries:
        if entry.initial is not None:
            groups.setdefault((entry.kind, tuple(parameters[entry.name].shape)), []).append(entry)
    found = {}
    for group in groups.values():
        pairs = [(e.initial, sizes[e.name]) for e in group]
        # What has no width itself, such as a readout's bias, may have been initialized by the width or depth of others.
        width = group[0].width.multiplier if group[0].width is not None and group[0].width.widths else widest
        depth = group[0].depth_multiplier if group[0].depth_multiplier != 1 else deepest
        found.update(dict.fromkeys((e.name for e in group), correction(pairs, width, depth)))
    return found


def resolve(plan: Plan, model: nn.Module, *, keep: bool = False) -> Plan:
    """The plan with the factors on the values that the model has now; unchanged where it has none.

    A value is multiplied by the forward multiplier that it will contain, and by what its size lacks.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        known = [replace(e, scale=None if e.initial else e.folded * e.present) for e in plan.entries]
        return replace(plan, entries=tuple(known))
    originals = [entry for entry in plan.entries if copied(entry.name, plan.copies) is None]
    sizes = current_sizes(originals, model)
    _warn_of_zeros(unlike_zeros(originals, sizes))
    lacking = corrections(originals, model, sizes)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    entries, kept = [], []
    for entry in plan.entries:
        original = copied(entry.name, plan.copies)
        width, depth = lacking.get(original or entry.name, (1.0, 1.0))
        if original is None and entry.name not in trained:
            width = depth = 1.0
        rows = 1.0 if entry.width is None else entry.width.unnormalised_factor
        if original is None and entry.name not in trained:
            rows = 1.0
        if keep and abs(width * depth - 1) > NOTABLE:
            kept.append(f"{entry.name} ({1 / (width * depth):.3g} times its size)")
        elif keep and abs(rows - 1) > NOTABLE:
            kept.append(f"{entry.name} (its rows that no norm follows {1 / rows:.3g} times their size)")
        factor = 1.0 if keep else width * depth
        multiplier = entry.folded * entry.present  # the rest of what is folded, the value contains already
        scale = multiplier * factor
        reason = [] if factor == 1 else [f"{factor:.4g} takes its size to that of the base"]
        if factor != 1 and width != 1:
            reason[-1] += f" at width_mult {entry.width.multiplier:g}" if entry.width else ""
        if multiplier != 1:
            reason.append(f"{multiplier:.4g} is a forward multiplier")
        scale = 1.0 if abs(scale - 1) < 1e-9 else scale
        rows = 1.0 if keep else rows
        entries.append(replace(entry, scale=scale, scale_reason=", ".join(reason), rows_scale=rows))
    if kept:
        warnings.warn(
            f"initialization='keep' leaves {len(kept)} parameters at sizes that the rule does not give, beside the "
            f"base: {', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''}",
            UserWarning,
            stacklevel=4,
        )
    return replace(plan, entries=tuple(entries))


def unlike_zeros(entries: Sequence[PlannedParameter], sizes: Mapping[str, InitialSize | None]) -> list[str]:
    """Parameters that start at zero and not in the base, or in the base alone: no factor takes them to its size."""
    pairs = [(entry, sizes[entry.name]) for entry in entries if entry.initial is not None]
    return [e.name for e, size in pairs if e.initial and size and (e.initial.size == 0) != (size.size == 0)]


def _warn_of_zeros(unlike: Sequence[str]) -> None:
    if unlike:
        warnings.warn(
            f"{len(unlike)} parameters ({', '.join(unlike[:3])}{', ...' if len(unlike) > 3 else ''}) start at zero "
            "here and not in the base, or there and not here, and are left as they are. Their first steps are not the "
            "base's. Initialise both models by the same code",
            UserWarning,
            stacklevel=5,
        )
