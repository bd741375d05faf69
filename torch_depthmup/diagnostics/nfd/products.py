"""Products with weights that are never formed, as torch's operations ask for them, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.implicit import HANDLERS, Asked, ImplicitWeight, note
from torch_depthmup.diagnostics.nfd.patches import Patches, positions
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix

__all__: list[str] = []

aten = torch.ops.aten


def _mm(first: Tensor, second: Tensor) -> Any:
    if isinstance(first, ImplicitWeight):
        return NotImplemented if isinstance(second, ImplicitWeight) else _mm(second.t(), first.view(turned=True)).t()
    assert isinstance(second, ImplicitWeight)
    cell, side = second.cell, "right" if second.transposed else "left"  # x W^T is W x for rows x
    value = cell.product(side, first)  # type: ignore[arg-type]
    note(first, Asked(cell, side, cell.ask(side, first)))  # type: ignore[arg-type]
    return value


def _addmm(bias: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = NotImplemented if isinstance(bias, ImplicitWeight) else _mm(first, second)
    return product if product is NotImplemented else beta * bias + alpha * product


def _convolution(
    x: Tensor, weight: Any, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any
) -> Any:
    if not isinstance(weight, ImplicitWeight) or transposed or rest[-1] != 1 or not 1 <= len(weight.cell.kernel) <= 2:
        return NotImplemented
    walk = Patches(weight.cell.kernel, stride, padding, dilation)
    value = walk.image(weight.cell.product("right", weight.cell.patches(walk, x)), x)
    return value if bias is None else value + bias.reshape(-1, *(1,) * len(walk.kernel))


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Any, _: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> Any:
    """Gradients of the input, the weight and the bias, as far as the mask asks."""
    cell, walk, wanted = weight.cell, Patches(weight.cell.kernel, stride, padding, dilation), rest[-1]
    p = positions(gradient)
    of_input = walk.summed(cell.product("left", p), x) if wanted[0] else None
    of_weight = None
    if wanted[1]:
        matrix = TrainedMatrix.outer(cell.value.start, cell.ask("left", p), cell.ask("right", cell.patches(walk, x)))
        of_weight = weight.of(matrix)
    return of_input, of_weight, p.sum(0) if wanted[2] else None


HANDLERS |= {
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
}
