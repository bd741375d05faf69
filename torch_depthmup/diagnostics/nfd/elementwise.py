"""An optimizer's operations on entries, noted down on matrices that are never formed; `entries.py` carries them out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.entries import pointwise
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix

__all__ = ["applied", "filled", "functional"]

aten = torch.ops.aten


def functional(func: Any) -> Any:
    """The operation that gives a new tensor, of one that writes into its first argument or into ``out``.

    ``None`` where it does not act entry by entry.
    """
    name = func.overloadpacket.__name__
    overload = "default" if func._overloadname == "out" else func._overloadname
    packet = getattr(aten, name.rstrip("_"), func.overloadpacket) if not name.startswith("_") else func.overloadpacket
    found = getattr(packet, overload, None)
    return found if found is not None and torch.Tag.pointwise in found.tags else None


def applied(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> TrainedMatrix | None:
    """A pointwise operation on matrices, of one start, and numbers; ``None`` where entries of W would be needed."""
    packet = func.overloadpacket
    if packet in (aten.addcmul, aten.addcdiv):  # the first argument may be a weight, whose entries are not needed
        value = options.get("value", args[3] if len(args) > 3 else 1)
        product = applied((aten.mul if packet is aten.addcmul else aten.div).Tensor, args[1:3], {})
        return None if product is None or not isinstance(args[0], TrainedMatrix) else args[0].plus(product, value)
    operands: list[Any] = []
    for argument in args:
        if isinstance(argument, TrainedMatrix):
            argument = argument.known
            if argument is None:
                return None
        elif isinstance(argument, Tensor):
            if argument.numel() != 1:
                return None
            argument = argument.detach().clone()  # a learning rate or a step's number goes on to change
        operands.append(argument)
    first = next(a for a in args if isinstance(a, TrainedMatrix))
    return filled(first, pointwise(func, *operands, **options))


def filled(like: TrainedMatrix, entries: Any) -> TrainedMatrix:
    """A matrix of the same shape with entries that are computed."""
    zero = TrainedMatrix.at_start(like.start, 0.0)
    return TrainedMatrix(zero.start, 0.0, zero.change, entries)
