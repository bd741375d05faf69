"""A weight that is never formed, as a tensor: the user's modules multiply by it, the user's optimizer trains it.

A product with an `ImplicitWeight` is answered by `gaussian.py`. Autograd's own node of the product is kept: its saved
input comes back as a `_Query`, which remembers its coordinates, so that the weight's gradient p q^T is again a matrix
in coordinates of the queries and not an array. Sums and multiples of such matrices are all that SGD, momentum, nesterov
and weight decay need; what an optimizer does with gradients entry by entry is noted down, see `elementwise.py`. Any
other operation needs the initial entries, and is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torch_depthmup.diagnostics.nfd.einsum import einsum_as_matmul
from torch_depthmup.diagnostics.nfd.elementwise import applied, filled, functional
from torch_depthmup.diagnostics.nfd.entries import pointwise
from torch_depthmup.diagnostics.nfd.gaussian import Side, TrainedMatrix
from torch_depthmup.diagnostics.nfd.margins import Margin, margin_norms
from torch_depthmup.diagnostics.nfd.patches import Patches, positions
from torch_depthmup.diagnostics.nfd.spanned import Spanned
from torch_depthmup.errors import DepthMuPError

__all__ = ["ImplicitWeight"]

aten = torch.ops.aten


@dataclass(eq=False)
class _Cell:
    """What views of one weight share: its name, and its value, which an optimizer's in-place step replaces.

    A convolution's weight has a ``kernel``: its matrix multiplies patches.
    """

    name: str
    value: TrainedMatrix
    kernel: tuple[int, ...] = ()
    patched: tuple[Patches, Tensor, int, Tensor] | None = None  # the last input's: a backward pass needs them too

    def of(self, value: TrainedMatrix) -> _Cell:
        """Another value of the same shape."""
        return _Cell(self.name, value, self.kernel)

    def patches(self, walk: Patches, x: Tensor) -> Tensor:
        """Rows of patches, the same tensor for the same input."""
        last = self.patched
        if last is None or last[0] != walk or not _same(last[1], x) or last[2] != x._version:
            last = self.patched = walk, x, x._version, walk.rows(x)
        return last[3]

    def ask(self, side: Side, rows: Tensor) -> Tensor:
        """Coordinates (1, rows, queries) of rows from a side."""
        return self.value.start.coordinates(side, rows)

    def product(self, side: Side, rows: Tensor) -> Tensor:
        """W q for rows q from the right, W^T p for rows p from the left."""
        return self.value.product(side, rows)[0]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same view of the same memory. The caller keeps one alive, so that memory is not reused."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


class ImplicitWeight(Tensor):
    """A matrix (rows, columns) of independent normal entries and what training made of it, known by products only.

    Args:
        matrix: its value, of one seed.
        name: what messages call it.
        kernel: sizes of a convolution's kernel: the weight's shape is (rows, columns / their product, *kernel).

    >>> from torch_depthmup.diagnostics.nfd.gaussian import GaussianMatrix, Noise
    >>> start = GaussianMatrix(10**6, 10**6, Noise([0], dtype=torch.float32), std=1e-3)
    >>> weight = torch.nn.Parameter(ImplicitWeight(TrainedMatrix.at_start(start), "weight"))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> x = torch.ones(1, 10**6) / 1000
    >>> torch.nn.functional.linear(x, weight).square().sum().div(2).backward()
    >>> optimizer.step()  # W - (W x) x^T, and |x| = 1
    >>> bool(torch.nn.functional.linear(x, weight).abs().max() < 1e-5)
    True
    """

    _cell: _Cell
    _transposed: bool

    @staticmethod
    def __new__(cls, matrix: TrainedMatrix, name: str, kernel: tuple[int, ...] = ()) -> ImplicitWeight:
        return cls._view(_Cell(name, matrix, kernel), transposed=False)

    @classmethod
    def _view(cls, cell: _Cell, transposed: bool) -> ImplicitWeight:
        start = cell.value.start
        shape: tuple[int, ...] = (start.rows, start.columns // math.prod(cell.kernel), *cell.kernel)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            shape[::-1] if transposed else shape,
            strides=strides[::-1] if transposed else strides,
            dtype=start.noise.dtype,
            device=start.noise.device,
        )
        made._cell, made._transposed = cell, transposed
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ImplicitWeight({self._cell.name!r}, {tuple(self.shape)})"

    def data_ptr(self) -> int:
        """The same for views of one weight, another for each weight; nothing is stored there."""
        return id(self._cell)

    @property
    def matrix(self) -> TrainedMatrix:
        """Its value, not transposed."""
        return self._cell.value

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.einsum:
            operands = _flat(args[1:])
            at = next(i for i, operand in enumerate(operands) if isinstance(operand, ImplicitWeight))
            func, args = einsum_as_matmul, (args[0], operands, at, operands[at]._cell.name)
        with torch._C.DisableTorchFunctionSubclass(), _Saving():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        handler = HANDLERS.get(func.overloadpacket)
        result = NotImplemented if handler is None else handler(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = _by_entries(func, args, kwargs or {})
        if result is not NotImplemented:
            return result
        weight = next(a for a in _flat(args) if isinstance(a, ImplicitWeight))
        raise DepthMuPError(
            f"{weight._cell.name}: {func.overloadpacket} needs the entries of this matrix, which is never formed. It "
            "can be multiplied with (linear layers, matmul, convolutions over one or two dimensions without groups) "
            "and trained by SGD, Muon, and what acts on gradients entry by entry, one parameter after the other: "
            "AdamW, not Adam with an L2 penalty"
        )


def _flat(args: Any) -> list[Any]:
    return [item for arg in args for item in (_flat(arg) if isinstance(arg, list | tuple) else [arg])]


class _Query(Tensor):
    """A product's input as autograd saved it, with the coordinates of its rows: p^T q is a gradient in coordinates."""

    _query: _Asked
    _plain: Tensor
    _transposed: bool

    @classmethod
    def of(cls, plain: Tensor, query: _Asked, transposed: bool) -> _Query:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, plain.shape, strides=plain.stride(), dtype=plain.dtype, device=plain.device
        )
        made._plain, made._query, made._transposed = plain, query, transposed
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        packet, query = func.overloadpacket, next(a for a in _flat(args) if isinstance(a, cls))
        if packet in (aten.t, aten.transpose, aten.detach, aten.alias):
            turned = packet in (aten.t, aten.transpose)
            return cls.of(func(query._plain, *args[1:]), query._query, query._transposed != turned)
        if packet is aten.mm and sum(isinstance(a, cls) for a in args) == 1:
            first, second = args
            if second is query and not query._transposed:
                return query._query.gradient(first.t(), last=True)
            if first is query and query._transposed:
                return query._query.gradient(second, last=False)
        raise DepthMuPError(
            f"{query._query.cell.name}: its gradient passes {packet}, which is not covered here. Products must be "
            "linear layers or matmul"
        )


