"""Sizes, kernels and outputs of one training run as they come, step by step."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.setting import Setting

__all__ = ["Record", "Recorded"]

KERNELS_KEPT = 9  # layer times at which kernels between samples are kept: 0, 1/8, ... 1


class Recorded(Protocol):
    """What a record asks of a network."""

    setting: Setting
    samples: int
    width: int
    coupling: str


class Record:
    """Sizes, kernels and outputs as they come, one entry for each step."""

    def __init__(self, network: Recorded):
        self.network = network
        depth = network.setting.depth
        self.times = tuple(sorted({round(depth * i / (KERNELS_KEPT - 1)) for i in range(KERNELS_KEPT)}))
        self.outputs: list[Tensor] = []
        self.sizes: dict[str, list[list[Tensor]]] = {}
        self.kernels: dict[str, list[list[Tensor]]] = {}
        self.streams: list[Tensor] = []  # of initialization
        self.taken: list[Tensor] = []  # likewise: inner features
        self.diverged: tuple[int, float] | None = None

    def stream(self, step: int, layer: int, h: Tensor) -> None:
        """The residual stream after a layer."""
        if step == 0:
            self.streams.append(h)
        self._size("stream_moment", step, h, power=2)
        self._size("stream_update", step, h - self.streams[layer])
        if layer in self.times:
            self._kernel("kernels", step, h)

    def block(
        self, step: int, number: int, taken: Tensor, inner_own: Tensor | None, outer_own: Tensor, phi: Tensor
    ) -> None:
        """A block's inner features and its matrices' own updates; a block of one layer has no inner one."""
        if step == 0:
            self.taken.append(taken)
        self._size("inner_update", step, taken - self.taken[number])
        self._size("inner_own", step, torch.zeros_like(outer_own) if inner_own is None else inner_own)
        self._size("outer_own", step, outer_own)
        if number + 1 in self.times:
            self._kernel("feature_kernels", step, phi)

    def gradient(self, step: int, layer: int, g: Tensor) -> None:
        """The backward feature at a layer; layers come from the top down."""
        self._size("gradient_moment", step, g, power=2)
        if layer in self.times:
            self._kernel("gradient_kernels", step, g)

    def stop(self, step: int, t: float) -> None:
        """Values stopped being finite."""
        if self.diverged is None:
            self.diverged = (step, t)

    def _size(self, name: str, step: int, value: Tensor, power: int = 1) -> None:
        moment = value[:, : self.network.samples].square().mean((1, 2))
        self._at(self.sizes, name, step).append(moment if power == 2 else moment.sqrt())

    def _kernel(self, name: str, step: int, value: Tensor) -> None:
        value = value[:, : self.network.samples]
        self._at(self.kernels, name, step).append(torch.bmm(value, value.mT) / self.network.width)

    @staticmethod
    def _at(table: dict[str, list[list[Tensor]]], name: str, step: int) -> list[Tensor]:
        rows = table.setdefault(name, [])
        while len(rows) <= step:
            rows.append([])
        return rows[step]

    def stacked(self, name: str, length: int) -> Tensor:
        """(seeds, finished steps, length, ...); nan where a step has nothing, as gradients after the last one."""
        table = self.sizes if name in self.sizes or name not in self.kernels else self.kernels
        rows = table.get(name, [])[: len(self.outputs)]
        rows = rows + [[]] * (len(self.outputs) - len(rows))
        if name.startswith("gradient"):
            rows = [row[::-1] for row in rows]
        example = next((row[0] for row in rows if row), self.outputs[0][:, 0, 0] if self.outputs else torch.empty(0))
        empty = torch.full_like(example, math.nan)
        full = [torch.stack(row if len(row) == length else [empty] * length, dim=1) for row in rows]
        return torch.stack(full, dim=1).cpu() if full else torch.empty(0)
