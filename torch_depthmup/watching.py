"""What is looked at before an optimizer's step: rates that were overwritten, clipping, and optimizers without a plan.

One hook on all optimizers, which keeps nothing on them, so that they copy and pickle as torch's own. It looks at plain
numbers, and at gradients in the first steps only.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch_depthmup.clipping import ClippingNotice
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.rules import UNIT
from torch_depthmup.scaling.registry import folded_multipliers, owners, planned_parameters
from torch_depthmup.schedules import SAME, overwritten

__all__ = ["watch"]

_watches: weakref.WeakKeyDictionary[Optimizer, _Watch] = weakref.WeakKeyDictionary()


def watch(optimizer: Optimizer) -> None:
    """Starts watching an optimizer with its groups as they are: their learning rates are the planned ones."""
    _watches[optimizer] = _Watch(optimizer)


class _Watch:
    """What is known of one optimizer's learning rates and gradients."""

    def __init__(self, optimizer: Optimizer):
        groups = optimizer.param_groups
        multipliers = [group.get("lr_multiplier") for group in groups]
        self.plain = all(m is None for m in multipliers)
        self.steps = 0
        self.rates: list[float] = []
        self.told_rates = self.plain
        planned = _rates(groups, 0) or []
        # Rates that are meant to be one and the same although the multipliers differ say nothing of overwriting.
        self.one_rate = len(planned) > 1 and max(planned) - min(planned) <= SAME * max(planned)
        self.clipping: ClippingNotice | None = None
        params = [p for group in groups for p in group["params"]]
        if self.plain:
            _warn_if_plain(optimizer, params)
        elif any(m is None for m in multipliers):
            warnings.warn(
                f"group {multipliers.index(None)} of this {type(optimizer).__name__} has no multipliers while others "
                "have: it was added to a copy that was loaded from a pickle. Add groups before pickling, or make a new "
                "optimizer and load its state_dict",
                UserWarning,
                stacklevel=6,
            )
            self.told_rates = True
        elif any(m != 1.0 for m in folded_multipliers(params)):
            self.clipping = ClippingNotice()

    def look(self, optimizer: Optimizer) -> None:
        """Before one step."""
        if self.plain:
            return
        self.steps += 1
        if not self.told_rates and (found := self._overwritten(optimizer)):
            self.told_rates = True
            warnings.warn(found, UserWarning, stacklevel=5)
        if self.clipping is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            found = self.clipping.look(params)
            if found:
                warnings.warn(found, UserWarning, stacklevel=5)
            if found or self.clipping.finished:
                self.clipping = None

    def _overwritten(self, optimizer: Optimizer) -> str | None:
        groups = optimizer.param_groups
        rates = _rates(groups, self.steps)
        if rates is None or rates == self.rates:
            return None
        self.rates = rates
        if any("lr_multiplier" not in group for group in groups):
            return None
        scheduled = hasattr(optimizer.step, "_wrapped_by_lr_sched")
        return overwritten(groups, rates, self.one_rate, scheduled)


def _rates(groups: list[dict[str, Any]], steps: int) -> list[float] | None:
    """The learning rates as numbers; those that wait for a device only now and then."""
    rates = []
    for group in groups:
        rate = group.get("lr")
        if isinstance(rate, Tensor) and (rate.is_meta or (rate.device.type != "cpu" and steps & (steps - 1))):
            return None
        if not isinstance(rate, Tensor | float | int):
            return None
        rates.append(float(rate))
    return rates


def _warn_if_plain(optimizer: Optimizer, params: list[Tensor]) -> None:
    """Says once that an optimizer steps scaled parameters without their multipliers."""
    if not owners():
        return
    planned = planned_parameters()
    family = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adam"
    for parameter in params:
        if id(parameter) not in planned:
            continue
        plan, name = planned[id(parameter)]
        try:
            if plan.multipliers(name, family) == UNIT:
                continue
        except DepthMuPError:
            continue  # added after the plan, or with more widths than there are rules for
        made = type(optimizer).__name__
        short = f"dm.{made}" if made in ("SGD", "Adam", "AdamW", "Muon") else f"dm.optimizer({made})"
        warnings.warn(
            f"a plain {made} steps the parameters of a parametrized model: {name} and others train without the plan's "
            f"lr multipliers. Make it with {short}(model.parameters(), ...), or call dm.rescale(optimizer, model) "
            "after it was made",
            UserWarning,
            stacklevel=7,
        )
        return


def _before_step(optimizer: Optimizer, args: Any, options: Any) -> None:
    if torch.compiler.is_compiling():
        return
    known = _watches.get(optimizer)
    if known is None:
        known = _watches[optimizer] = _Watch(optimizer)
    known.look(optimizer)


register_optimizer_step_pre_hook(_before_step)
