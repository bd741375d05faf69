"""Tensors without values, which a model's constructor may initialise: what law it gives their entries is followed.

While the constructor runs, tensors of chosen shapes are made as `Unformed`. What is done to one of them elementwise
(`normal_`, `uniform_`, truncation by rejection, a factor) is done to a shadow: a sample of its entries. Everything else
makes the law unknown, and says what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torch_depthmup.errors import DepthMuPError

__all__ = ["Making", "Unformed"]

aten = torch.ops.aten

SAMPLE = 100_001  # entries of a shadow: the error of a standard deviation is 0.2 % where values are drawn by rejection
FEW = 2_001  # entries that tell whether another model has the same law: 1.6 %
VIEWS = {aten.detach, aten.alias, aten.view, aten.t, aten.t_, aten.transpose, aten.permute, aten.reshape,
         aten._unsafe_view, aten.unsqueeze, aten.squeeze}  # fmt: skip
PARTS = {aten.slice, aten.select, aten.split, aten.narrow, aten.split_with_sizes, aten.diagonal, aten.expand}
NEW = {aten.empty_like, aten.new_empty, aten.new_empty_strided}
COPIES = {aten.clone, aten._to_copy, aten.zero_, aten.fill_, aten.where, aten.zeros_like, aten.ones_like}
MAKERS = {aten.empty, aten.zeros, aten.ones, aten.full, aten.randn, aten.rand}
"""What makes a tensor from a size, its first argument."""


class _Draws:
    """Samples of laws: quantiles in random order, so that a standard deviation has no noise of its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(0)
        self._uniform = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        normal = math.sqrt(2) * torch.erfinv(2 * self._uniform - 1)
        self._normal = normal / normal.square().mean().sqrt()

    def _shuffled(self, values: Tensor) -> Tensor:
        return values[torch.randperm(self.size, generator=self._generator)]

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * self._shuffled(self._uniform)

    def normal(self, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return mean + std * self._shuffled(self._normal)

    def constant(self, value: float) -> Tensor:
        return torch.full((self.size,), float(value), dtype=torch.float64)


MANY, SOME = _Draws(SAMPLE), _Draws(FEW)


@dataclass(eq=False)
class _Law:
    """What views of one tensor share: a sample of its entries, or in words what made it unknown."""

    sample: Tensor | str
    draws: _Draws


class Unformed(Tensor):
    """A tensor of some shape whose entries are known by a sample only. It says that it is on the CPU, as by default."""

    law: _Law
    part: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, like: Tensor, law: _Law, part: bool = False) -> Unformed:
        """Of the shape, strides and type of a tensor."""
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.law, made.part = law, part
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unformed({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        first = next((a for a in args if isinstance(a, cls)), None)
        if packet is aten._local_scalar_dense:
            raise DepthMuPError("the factory reads a number off the entries of a hidden matrix, which is never formed")
        if packet in (aten.any, aten.all) and first is not None and isinstance(first.law.sample, Tensor):
            return func(first.law.sample)
        shapes = tree_map_only(
            Tensor, _without_values, ((args, {**kwargs, "generator": None} if "generator" in kwargs else kwargs))
        )
        result = func(*shapes[0], **{k: v for k, v in shapes[1].items() if k not in ("device", "pin_memory")})
        if packet in VIEWS | PARTS and first is not None:
            return tree_map_only(Tensor, lambda t: cls.of(t, first.law, first.part or packet in PARTS), result)
        draws = next(a for a in (*args, kwargs.get("out")) if isinstance(a, cls)).law.draws
        sample = _sample(packet, func, args, kwargs, draws)
        if func._schema.is_mutable and isinstance(args[0], cls):
            args[0].law.sample = "values written to a part of it" if args[0].part else sample
            return args[0]
        if isinstance(kwargs.get("out"), cls):
            kwargs["out"].law.sample = sample
            return kwargs["out"]
        if func._schema.is_mutable:
            raise DepthMuPError(f"the factory copies entries of a hidden matrix into another tensor ({packet})")
        return tree_map_only(Tensor, lambda t: cls.of(t, _Law(sample, draws)), result)


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _sample(packet: Any, func: Any, args: tuple, kwargs: dict, draws: _Draws) -> Tensor | str:
    """The sample after an operation, or what makes it unknown."""
    if packet in (aten.normal_, aten.uniform_):
        draw = draws.normal if packet is aten.normal_ else draws.uniform
        return draw(*args[1:], **{k: v for k, v in kwargs.items() if k != "generator"})
    if packet in NEW:
        return "no values at all"
    samples: list[Any] = []
    for argument in args:
        if isinstance(argument, Unformed):
            if argument.part:
                return "values computed from a part of another"
            if (
                isinstance(argument.law.sample, str)
                and packet is not aten.copy_
                and packet not in (aten.zero_, aten.fill_)
            ):
                return argument.law.sample
            samples.append(argument.law.sample)
        elif isinstance(argument, Tensor) and argument.numel() > 1:
            return f"the values of another tensor ({packet})"
        else:
            samples.append(argument)
    if packet is aten.copy_:
        return samples[1] if isinstance(samples[1], Tensor | str) else str(packet)
    if packet in (aten.zero_, aten.fill_):
        return draws.constant(samples[1] if packet is aten.fill_ else 0.0)
    if packet in COPIES or torch.Tag.pointwise in func.tags:
        samples = [s.clone() if isinstance(s, Tensor) else s for s in samples]
        kept = {k: v for k, v in kwargs.items() if k in ("alpha", "value", "rounding_mode", "min", "max")}
        result: Tensor = func(*samples, **kept)
        return result
    return f"what {packet} gives"


class Making(TorchDispatchMode):
    """While it is entered, tensors of chosen shapes are `Unformed`, with many entries in their shadows or some."""

    def __init__(self, chosen: Callable[[tuple[int, ...]], bool], *, many: bool = True):
        super().__init__()
        self.chosen, self.draws = chosen, MANY if many else SOME

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = func.overloadpacket
        sized = packet in MAKERS and args and isinstance(args[0], list | tuple | torch.Size)
        if not sized or not self.chosen(tuple(args[0])) or (kwargs or {}).get("dtype") in WHOLE:
            return func(*args, **(kwargs or {}))
        if packet in (aten.randn, aten.rand):
            sample: Tensor | str = self.draws.normal() if packet is aten.randn else self.draws.uniform()
        elif packet is aten.empty:
            sample = "no values at all"
        else:
            value = {aten.zeros: 0.0, aten.ones: 1.0}.get(packet, args[-1])
            sample = self.draws.constant(value)
        dtype = (kwargs or {}).get("dtype") or torch.get_default_dtype()
        return Unformed.of(torch.empty(args[0], dtype=dtype, device="meta"), _Law(sample, self.draws))


WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types of indices and masks, which are never weights."""
