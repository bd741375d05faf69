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

from torch_depthmup.clipping import ALIKE, LOOKS, ClippingNotice
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.rules import UNIT
from torch_depthmup.scaling.registry import (
    beside,
    folded_multipliers,
    owners,
    planned_parameters,
    trust_sizes,
    way_out_of_folding,
)
from torch_depthmup.schedules import SAME, overwritten

__all__ = ["watch"]

_watches: weakref.WeakKeyDictionary[Optimizer, _Watch] = weakref.WeakKeyDictionary()


def watch(optimizer: Optimizer) -> None:
    """Starts watching an optimizer with its groups as they are: their learning rates are the planned ones."""
    _watches[optimizer] = _Watch(optimizer)


class _Watch:
    """What is known of one optimizer's learning rates and gradients."""

    def __init__(self, optimizer: Optimizer):
        self.groups = groups = list(optimizer.param_groups)
        multipliers = [group.get("lr_multiplier") for group in groups]
        self.plain = all(m is None for m in multipliers)
        self.steps = 0
        self.values: dict[str, list[float]] = {}
        self.told = dict.fromkeys(("lr", "weight_decay"), self.plain)
        # Values that are meant to be one and the same although the multipliers differ say nothing of overwriting.
        self.one_value = {key: _is_one(_values(groups, key, 0) or []) for key in self.told}
        self.clipping: tuple[ClippingNotice, ...] = ()
        params = [p for group in groups for p in group["params"]]
        if self.plain:
            trust_sizes(params)
            _warn_if_plain(optimizer, params)
        elif any(m is None for m in multipliers):
            warnings.warn(
                f"group {multipliers.index(None)} of this {type(optimizer).__name__} has no multipliers while others "
                "have: it was added to a copy that was loaded from a pickle. Add groups before pickling, or make a new "
                "optimizer and load its state_dict",
                UserWarning,
                stacklevel=6,
            )
            self.told = dict.fromkeys(self.told, True)
        elif folded := [p for p, m in zip(params, folded_multipliers(params), strict=True) if m != 1.0]:
            self.clipping = ClippingNotice(), ClippingNotice()
            _WritingNotice(optimizer, folded)

    def look(self, optimizer: Optimizer) -> None:
        """Before one step."""
        if self.plain:
            return
        self.steps += 1
        for key, told in self.told.items():
            if not told and (found := self._overwritten(optimizer, key)):
                self.told[key] = True
                warnings.warn(found, UserWarning, stacklevel=5)
        if self.clipping and ClippingNotice.looks_at(self.steps):
            self._look_for_clipping(optimizer)

    def _look_for_clipping(self, optimizer: Optimizer) -> None:
        """At the gradients of this optimizer, and of the whole model where others train the rest of it."""
        own = [p for group in optimizer.param_groups for p in group["params"]]
        every = beside(own)
        for notice, params in zip(self.clipping, [own, every] if len(every) > len(own) else [own], strict=False):
            if found := notice.look(params):
                warnings.warn(found, UserWarning, stacklevel=6)
                self.clipping = ()
                return

    def _overwritten(self, optimizer: Optimizer, key: str) -> str | None:
        groups = optimizer.param_groups
        if len(groups) < len(self.groups) and all(any(group is known for known in self.groups) for group in groups):
            groups = self.groups  # DeepSpeed's ZeRO steps one group at a time
        values = _values(groups, key, self.steps)
        if values is None or values == self.values.get(key):
            return None
        self.values[key] = values
        if any(f"{key}_multiplier" not in group for group in groups):
            return None
        scheduled = hasattr(optimizer.step, "_wrapped_by_lr_sched")
        return overwritten(groups, values, key, self.one_value[key], scheduled)


class _WritingNotice:
    """Tells from the first steps that folded weights are written to between them: SAM, clamping, noise.

    Hangs on the optimizer for as long as it looks, as a hook that copies and pickles leave behind.
    """

    def __init__(self, optimizer: Optimizer, folded: list[Tensor]):
        plain = [p for p in folded if type(p.data) is Tensor]
        self.looks = self.written = 0
        if plain:
            self.weight = min(plain, key=lambda p: (p.ndim < 2, p.numel()))
            self.left: tuple[int, int, Tensor] | None = None
            self.handles = [
                optimizer.register_step_pre_hook(self.before),
                optimizer.register_step_post_hook(self.after),
            ]

    def before(self, optimizer: Optimizer, args: Any, options: Any) -> None:
        """Whether the weight is as the last step left it. What takes a write back leaves its rounding, or a count."""
        if self.left is None or torch.compiler.is_compiling():
            return
        version, address, value = self.left
        weight = self.weight
        same = (weight._version, weight.data_ptr()) == (version, address)
        same = same and (torch.equal(weight, value) or bool(value.isnan().any()))  # nan is not equal to itself
        self.looks += 1
        self.written = 0 if same else self.written + 1
        if self.written == ALIKE:
            warnings.warn(
                f"something writes to folded weights between the steps of {type(optimizer).__name__} (SAM, clamping, "
                "noise?). A folded weight is m times that of the network with explicit multipliers, so what depends on "
                f"a weight's or a gradient's size does something else to it. Write {way_out_of_folding([weight])}",
                UserWarning,
                stacklevel=4,
            )
        if self.written == ALIKE or self.looks >= LOOKS:
            for handle in self.handles:
                handle.remove()

    def after(self, optimizer: Optimizer, args: Any, options: Any) -> None:
        """How the step leaves the weight."""
        # DeepSpeed's ZeRO and apex put other tensors into the groups, and write to the weights after the step.
        stepped = any(p is self.weight for group in optimizer.param_groups for p in group["params"])
        self.left = None
        if stepped and not torch.compiler.is_compiling():
            self.left = self.weight._version, self.weight.data_ptr(), self.weight.detach().clone()


def _values(groups: list[dict[str, Any]], key: str, steps: int) -> list[float] | None:
    """The learning rates, or decays, as numbers; those that wait for a device only now and then."""
    values = []
    for group in groups:
        value = group.get(key)
        if isinstance(value, Tensor) and (value.is_meta or (value.device.type != "cpu" and steps & (steps - 1))):
            return None
        if not isinstance(value, Tensor | float | int):
            return None
        values.append(float(value))
    return values


def _is_one(values: list[float]) -> bool:
    """Whether several values are the same, but for rounding. Zeros say nothing: no decay is none in every group."""
    live = [value for value in values if value]
    return len(live) > 1 and max(live) - min(live) <= SAME * max(live)


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
