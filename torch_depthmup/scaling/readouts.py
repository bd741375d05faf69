"""Weights that read out of a width: each gets mup's 1 / width_mult, or what of it the forward pass lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torch_depthmup.errors import PlanError
from torch_depthmup.rules import readout_multiplier
from torch_depthmup.running import normalise_name
from torch_depthmup.scaling import width as widths
from torch_depthmup.scaling.copies import copied
from torch_depthmup.scaling.matching import counterparts
from torch_depthmup.scaling.plan import Copy, Hook, PlannedParameter
from torch_depthmup.scaling.responses import Looked, missing_power, response_ratios
from torch_depthmup.tracing.branches import Trace
from torch_depthmup.tracing.uses import Use

__all__ = ["missing_powers", "refuse_computed", "with_readouts"]


def missing_powers(
    model: tuple[nn.Module, Any],
    base: tuple[nn.Module, Any],
    found: Trace,
    base_found: Trace,
    entries: Sequence[PlannedParameter],
    factors: Mapping[str, float],
    seen: Mapping[str, float],
) -> dict[str, float]:
    """For each readout the exponent of 1 / width_mult that it lacks, measured where that can be.

    Args:
        model: with values, and its example inputs.
        base: likewise.
        found: the model's trace.
        base_found: the base's.
        entries: of the plan.
        factors: that give the parameters their planned sizes.
        seen: what the numbers around a readout's product leave of it, where that is not all.
    """
    names = {normalise_name(name): name for name, _ in base[0].named_parameters()}
    others = counterparts([entry.name for entry in entries], names)
    looked, read = {}, {}
    for entry in entries:
        other = others[entry.name]
        if not _is_readout(entry) or other is None or other.name not in names:
            continue
        assert entry.width is not None and entry.width.summed is not None
        use, its = _seen_use(found, entry.name), _seen_use(base_found, names[other.name])
        if use is None or its is None or use.is_last != its.is_last or entry.width.multiplier == 1:
            continue
        places = [None if one.is_last else one.modules[0][0] for one in (use, its)]
        looked[entry.name] = Looked(names[other.name], entry.width.summed, *places)
        read[entry.name] = entry.width.multiplier, use.is_direct
    ratios = response_ratios(model, base, looked, factors) if looked else {}
    measured = {
        name: missing_power(ratio, read[name][0], expected=seen.get(name, 1.0), is_plain=read[name][1])
        for name, ratio in ratios.items()
    }
    return {**seen, **measured}


def _seen_use(found: Trace, name: str) -> Use | None:
    """The first product of a weight, if its effect can be seen: in the outputs, or in what a module returns."""
    use = next((use for use in found.uses.get(name, ()) if use.is_weight_operation), None)
    return use if use is not None and (use.is_last or use.modules) else None


def refuse_computed(found: Trace, entries: Sequence[PlannedParameter]) -> None:
    """Refuses readouts whose weight is computed from parameters, where there are no values to measure them with."""
    for entry in entries:
        if _is_readout(entry) and any(
            u.is_weight_operation and not u.is_direct for u in found.uses.get(entry.name, ())
        ):
            raise PlanError(
                f"{entry.name} reads out of a width through a weight that is computed from it (weight norm, spectral "
                "norm), and what that asks for is measured, which needs values. Build model and base on a real device "
                "to plan, or leave the readout plain while planning"
            )


def _is_readout(entry: PlannedParameter) -> bool:
    return entry.width is not None and entry.width.kind == "readout"


def _refuse_scaled(entry: PlannedParameter) -> None:
    """Refuses mup's own readout of embeddings that the forward pass multiplies: it knows nothing of that factor."""
    if entry.present != 1:
        raise PlanError(
            f"{entry.name} is multiplied by {entry.present:.4g} where it is looked up, relative to the base, and read "
            "out by mup.MuSharedReadout, which does not make up for that. Tie an nn.Linear to it instead"
        )


def with_readouts(
    model: nn.Module,
    found: Trace,
    entries: Sequence[PlannedParameter],
    copies: Sequence[Copy],
    missing: Mapping[str, float],
) -> tuple[list[PlannedParameter], tuple[Hook, ...]]:
    """Multiplier 1 / width_mult, or the power of it in ``missing``, for every weight from a width to fixed outputs.

    It is folded into the weight where nothing else uses it; else it hangs on the module that returns the product, and
    what is added there is folded the other way.

    Raises:
        PlanError: the weight is shared or reparametrized, and no module returns the product.
    """
    own = widths.mup_readouts(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    changed = {entry.name: entry for entry in entries}
    hung = []
    for entry in entries:
        if entry.width is None or not _is_readout(entry):
            continue
        if entry.name in own:
            _refuse_scaled(entry)
            continue
        if entry.name in frozen and copied(entry.name, copies) is None:
            continue
        power = missing.get(entry.name, 1.0)
        multiplier = readout_multiplier(entry.width.multiplier, power)
        present = readout_multiplier(entry.width.multiplier, 1 - power)
        there = f" ({present:.4g} of it is there already)" if power < 1 else ""
        there = f" (the forward pass multiplies it by {present:.4g})" if power > 1 else there
        entry = replace(changed[entry.name], reason=f"{entry.reason}; a readout{there}")
        changed[entry.name] = entry
        hanging = multiplier * entry.present  # an embedding's own factor is missing in the values that are read out
        if hanging == 1:
            continue
        uses = found.uses.get(entry.name, ())
        if all(use.is_weight_operation and use.is_direct for use in uses):
            changed[entry.name] = replace(entry, folded=entry.folded * multiplier)
            continue
        for use in (use for use in uses if use.is_weight_operation):
            if not use.modules:
                raise PlanError(
                    f"{entry.name} reads out of a width and is shared or reparametrized, so that width's multiplier "
                    "cannot be folded into it, and no module returns the product to hang it on. Use "
                    "mup.MuSharedReadout, or a base of the same width"
                )
            hung.append(Hook(*use.modules[0], hanging))
            for partner in (changed[name] for name in use.partners if name in changed and name != entry.name):
                if partner.width is None or not partner.width.widths:
                    changed[partner.name] = replace(partner, folded=partner.folded / hanging)
        changed[entry.name] = replace(changed[entry.name], reason=f"{entry.reason}, its product times {hanging:.4g}")
    return list(changed.values()), tuple(dict.fromkeys(hung))
