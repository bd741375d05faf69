"""Measures that a plan was carried out: the value of every residual branch, and every output of the whole network.

The second pass hands on the first pass's branch values. So every branch is measured on exactly the inputs that it had
before, whatever was done to the branches below it, and every output must be what it was: a multiplier that reaches
anything but its addition is seen there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.errors import MeasurementError
from torch_depthmup.running import tensors_in
from torch_depthmup.tracing.branches import Trace
from torch_depthmup.tracing.operations import Operands
from torch_depthmup.tracing.replay import Meter, run_metered

__all__ = ["Differences", "Measured", "differences", "entries", "filled", "measured", "scaled"]

ROUNDING = 100  # tolerance in units of the dtype's rounding error
COARSEST = 0.05  # and never coarser than this, which a forgotten multiplier exceeds


@contextlib.contextmanager
def filled(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Temporary values in parameters that are zero throughout, since 0 = m * 0 proves nothing."""
    zero = {id(p): p for p in parameters if p.numel() and not p.any()}
    generator = torch.Generator().manual_seed(0)
    watched = torch.is_grad_enabled()
    with torch.no_grad():
        try:
            for parameter in zero.values():
                fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 4
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
                parameter.copy_(values / math.sqrt(fan_in) + (0.5 if parameter.ndim < 2 else 0.0))
            with torch.set_grad_enabled(watched):
                yield
        finally:
            for parameter in zero.values():
                parameter.zero_()


@contextlib.contextmanager
def scaled(parameters: Iterable[tuple[Tensor, float]]) -> Iterator[None]:
    """Temporary factors on parameters; their values come back as they were."""
    changed = [(parameter, factor) for parameter, factor in parameters if factor != 1.0]
    saved = [parameter.detach().clone() for parameter, _ in changed]
    watched = torch.is_grad_enabled()
    with torch.no_grad():
        try:
            for parameter, factor in changed:
                parameter.mul_(factor)
            with torch.set_grad_enabled(watched):
                yield
        finally:
            for (parameter, _), value in zip(changed, saved, strict=True):
                parameter.copy_(value)


@dataclass(frozen=True)
class Measured:
    """What a network gives on the example inputs.

    Args:
        branches: each branch's value.
        outputs: each floating-point tensor of the model's output, auxiliary ones too.
        rounding: the relative error that rounding may make, at the coarsest precision that occurs in the pass.
        hidden: two operands and the value of each sum that runs without gradient or is detached, as in a network that
            gets its own output once more.
    """

    branches: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    rounding: float
    hidden: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class Differences:
    """What is not as it should be: branches by their index, each in words; and the first such output, if any."""

    branches: Mapping[int, str]
    output: str | None

    def __bool__(self) -> bool:
        return bool(self.branches or self.output)


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

    hidden: list[tuple[Tensor, Tensor, Tensor]] = []

    def read_hidden(operands: Operands, value: Tensor) -> None:
        hidden.append((*operands, value.clone()))

    meter = Meter(found, read, read_hidden)
    output = run_metered(model, inputs, meter)
    for i, branch in enumerate(found.branches):
        if i not in values:
            raise MeasurementError(
                f"{branch.name}: the branch was not there in a second pass on the same inputs. A network that changes "
                "from call to call cannot be measured; put it in evaluation mode"
            )
        size = float(entries(values[i]).norm())
        if not 0 < size < math.inf:
            raise MeasurementError(
                f"{branch.name}: the branch's value on the example inputs has norm {size}, so nothing can be measured. "
                "Pass example inputs on which the freshly initialized network is finite and not zero"
            )
    branches = tuple(values[i] for i in range(len(found.branches)))
    return Measured(branches, _floating(output), ROUNDING * max(meter.rounding, _coarsest(model)), tuple(hidden))


