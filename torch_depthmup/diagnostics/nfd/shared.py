"""A hidden matrix of which every seed has its own, inside `torch.vmap` over the seeds' networks.

Its products are handed, for all seeds at once, to one `GaussianMatrix` of as many seeds. Autograd sees each seed's own
weight, which each seed's own optimizer trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_depthmup.diagnostics.nfd.einsum import einsum_as_matmul
from torch_depthmup.diagnostics.nfd.gaussian import Side
from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight
from torch_depthmup.diagnostics.nfd.orthonormal import padded
from torch_depthmup.diagnostics.nfd.patches import Patches
from torch_depthmup.diagnostics.nfd.seeds import OneOf, joined
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix

__all__ = ["Apart", "SeedsMatrix", "Shared"]

EQUAL = 1e-9  # relative difference of two seeds' factors that is rounding


class Apart(Exception):
    """These networks cannot be trained side by side."""


class SeedsMatrix:
    """One hidden matrix of all seeds' networks: a start of as many seeds, and each seed's own weight on it."""

    def __init__(self, weights: Sequence[ImplicitWeight]):
        self.weights = weights
        self.start = joined([weight.matrix.start for weight in weights])
        for seed, weight in enumerate(weights):
            weight.restart(OneOf(self.start, seed))
        self.now = self.trained()

    def trained(self) -> TrainedMatrix:
        """What the seeds' optimizers made of it by now."""
        values = [weight.matrix for weight in self.weights]
        gain = values[0].gain
        if any(value.entries is not None or not math.isclose(value.gain, gain, rel_tol=EQUAL) for value in values):
            raise Apart("their matrices were trained in ways that have no sum of low rank in common")
        left, right = (max(value.change.shape[axis] for value in values) for axis in (1, 2))
        return TrainedMatrix(self.start, gain, torch.cat([padded(value.change, left, right) for value in values]))


class _Product(torch.autograd.Function):
    """Rows (seeds, ..., size) times every seed's own matrix, times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: SeedsMatrix, side: Side, factor: float, *weights: Tensor) -> Tensor:
        rows = x.reshape(len(weights), -1, x.shape[-1])
        coordinates = matrix.start.coordinates(side, rows)
        ctx.asked = matrix, side, factor, coordinates, x.shape
        return factor * matrix.now.value(side, coordinates).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        matrix, side, factor, ours, shape = ctx.asked
        other: Side = "left" if side == "right" else "right"
        rows = gradient.reshape(shape[0], -1, gradient.shape[-1])
        theirs = matrix.start.coordinates(other, rows)
        to_input = factor * matrix.now.value(other, theirs).view(shape) if ctx.needs_input_grad[0] else None
        p, q = (theirs, ours) if side == "right" else (ours, theirs)
        change = factor * torch.bmm(p.mT, q)
        to_weights = [
            weight.of(TrainedMatrix(weight.matrix.start, 0.0, change[seed : seed + 1])) if needed else None
            for seed, (weight, needed) in enumerate(zip(matrix.weights, ctx.needs_input_grad[4:], strict=True))
        ]
        return to_input, None, None, None, *to_weights


class _PerSeed(torch.autograd.Function):
    """The same on rows (..., size) of one seed, inside `vmap`: ``seed`` is any tensor over which `vmap` goes."""

    @staticmethod
    def forward(x: Tensor, seed: Tensor, matrix: SeedsMatrix, side: Side, factor: float) -> Tensor:
        raise Apart("a product outside of vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: `vmap` calls `_Product` instead."""

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, seed: Tensor, matrix: SeedsMatrix, side: Side, factor: float) -> Any:  # type: ignore[override]
        if info.batch_size != len(matrix.weights) or dims[1] is None:
            raise Apart("the network calls vmap itself")
        x = x.expand(info.batch_size, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)
        return _Product.apply(x, matrix, side, factor, *matrix.weights), 0


