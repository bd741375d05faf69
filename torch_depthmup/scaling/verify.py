"""Measures that a plan was carried out: the value of every residual branch, and every output of the whole network.

The second pass hands on the first pass's branch values. So every branch is measured on exactly the inputs that it had
before, whatever was done to the branches below it, and every output must be what it was: a multiplier that reaches
anything but its addition is seen there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_depthmup.errors import MeasurementError
from torch_depthmup.running import tensors_in
from torch_depthmup.tracing.branches import Trace
from torch_depthmup.tracing.replay import Meter, run_metered

__all__ = ["Measured", "check_branches", "differing_output", "filled", "measured"]

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


@dataclass(frozen=True)
class Measured:
    """What a network gives on the example inputs.

    Args:
        branches: each branch's value.
        outputs: each floating-point tensor of the model's output, auxiliary ones too.
        tolerance: the relative error that rounding makes at the coarsest precision among parameters and what the
            network computes (autocast).
    """

    branches: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerance: float


class _Coarsest(TorchFunctionMode):
    """Notes the rounding error of the coarsest precision that one forward pass computes in."""

    eps = 0.0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        return result


def _run(model: nn.Module, inputs: Any, meter: Meter) -> Any:
    torch.clear_autocast_cache()  # it keeps casts of weights that have been multiplied since
    return run_metered(model, inputs, meter)


def measured(model: nn.Module, inputs: Any, found: Trace) -> Measured:
    """Each branch's value and each output on the inputs.

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

    with _Coarsest() as computed:
        output = _run(model, inputs, Meter(found, read))
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
    kept = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    tolerance = min(COARSEST, ROUNDING * max([computed.eps, *kept]))
    return Measured(tuple(values[i] for i in range(len(found.branches))), _floating(output), tolerance)


def check_branches(model: nn.Module, inputs: Any, found: Trace, before: Measured, multipliers: Sequence[float]) -> None:
    """Compares each branch's value with its multiple of what it was.

    Raises:
        MeasurementError: a branch differs by more than rounding.
    """
    wrong: list[str] = []

    def compare(branch: int, value: Tensor, skip: Tensor) -> Tensor:
        was, multiplier = before.branches[branch], multipliers[branch]
        wide = torch.float64 if was.dtype == torch.float64 else torch.float32
        wanted = was.to(wide) * multiplier
        error = float((value.to(wide) - wanted).norm() / wanted.norm())
        if not error <= before.tolerance:
            ratio = float(value.to(wide).norm() / was.to(wide).norm())
            wrong.append(
                f"{found.branches[branch].name}: the branch should be {multiplier:.6g} times what it was, and is "
                f"{ratio:.6g} times (relative error {error:.2g}, tolerance {before.tolerance:.2g})"
            )
        return was.clone()

    _run(model, inputs, Meter(found, compare))
    if wrong:
        raise MeasurementError(
            "; ".join(wrong[:3])
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            + ". The model is as it was. What lies between its last weights and the addition is not linear: write "
            "how='wrap' instead of 'fold', or exclude the branch"
        )


def differing_output(model: nn.Module, inputs: Any, found: Trace, before: Measured) -> str | None:
    """Which output is not what it was although all branches hand on their old values; ``None`` where there is none.

    Such an output sees a multiplier by another way than the residual addition.
    """
    output = _run(model, inputs, Meter(found, lambda branch, value, skip: before.branches[branch].clone()))
    after = _floating(output)
    for i, (value, was) in enumerate(zip(after, before.outputs, strict=True)):
        wide = torch.float64 if was.dtype == torch.float64 else torch.float32
        error = float((value.to(wide) - was.to(wide)).nan_to_num().norm())
        size = float(was.to(wide).nan_to_num().norm())
        if error > before.tolerance * size:
            return "the output" if len(after) == 1 else f"output {i} (of {len(after)})"
    return None


def _floating(output: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone() for tensor in tensors_in(output) if tensor.is_floating_point())
