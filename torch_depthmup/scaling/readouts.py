"""Weights that read out of a width: each gets mup's 1 / width_mult, where the forward pass has none of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from torch_depthmup.errors import PlanError
from torch_depthmup.scaling import width as widths
from torch_depthmup.scaling.copies import copied
from torch_depthmup.scaling.plan import Copy, Hook, PlannedParameter
from torch_depthmup.tracing.branches import Trace

__all__ = ["with_readouts"]


def with_readouts(
    model: nn.Module, found: Trace, entries: Sequence[PlannedParameter], copies: Sequence[Copy]
) -> tuple[list[PlannedParameter], tuple[Hook, ...]]:
    """Multiplier 1 / width_mult for every weight from a width to a fixed number of outputs.

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
        if entry.width is None or entry.width.kind != "readout" or entry.name in own:
            continue
        if entry.name in frozen and copied(entry.name, copies) is None:
            continue
        multiplier = 1 / entry.width.multiplier
        uses = found.uses.get(entry.name, ())
        if all(use.is_weight_operation and use.is_direct for use in uses):
            changed[entry.name] = replace(
                entry, folded=changed[entry.name].folded * multiplier, reason=f"{entry.reason}; a readout"
            )
            continue
        for use in (use for use in uses if use.is_weight_operation):
            if not use.modules:
                raise PlanError(
                    f"{entry.name} reads out of a width and is shared or reparametrized, so that width's multiplier "
                    "cannot be folded into it, and no module returns the product to hang it on. Use "
                    "mup.MuSharedReadout, or a base of the same width"
                )
            hung.append(Hook(*use.modules[0], multiplier))
            for partner in (changed[name] for name in use.partners if name in changed and name != entry.name):
                if partner.width is None or not partner.width.widths:
                    changed[partner.name] = replace(partner, folded=partner.folded / multiplier)
        changed[entry.name] = replace(
            changed[entry.name], reason=f"{entry.reason}; a shared readout, its product times {multiplier:.4g}"
        )
    return list(changed.values()), tuple(dict.fromkeys(hung))
