"""The same forward pass again, with each residual addition's operands seen or replaced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_depthmup.running import exact_matrix_products, has_batch_statistics, quiet, trial
from torch_depthmup.tracing.branches import Trace
from torch_depthmup.tracing.operations import FUSED, Operands, Sums

__all__ = ["AtAdditions", "Meter", "run_metered"]


class AtAdditions(TorchFunctionMode):
    """Does `meet` in place of each residual addition of one forward pass, told from all others by its number.

    Args:
        found: a trace of the model that runs.
    """

    def __init__(self, found: Trace):
        super().__init__()
        self.sites = {t.site.number: (t.site.operand, i) for i, t in enumerate(found.traced) if t.site is not None}
        self.seen = found.sums
        self.rounding = 0.0  # the largest rounding error among the dtypes that occur in the pass
        self.sums = Sums()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = self.sums.operands(func, args, kwargs)
        number = self.sums.number(func) if operands is not None else None
        site = self.sites.get(number) if number is not None else None
        if operands is not None and site is not None:
            position, branch = site
            return self.meet(branch, position, operands(), func, args, kwargs)
        if operands is not None and number not in self.seen:
            result = self.meet_hidden(operands, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype.is_floating_point:
            self.rounding = max(self.rounding, torch.finfo(result.dtype).eps)
        self.sums.note(func, args, kwargs, result)
        return result

    def meet(self, branch: int, position: int, operands: Operands, func: Callable, args: tuple, kwargs: dict) -> Any:
        """What ``func(*args, **kwargs)`` should return; ``operands[position]`` is the branch's value."""
        return func(*args, **kwargs)

    def meet_hidden(self, operands: Callable[[], Operands], func: Callable, args: tuple, kwargs: dict) -> Any:
        """The same for a sum that is not in the trace: it runs without gradient, or is detached."""
        return func(*args, **kwargs)


class Meter(AtAdditions):
    """Shows branch and skip of each residual addition to a visitor, and hands on what it returns as the branch.

    Args:
        found: a trace of the model that runs.
        visit: the visitor.
        visit_hidden: gets the operands and the value of each sum that is not in the trace, and may return another.
    """

    def __init__(
        self,
        found: Trace,
        visit: Callable[[int, Tensor, Tensor], Tensor | None],
        visit_hidden: Callable[[Operands, Tensor], Tensor | None] | None = None,
    ):
        super().__init__(found)
        self.visit, self.visit_hidden = visit, visit_hidden

    def meet_hidden(self, operands: Callable[[], Operands], func: Callable, args: tuple, kwargs: dict) -> Any:
        if self.visit_hidden is None:
            return func(*args, **kwargs)
        first, second = (operand.detach().clone() for operand in operands())
        result = func(*args, **kwargs)
        changed = self.visit_hidden((first, second), result)
        if changed is not None:
            with torch.no_grad():
                result.copy_(changed)
        return result

    def meet(self, branch: int, position: int, operands: Operands, func: Callable, args: tuple, kwargs: dict) -> Any:
        value = self.visit(branch, operands[position].detach(), operands[1 - position].detach())
        if value is None:
            return func(*args, **kwargs)
        if func.__name__.removesuffix("_") in (*FUSED, "sum", "mean", "einsum"):
            result = operands[1 - position] + value
            if not func.__name__.endswith("_"):
                return result
            with torch.no_grad():
                return args[0].copy_(result)
        if position == 0 and func.__name__ in ("add_", "sub_", "subtract_", "__iadd__", "__isub__"):
            with torch.no_grad():
                operands[0].copy_(value)  # the caller goes on with this very tensor
            return func(*args, **kwargs)
        changed = (value, operands[1]) if position == 0 else (operands[0], value)
        rest = {key: item for key, item in kwargs.items() if key not in ("input", "other")}
        return func(*changed, *args[2:], **rest)


def run_metered(model: nn.Module, inputs: Any, meter: AbstractContextManager) -> Any:
    """The model's output; batch statistics where the batch has any: running ones of a fresh network are of no data."""
    with quiet(model, batch_statistics=has_batch_statistics(model, inputs)), exact_matrix_products(), meter:
        return trial(model, inputs)
