"""A matrix in coordinates along orthonormal queries of both sides: sums, products and norms need no entries.

An optimizer that turns singular values into others, as Muon does, stays within the span of the gradients so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_depthmup.errors import DepthMuPError

__all__ = ["Spanned"]

aten = torch.ops.aten

SAME = {aten.t, aten.transpose, aten.permute, aten.mm, aten.addmm, aten.mul, aten.div, aten.add, aten.sub, aten.neg,
        aten.detach, aten.alias, aten.clone, aten._to_copy, aten.mul_, aten.div_, aten.add_, aten.sub_, aten.norm,
        aten.linalg_vector_norm}  # fmt: skip
"""What gives the same on coordinates as on entries, since the queries are orthonormal."""
NORMS = {aten.norm, aten.linalg_vector_norm}
SUMS = {aten.add, aten.sub, aten.add_, aten.sub_}
PRODUCTS = {aten.mul, aten.div, aten.mul_, aten.div_}


class Spanned(Tensor):
    """U^T coordinates V for orthonormal rows U and V, which are not written down here."""

    of_weight: str
    coordinates: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, shape: tuple[int, ...], coordinates: Tensor, name: str) -> Spanned:
        """Of a shape, with coordinates (left, right), of a weight of that name."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=coordinates.dtype, device=coordinates.device)  # type: ignore[attr-defined]
        made.coordinates, made.of_weight = coordinates, name
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Spanned({self.of_weight!r}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        first = next(a for a in args if isinstance(a, cls))
        plain = [a for a in args if not isinstance(a, cls) and isinstance(a, Tensor | float | int)]
        sized = any(isinstance(a, Tensor) and a.ndim for a in plain)
        shifted = packet in SUMS and not isinstance(args[1], cls)
        squared = packet in PRODUCTS and not plain
        part = packet in NORMS and any(a not in (None, [], False) for a in args[2:4])
        if packet not in SAME or sized or shifted or squared or part:
            raise DepthMuPError(f"{first.of_weight}: {packet} needs the entries of this matrix, which is never formed")
        result = func(*tree_map_only(cls, lambda x: x.coordinates, args), **kwargs)
        if packet in NORMS:
            return result
        if func._schema.is_mutable:
            return first
        shape = func(*tree_map_only(Tensor, lambda x: torch.empty(x.shape, device="meta"), args),
                     **{k: v for k, v in kwargs.items() if k not in ("device", "dtype")}).shape  # fmt: skip
        return cls.of(tuple(shape), result, first.of_weight)