def differences(
    model: nn.Module, inputs: Any, found: Trace, before: Measured, multipliers: Sequence[float]
) -> Differences:
    """Compares each branch's value with its multiple of what it was, and each output with what it was.

    All branches hand on their old values. An output that is not what it was sees a multiplier by another way than the
    residual addition, and so does a branch whose multiplier is 1. Where that shows, and some sums run without gradient
    or are detached, these are looked at and hand on their old values too.
    """
    wrong = _differences(model, inputs, found, before, multipliers, None)
    if not wrong or not before.hidden:
        return wrong
    hidden = _Hidden(before, multipliers)
    again = _differences(model, inputs, found, before, multipliers, hidden)
    return wrong if hidden.differs else again


class _Hidden:
    """Looks at each hidden sum: its operands must be what they were, or that times a multiplier."""

    def __init__(self, before: Measured, multipliers: Sequence[float]):
        self.left, self.differs = list(before.hidden[::-1]), False
        self.factors, self.rounding = {1.0, *multipliers}, min(COARSEST, before.rounding)

    def __call__(self, operands: Operands, value: Tensor) -> Tensor | None:
        if not self.left or self.left[-1][2].shape != value.shape:
            self.differs = True
            return None
        *were, was = self.left.pop()
        factors = [self._factor(now, then) for now, then in zip(operands, were, strict=True)]
        self.differs |= None in factors
        return was * factors[0] if factors[0] is not None and factors[0] == factors[1] else was

    def _factor(self, now: Tensor, then: Tensor) -> float | None:
        new, old = (entries(value).nan_to_num(0.0, 0.0, 0.0) for value in (now, then))  # masks are infinite
        off = {f: float((new - f * old).norm()) for f in sorted(self.factors, reverse=True)}
        return next((f for f, error in off.items() if error <= self.rounding * f * float(old.norm())), None)


def _differences(
    model: nn.Module,
    inputs: Any,
    found: Trace,
    before: Measured,
    multipliers: Sequence[float],
    hidden: _Hidden | None,
) -> Differences:
    wrong: dict[int, str] = {}

    def compare(branch: int, value: Tensor, skip: Tensor) -> Tensor:
        was, multiplier = before.branches[branch], multipliers[branch]
        wanted = entries(was) * multiplier
        error = float((entries(value) - wanted).norm() / wanted.norm())
        tolerance = min(COARSEST, before.rounding)
        if not error <= tolerance:
            ratio = float(entries(value).norm() / entries(was).norm())
            wrong[branch] = (
                f"{found.branches[branch].name}: the branch should be {multiplier:.6g} times what it was, and is "
                f"{ratio:.6g} times (relative error {error:.2g}, tolerance {tolerance:.2g})"
            )
        return _in_place_of(value, was)

    after = _floating(run_metered(model, inputs, Meter(found, compare, hidden)))
    for i, (value, was) in enumerate(zip(after, before.outputs, strict=True)):
        error = float((entries(value) - entries(was)).nan_to_num().norm())
        if error > before.rounding * float(entries(was).nan_to_num().norm()):
            return Differences(wrong, "the output" if len(after) == 1 else f"output {i} (of {len(after)})")
    return Differences(wrong, None)


def entries(value: Tensor) -> Tensor:
    """The entries of a tensor as real numbers, in a precision in which their differences are exact enough."""
    if value.is_nested:
        value = torch.cat([part.flatten() for part in value.unbind()])
    if value.is_complex():
        value = torch.view_as_real(value)
    return value if value.dtype == torch.float64 else value.float()


def _in_place_of(value: Tensor, was: Tensor) -> Tensor:
    """An earlier value for a later pass, in which the sizes of ragged tensors may be other symbols."""
    if value.is_nested and value.layout is torch.jagged:
        offsets: Any = value
        return torch.nested.nested_tensor_from_jagged(was.values().clone(), offsets.offsets())
    return was.clone()


def _coarsest(model: nn.Module) -> float:
    return max((torch.finfo(p.dtype).eps for p in model.parameters() if p.dtype.is_floating_point), default=0.0)


def _floating(output: Any) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone() for t in tensors_in(output) if t.is_floating_point() or t.is_complex())
