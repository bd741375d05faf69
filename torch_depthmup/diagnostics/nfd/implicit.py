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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torch_depthmup.diagnostics.nfd.einsum import einsum_as_matmul
from torch_depthmup.diagnostics.nfd.elementwise import applied, functional
from torch_depthmup.diagnostics.nfd.gaussian import GaussianMatrix, Side
from torch_depthmup.diagnostics.nfd.patches import Patches
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix
from torch_depthmup.errors import DepthMuPError

__all__ = ["ImplicitWeight"]

aten = torch.ops.aten


@dataclass(eq=False)
class Cell:
    """What views of one weight share: its name, and its value, which an optimizer's in-place step replaces.

    A convolution's weight has a ``kernel``: its matrix multiplies patches.
    """

    name: str
    value: TrainedMatrix
    kernel: tuple[int, ...] = ()
    patched: tuple[Patches, Tensor, int, Tensor] | None = None  # the last input's: a backward pass needs them too

    def of(self, value: TrainedMatrix) -> Cell:
        """Another value of the same shape."""
        return Cell(self.name, value, self.kernel)

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

    cell: Cell
    transposed: bool

    @staticmethod
    def __new__(cls, matrix: TrainedMatrix, name: str, kernel: tuple[int, ...] = ()) -> ImplicitWeight:
        return cls._view(Cell(name, matrix, kernel), transposed=False)

    @classmethod
    def _view(cls, cell: Cell, transposed: bool) -> ImplicitWeight:
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
        made.cell, made.transposed = cell, transposed
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ImplicitWeight({self.cell.name!r}, {tuple(self.shape)})"

    def data_ptr(self) -> int:
        """The same for views of one weight, another for each weight; nothing is stored there."""
        return id(self.cell)

    @property
    def matrix(self) -> TrainedMatrix:
        """Its value, not transposed."""
        return self.cell.value

    def restart(self, start: GaussianMatrix) -> None:
        """The same value, on a start that holds the same."""
        self.cell.value = replace(self.cell.value, start=start)

    def of(self, value: TrainedMatrix) -> ImplicitWeight:
        """Another value, not transposed: a gradient, for example."""
        return ImplicitWeight._view(self.cell.of(value), transposed=False)

    def like(self, value: TrainedMatrix) -> ImplicitWeight:
        """Another value, transposed as this is."""
        return ImplicitWeight._view(self.cell.of(value), self.transposed)

    def view(self, turned: bool = False) -> ImplicitWeight:  # type: ignore[override]
        """The same value, which an optimizer's step in place changes for both."""
        return ImplicitWeight._view(self.cell, self.transposed != turned)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.einsum:
            operands = _flat(args[1:])
            at = next(i for i, operand in enumerate(operands) if isinstance(operand, ImplicitWeight))
            func, args = einsum_as_matmul, (args[0], operands, at, operands[at].cell.name)
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
            f"{weight.cell.name}: {func.overloadpacket} needs the entries of this matrix, which is never formed. It "
            "can be multiplied with (linear layers, matmul, convolutions over one or two dimensions without groups) "
            "and trained by SGD, Muon, and what acts on gradients entry by entry, one parameter after the other: "
            "AdamW, not Adam with an L2 penalty"
        )


def _flat(args: Any) -> list[Any]:
    return [item for arg in args for item in (_flat(arg) if isinstance(arg, list | tuple) else [arg])]


class _Query(Tensor):
    """A product's input as autograd saved it, with the coordinates of its rows: p^T q is a gradient in coordinates."""

    _query: Asked
    _plain: Tensor
    _transposed: bool

    @classmethod
    def of(cls, plain: Tensor, query: Asked, transposed: bool) -> _Query:
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
class Asked:
    """Rows that a weight was multiplied by: which weight, from which side, and their coordinates."""

    cell: Cell
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
        self.query: tuple[Asked, bool] | None = None

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


def note(x: Tensor, query: Asked) -> None:
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
    alike = all(w.transposed == one.transposed and w.matrix.start is one.matrix.start for w in weights)
    if act is None or not alike:
        return NotImplemented
    values = tuple(a.matrix if isinstance(a, ImplicitWeight) else a for a in args)
    made = applied(act, values, {key: value for key, value in kwargs.items() if key != "out"})
    if made is None:
        return NotImplemented
    written = args[0] if act is not func and out is None else out
    if written is None:
        return one.like(made)
    if isinstance(written, ImplicitWeight):
        written.cell.value = made
        return written
    return NotImplemented


HANDLERS: dict[Any, Callable[..., Any]] = {}
"""What can be done without entries: products, see `products.py`, and sums and multiples, see `algebra.py`."""