class Shared(Tensor):
    """Inside `vmap`, a hidden matrix of which every seed has its own."""

    _matrix: SeedsMatrix
    _seed: Tensor
    _transposed: bool
    _factor: float

    @classmethod
    def of(cls, matrix: SeedsMatrix, seed: Tensor, transposed: bool = False, factor: float = 1.0) -> Shared:
        """The matrix times a factor; ``seed`` is any tensor over which `vmap` goes."""
        like = matrix.weights[0]
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape[::-1] if transposed else like.shape, dtype=like.dtype, device=like.device
        )
        made._matrix, made._seed, made._transposed, made._factor = matrix, seed, transposed, factor
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Shared({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        handler = HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # type: ignore[override]
        raise Apart(f"{func} is not batched")

    def times(self, rows: Tensor) -> Tensor:
        """W q for rows q."""
        side: Side = "left" if self._transposed else "right"
        made: Tensor = _PerSeed.apply(rows, self._seed, self._matrix, side, self._factor)
        return made

    def turned(self) -> Shared:
        return Shared.of(self._matrix, self._seed, not self._transposed, self._factor)

    def scaled(self, factor: float) -> Shared:
        return Shared.of(self._matrix, self._seed, self._transposed, factor * self._factor)


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Shared) or isinstance(x, Shared):
        return NotImplemented
    value = weight.times(x)
    return value if bias is None else value + bias


def _matmul(first: Any, second: Any) -> Any:
    if isinstance(first, Shared):
        if isinstance(second, Shared):
            return NotImplemented
        return first.times(second.mT).mT
    return second.turned().times(first)


def _addmm(bias: Tensor, first: Any, second: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(bias, Shared):
        return NotImplemented
    product = _matmul(first, second)
    return product if product is NotImplemented else beta * bias + alpha * product


def _einsum(equation: str, *operands: Any) -> Any:
    found = list(operands[0] if len(operands) == 1 else operands)
    at = next(i for i, operand in enumerate(found) if isinstance(operand, Shared))
    return einsum_as_matmul(equation, found, at, "a hidden matrix")


def _convolution(
    x: Tensor, weight: Any, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    if not isinstance(weight, Shared) or isinstance(padding, str) or groups != 1:
        return NotImplemented
    kernel = tuple(weight.shape[2:])
    stride, padding, dilation = ((s,) * len(kernel) if isinstance(s, int) else s for s in (stride, padding, dilation))
    walk = Patches(kernel, stride, padding, dilation)
    single = x.ndim == len(kernel) + 1
    x = x[None] if single else x
    value = walk.image(weight.times(walk.rows(x)), x)
    value = value if bias is None else value + bias.reshape(-1, *(1,) * len(kernel))
    return value[0] if single else value


def _transpose(weight: Shared, *axes: int) -> Any:
    return weight.turned() if weight.ndim == 2 and sorted(axis % 2 for axis in axes) == [0, 1] else NotImplemented


def _permute(weight: Shared, *axes: Any) -> Any:
    order = [axis % weight.ndim for axis in (axes[0] if isinstance(axes[0], tuple | list) else axes)]
    return NotImplemented if weight.ndim != 2 else weight.turned() if order == [1, 0] else weight


def _turned(weight: Shared) -> Any:
    return weight.turned() if weight.ndim == 2 else NotImplemented


def _mul(first: Any, second: Any) -> Any:
    weight, factor = (first, second) if isinstance(first, Shared) else (second, first)
    return weight.scaled(float(factor)) if isinstance(factor, int | float) else NotImplemented


def _div(weight: Any, divisor: Any) -> Any:
    both = isinstance(weight, Shared) and isinstance(divisor, int | float)
    return weight.scaled(1 / divisor) if both else NotImplemented


_ATTENTION = F.multi_head_attention_forward
_attention = FunctionType(
    _ATTENTION.__code__, {**_ATTENTION.__globals__, "has_torch_function": lambda _: False}, "_attention",
    _ATTENTION.__defaults__,
)  # fmt: skip
"""torch's own code, which does not ask whether to hand itself over first: the projections in it come here."""


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _attention,
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    torch.einsum: _einsum,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    Tensor.__rmatmul__: lambda weight, first: _matmul(first, weight),
    **dict.fromkeys((torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__), _turned),  # type: ignore[attr-defined]
    **dict.fromkeys((torch.transpose, torch.swapaxes, Tensor.transpose, Tensor.swapaxes), _transpose),
    **dict.fromkeys((torch.permute, Tensor.permute), _permute),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _div),
    **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), lambda weight: weight.scaled(-1.0)),
}
"""What a user's code does with a hidden matrix, for all seeds at once."""
