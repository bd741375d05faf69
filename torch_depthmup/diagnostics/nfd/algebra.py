"""What optimizers do with weights that are never formed and their gradients: sums, multiples, copies, norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.elementwise import filled
from torch_depthmup.diagnostics.nfd.entries import pointwise
from torch_depthmup.diagnostics.nfd.implicit import HANDLERS, ImplicitWeight
from torch_depthmup.diagnostics.nfd.margins import Margin, margin_norms
from torch_depthmup.diagnostics.nfd.spanned import Spanned
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix

__all__: list[str] = []

aten = torch.ops.aten


def _t(weight: ImplicitWeight, *axes: int) -> Any:
    if weight.cell.kernel:
        return NotImplemented
    if axes and axes[0] % 2 == axes[1] % 2:
        return weight
    return weight.view(turned=True)


def _add(weight: Tensor, other: Any, *, alpha: float = 1) -> Any:
    if isinstance(weight, ImplicitWeight) and isinstance(other, Spanned) and not weight.transposed:
        change = other.coordinates.to(weight.dtype)[None]
        return weight.like(weight.matrix.plus(TrainedMatrix(weight.matrix.start, 0.0, change), float(alpha)))
    if not (isinstance(weight, ImplicitWeight) and isinstance(other, ImplicitWeight)):
        return NotImplemented
    if weight.transposed != other.transposed or weight.matrix.start is not other.matrix.start:
        return NotImplemented
    return weight.like(weight.matrix.plus(other.matrix, float(alpha)))


def _sub(weight: Tensor, other: Any, *, alpha: float = 1) -> Any:
    return _add(weight, other, alpha=-alpha)


def _mul(weight: Any, factor: Any) -> Any:
    if not isinstance(weight, ImplicitWeight):
        weight, factor = factor, weight
    if isinstance(factor, Tensor) and (isinstance(factor, ImplicitWeight) or factor.numel() != 1):
        return NotImplemented
    return weight.like(weight.matrix.times(float(factor)))


def _div(weight: Any, divisor: Any) -> Any:
    if isinstance(divisor, Tensor) and (isinstance(divisor, ImplicitWeight) or divisor.numel() != 1):
        return NotImplemented
    return _mul(weight, 1 / float(divisor))


def _lerp(weight: Any, other: Any, share: Any) -> Any:
    kept = _mul(weight, 1 - float(share))
    return kept if kept is NotImplemented else _add(kept, other, alpha=float(share))


def _in_place(made: Callable[..., Any]) -> Callable[..., Any]:
    def act(weight: Any, *args: Any, **kwargs: Any) -> Any:
        result = made(weight, *args, **kwargs) if isinstance(weight, ImplicitWeight) else NotImplemented
        if result is NotImplemented:
            return NotImplemented
        weight.cell.value = result.cell.value
        return weight

    return act


def _full(weight: ImplicitWeight, value: float, **_: Any) -> ImplicitWeight:
    zero = weight.matrix.times(0.0)
    return weight.like(filled(zero, pointwise(torch.add, zero.known, value)))


def _copy(weight: ImplicitWeight, other: Any, non_blocking: bool = False) -> Any:
    if not isinstance(other, ImplicitWeight) or other.matrix.start is not weight.matrix.start:
        return NotImplemented
    return weight.like(other.matrix)


def _to(weight: ImplicitWeight, *args: Any, **kwargs: Any) -> Any:
    """Where it is already, and of the type it has; it cannot be moved. What training made may lose precision."""
    low = not weight.matrix.gain and weight.matrix.entries is None
    if kwargs == {"dtype": torch.bfloat16} and low and not weight.cell.kernel:
        change = weight.matrix.change[0].to(torch.bfloat16)
        return Spanned.of(tuple(weight.shape), change.T if weight.transposed else change, weight.cell.name)
    kept = (weight.dtype, weight.device, None, False)
    wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype | torch.device)]
    return weight.view() if all(a in kept for a in wanted) else NotImplemented


def _any(weight: ImplicitWeight) -> Tensor:
    matrix = weight.matrix
    return torch.tensor(bool(matrix.gain * matrix.start.std) or bool(matrix.norm()))


def _norm(
    weight: ImplicitWeight, order: float = 2, dim: Any = None, keep: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    if order != 2:
        return NotImplemented
    if not dim and not keep:
        return weight.matrix.norm()[0].to(dtype or weight.dtype)
    axes = [dim] if isinstance(dim, int) else list(dim or ())
    if len(axes) != 1 or not keep or weight.cell.kernel or weight.transposed:
        return NotImplemented
    norms = margin_norms(weight.matrix, axes[0] % 2)
    return NotImplemented if norms is None else _margin(weight, norms.to(dtype or weight.dtype))


def _margin(weight: ImplicitWeight, numbers: Tensor) -> Margin:
    return Margin.of(numbers, weight.matrix, lambda value: weight.like(value))


def _new_zeros(weight: ImplicitWeight, size: Any, **options: Any) -> Any:
    rows, columns = weight.shape[0], weight.shape[-1]
    if weight.cell.kernel or weight.transposed or tuple(size) not in ((rows, 1), (1, columns)):
        return NotImplemented
    return _margin(weight, torch.zeros(*size, dtype=weight.dtype, device=weight.device))


HANDLERS |= {
    aten.t: _t,
    aten.transpose: _t,
    aten.permute: lambda weight, axes: _t(weight, *axes) if len(axes) == 2 else NotImplemented,
    aten.detach: ImplicitWeight.view,
    aten.alias: ImplicitWeight.view,
    aten.clone: lambda weight, memory_format=None: weight.like(weight.matrix),
    aten.any: _any,
    aten.linalg_vector_norm: _norm,
    aten.to: _to,
    aten._to_copy: _to,
    aten.zeros_like: lambda weight, **_: weight.like(weight.matrix.times(0.0)),
    aten.full_like: _full,
    aten.new_zeros: _new_zeros,
    aten.ones_like: lambda weight, **_: _full(weight, 1.0),
    aten.neg: lambda weight: _mul(weight, -1.0),
    aten.add: _add,
    aten.sub: _sub,
    aten.mul: _mul,
    aten.div: _div,
    aten.lerp: _lerp,
    aten.lerp_: _in_place(_lerp),
    aten.add_: _in_place(_add),
    aten.sub_: _in_place(_sub),
    aten.mul_: _in_place(_mul),
    aten.div_: _in_place(_div),
    aten.copy_: _in_place(_copy),
    aten.zero_: _in_place(lambda weight: _mul(weight, 0.0)),
}
