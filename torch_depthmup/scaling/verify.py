"""The value of every residual branch on the example inputs, before and after the act.

The second pass hands on the first pass's branch values, so every branch is measured on exactly the inputs that it had
before, whatever was done to the branches below it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.errors import MeasurementError
from torch_depthmup.tracing.branches import Trace
from torch_depthmup.tracing.replay import Meter, run_metered

__all__ = ["branch_values", "check_branches", "filled"]

ROUNDING = 100  # tolerance in units of the dtype's rounding error
COARSEST = 0.05  # and never coarser than this, which a forgotten multiplier exceeds


@contextlib.contextmanager
def filled(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Temporary values in parameters that are zero throughout, since 0 = m * 0 proves nothing."""
    zero = {id(p): p for p in parameters if p.numel() and not p.any()}
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in zero.values():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 4
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
            parameter.copy_(values + (0.5 if parameter.ndim < 2 else 0.0))
        yield
    finally:
        for parameter in zero.values():
            parameter.zero_()


def branch_values(model: nn.Module, inputs: Any, found: Trace) -> list[Tensor]:
    """Each branch's value on the inputs.

    Raises:
        MeasurementError: a branch cannot be seen, or its value is zero or not finite.
    """
    for traced in found.traced:
        if traced.site is None:
            raise MeasurementError(
                f"{traced.branch.name}: its addition happens out of Python's sight (a scripted module?), so its value "
                "cannot be measured. Write the addition in Python, or use dm.Residual"
            )
    values: dict[int, Tensor] = {}

    def read(branch: int, value: Tensor, skip: Tensor) -> None:
        values[branch] = value.clone()

    run_metered(model, inputs, Meter(found, read))
    for i, branch in enumerate(found.branches):
        if i not in values:
            raise MeasurementError(
                f"{branch.name}: the branch was not there in a second pass on the same inputs. A network that changes "
                "from call to call cannot be measured; put it in evaluation mode"
            )
        size = float(values[i].float().norm())
        if not 0 < size < math.inf:
            raise MeasurementError(
                f"{branch.name}: the branch's value on the example inputs has norm {size}, so nothing can be measured. "
                "Pass example inputs on which the freshly initialized network is finite and not zero"
            )
    return [values[i] for i in range(len(found.branches))]


def check_branches(
    model: nn.Module, inputs: Any, found: Trace, before: Sequence[Tensor], multipliers: Sequence[float]
) -> None:
    """Compares each branch's value with its multiple of what it was.

    Raises:
        MeasurementError: a branch differs by more than rounding.
    """
    wrong: list[str] = []

    def compare(branch: int, value: Tensor, skip: Tensor) -> Tensor:
        wanted = before[branch].float() * multipliers[branch]
        error = float((value.float() - wanted).norm() / wanted.norm())
        if before[branch].dtype == torch.float64:
            wanted = before[branch] * multipliers[branch]
            error = float((value - wanted).norm() / wanted.norm())
        dtypes = [value.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())]
        tolerance = min(COARSEST, ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes))
        if not error <= tolerance:
            ratio = float(value.float().norm() / before[branch].float().norm())
            wrong.append(
                f"{found.branches[branch].name}: the branch should be {multipliers[branch]:.6g} times what it was, and "
                f"is {ratio:.6g} times (relative error {error:.2g}, tolerance {tolerance:.2g})"
            )
        return before[branch].clone()

    run_metered(model, inputs, Meter(found, compare))
    if wrong:
        raise MeasurementError(
            "; ".join(wrong[:3])
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            + ". The model is as it was. What lies between its last weights and the addition is not linear: write "
            "how='wrap' instead of 'fold', or exclude the branch"
        )