@dataclass(frozen=True)
class _Asked:
    """Rows that a weight was multiplied by: which weight, from which side, and their coordinates."""

    cell: _Cell
    side: Side
    coordinates: Tensor

    def gradient(self, others: Tensor, *, last: bool) -> ImplicitWeight:
        """Sum over rows of p q^T: ``others`` are those of the other side, and ours are the ``last`` factor or not."""
        start = self.cell.value.start
        theirs = self.cell.ask("left" if self.side == "right" else "right", others)
        p, q = (theirs, self.coordinates) if self.side == "right" else (self.coordinates, theirs)
        transposed = last != (self.side == "right")
        return ImplicitWeight._view(self.cell.of(TrainedMatrix.outer(start, p, q)), transposed)


class _Saved:
    """A tensor that autograd saved for a backward pass, and, once it was multiplied by a weight, as what."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.query: tuple[_Asked, bool] | None = None

    def restored(self) -> Tensor:
        return self.tensor if self.query is None else _Query.of(self.tensor, *self.query)


class _Saving(saved_tensors_hooks):
    """While one function of a weight runs: what autograd saves is kept in sight of the products inside it."""

    active: list[_Saving] = []

    def __init__(self) -> None:
        self.saved: list[_Saved] = []

        def pack(tensor: Tensor) -> _Saved:
            self.saved.append(_Saved(tensor))
            return self.saved[-1]

        super().__init__(pack, _Saved.restored)

    def __enter__(self) -> None:
        self.active.append(self)
        super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.active.remove(self)
        self.saved = []


def _note(x: Tensor, query: _Asked) -> None:
    """Tells autograd's copy of an input which coordinates it has; the copy may be of the input's transpose."""
    for saving in _Saving.active[-1:]:
        for saved in saving.saved:
            if isinstance(saved.tensor, ImplicitWeight):
                continue
            if _same(saved.tensor, x):
                saved.query = query, False
            elif x.ndim == 2 and _same(saved.tensor, x.t()):
                saved.query = query, True


def _by_entries(func: Any, args: tuple, kwargs: dict) -> Any:
    """What acts entry by entry on gradients, and on what an optimizer made of them."""
    act, out = functional(func), kwargs.get("out")
    weights = [a for a in (*args, out) if isinstance(a, ImplicitWeight)]
    if not weights:  # several at once, as with foreach=True
        return NotImplemented
    one = weights[0]
    alike = all(w._transposed == one._transposed and w.matrix.start is one.matrix.start for w in weights)
    if act is None or not alike:
        return NotImplemented
    values = tuple(a.matrix if isinstance(a, ImplicitWeight) else a for a in args)
    made = applied(act, values, {key: value for key, value in kwargs.items() if key != "out"})
    if made is None:
        return NotImplemented
    written = args[0] if act is not func and out is None else out
    if written is None:
        return _like(one, made)
    if isinstance(written, ImplicitWeight):
        written._cell.value = made
        return written
    return NotImplemented


def _mm(first: Tensor, second: Tensor) -> Any:
    if isinstance(first, ImplicitWeight):
        return NotImplemented if isinstance(second, ImplicitWeight) else _mm(second.t(), _t(first)).t()
    assert isinstance(second, ImplicitWeight)
    cell, side = second._cell, "right" if second._transposed else "left"  # x W^T is W x for rows x
    value = cell.product(side, first)  # type: ignore[arg-type]
    _note(first, _Asked(cell, side, cell.ask(side, first)))  # type: ignore[arg-type]
    return value


def _addmm(bias: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = NotImplemented if isinstance(bias, ImplicitWeight) else _mm(first, second)
    return product if product is NotImplemented else beta * bias + alpha * product


def _convolution(
    x: Tensor, weight: Any, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any
) -> Any:
    if not isinstance(weight, ImplicitWeight) or transposed or rest[-1] != 1 or not 1 <= len(weight._cell.kernel) <= 2:
        return NotImplemented
    walk = Patches(weight._cell.kernel, stride, padding, dilation)
    value = walk.image(weight._cell.product("right", weight._cell.patches(walk, x)), x)
    return value if bias is None else value + bias.reshape(-1, *(1,) * len(walk.kernel))


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Any, _: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> Any:
    """Gradients of the input, the weight and the bias, as far as the mask asks."""
    cell, walk, wanted = weight._cell, Patches(weight._cell.kernel, stride, padding, dilation), rest[-1]
    p = positions(gradient)
    of_input = walk.summed(cell.product("left", p), x) if wanted[0] else None
    of_weight = None
    if wanted[1]:
        matrix = TrainedMatrix.outer(cell.value.start, cell.ask("left", p), cell.ask("right", cell.patches(walk, x)))
        of_weight = ImplicitWeight._view(cell.of(matrix), transposed=False)
    return of_input, of_weight, p.sum(0) if wanted[2] else None


def _t(weight: ImplicitWeight, *axes: int) -> Any:
    if weight._cell.kernel:
        return NotImplemented
    if axes and axes[0] % 2 == axes[1] % 2:
        return weight
    return ImplicitWeight._view(weight._cell, not weight._transposed)


def _like(weight: ImplicitWeight, value: TrainedMatrix) -> ImplicitWeight:
    return ImplicitWeight._view(weight._cell.of(value), weight._transposed)


def _add(weight: Tensor, other: Any, *, alpha: float = 1) -> Any:
    if isinstance(weight, ImplicitWeight) and isinstance(other, Spanned) and not weight._transposed:
        change = other.coordinates.to(weight.dtype)[None]
        return _like(weight, weight.matrix.plus(TrainedMatrix(weight.matrix.start, 0.0, change), float(alpha)))
    if not (isinstance(weight, ImplicitWeight) and isinstance(other, ImplicitWeight)):
        return NotImplemented
    if weight._transposed != other._transposed or weight.matrix.start is not other.matrix.start:
        return NotImplemented
    return _like(weight, weight.matrix.plus(other.matrix, float(alpha)))


def _sub(weight: Tensor, other: Any, *, alpha: float = 1) -> Any:
    return _add(weight, other, alpha=-alpha)


def _mul(weight: Any, factor: Any) -> Any:
    if not isinstance(weight, ImplicitWeight):
        weight, factor = factor, weight
    if isinstance(factor, Tensor) and (isinstance(factor, ImplicitWeight) or factor.numel() != 1):
        return NotImplemented
    return _like(weight, weight.matrix.times(float(factor)))


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
        weight._cell.value = result._cell.value
        return weight

    return act


def _full(weight: ImplicitWeight, value: float, **_: Any) -> ImplicitWeight:
    zero = weight.matrix.times(0.0)
    return _like(weight, filled(zero, pointwise(torch.add, zero.known, value)))


def _copy(weight: ImplicitWeight, other: Any, non_blocking: bool = False) -> Any:
    if not isinstance(other, ImplicitWeight) or other.matrix.start is not weight.matrix.start:
        return NotImplemented
    return _like(weight, other.matrix)


def _to(weight: ImplicitWeight, *args: Any, **kwargs: Any) -> Any:
    """Where it is already, and of the type it has; it cannot be moved. What training made may lose precision."""
    low = not weight.matrix.gain and weight.matrix.entries is None
    if kwargs == {"dtype": torch.bfloat16} and low and not weight._cell.kernel:
        change = weight.matrix.change[0].to(torch.bfloat16)
        return Spanned.of(tuple(weight.shape), change.T if weight._transposed else change, weight._cell.name)
    kept = (weight.dtype, weight.device, None, False)
    wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype | torch.device)]
    return _view(weight) if all(a in kept for a in wanted) else NotImplemented


def _view(weight: ImplicitWeight) -> ImplicitWeight:
    return ImplicitWeight._view(weight._cell, weight._transposed)


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
    if len(axes) != 1 or not keep or weight._cell.kernel or weight._transposed:
        return NotImplemented
    norms = margin_norms(weight.matrix, axes[0] % 2)
    return NotImplemented if norms is None else _margin(weight, norms.to(dtype or weight.dtype))


def _margin(weight: ImplicitWeight, numbers: Tensor) -> Margin:
    return Margin.of(numbers, weight.matrix, lambda value: _like(weight, value))


def _new_zeros(weight: ImplicitWeight, size: Any, **options: Any) -> Any:
    rows, columns = weight.shape[0], weight.shape[-1]
    if weight._cell.kernel or weight._transposed or tuple(size) not in ((rows, 1), (1, columns)):
        return NotImplemented
    return _margin(weight, torch.zeros(*size, dtype=weight.dtype, device=weight.device))


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten.t: _t,
    aten.transpose: _t,
    aten.permute: lambda weight, axes: _t(weight, *axes) if len(axes) == 2 else NotImplemented,
    aten.detach: _view,
    aten.alias: _view,
    aten.clone: lambda weight, memory_format=None: _like(weight, weight.matrix),
    aten.any: _any,
    aten.linalg_vector_norm: _norm,
    aten.to: _to,
    aten._to_copy: _to,
    aten.zeros_like: lambda weight, **_: _like(weight, weight.matrix.times(0.0)),
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
"""What can be done without entries."""
