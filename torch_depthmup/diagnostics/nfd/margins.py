"""A number for each row or each column of a matrix that is never formed, as Adafactor keeps them.

The product of the two is a matrix of full size with entries that are computed where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_depthmup.diagnostics.nfd.elementwise import filled
from torch_depthmup.diagnostics.nfd.entries import Margins, blocks
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix

__all__ = ["Margin", "margin_norms"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Matrix:
    """Whose margin it is: a matrix of its size, and how a tensor is made of another such matrix."""

    like: TrainedMatrix
    made: Callable[[TrainedMatrix], Tensor]


class Margin(Tensor):
    """Of shape (rows, 1) or (1, columns)."""

    _plain: Tensor
    _matrix: _Matrix

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, plain: Tensor, like: TrainedMatrix, made: Callable[[TrainedMatrix], Tensor]) -> Margin:
        """Numbers of a matrix, and how a tensor is made of another matrix of its size."""
        return cls._holding(plain, _Matrix(like, made))

    @classmethod
    def _holding(cls, plain: Tensor, matrix: _Matrix) -> Margin:
        held = Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, device=plain.device)  # type: ignore[attr-defined]
        held._plain, held._matrix = plain, matrix
        return held

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Margin({self._plain!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        plain, options = tree_map_only(cls, lambda t: t._plain, (args, kwargs or {}))
        margin = next(a for a in args if isinstance(a, cls))
        matrix = margin._matrix
        if (
            func.overloadpacket is aten.mm
            and {tuple(t.shape).index(1) for t in plain} == {0, 1}
            and plain[0].shape[1] == 1
        ):
            return matrix.made(filled(matrix.like, Margins(plain[0].clone(), plain[1].clone())))
        result = func(*plain, **options)
        if func._schema.is_mutable:
            return margin
        shaped = isinstance(result, Tensor) and result.shape == margin.shape
        return cls._holding(result, matrix) if shaped else result


def margin_norms(matrix: TrainedMatrix, axis: int) -> Tensor | None:
    """Norms along the columns (axis 1), (rows, 1), or along the rows (axis 0); ``None`` where entries of W are needed.

    Of what has low rank, norms along orthonormal directions are those of the coordinates.
    """
    left, right = matrix.start.left_side.queries, matrix.start.right_side.queries
    node = matrix.known
    if node is None:
        return None
    if matrix.entries is None:
        part, basis = (matrix.change, left) if axis == 1 else (matrix.change.mT, right)
        norms = torch.linalg.vector_norm(torch.bmm(part.mT, basis[:, : part.shape[1]])[0], dim=0)
    else:
        found = [torch.linalg.vector_norm(entries[0], dim=axis) for _, entries in blocks(node, left, right)]
        norms = torch.cat(found) if axis == 1 else torch.linalg.vector_norm(torch.stack(found), dim=0)
    return norms[:, None] if axis == 1 else norms[None]
