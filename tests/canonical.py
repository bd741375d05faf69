"""The two-layer-block ResNet of the theory, written out: no norms, no biases, tanh, one output."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoLayers(nn.Module):
    """``h + m V tanh(W h)`` with entries of variance 1/n."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.multiplier = 1.0
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.multiplier * self.outer(torch.tanh(self.inner(h)))


class Canonical(nn.Module):
    """Stem, two-layer blocks, a readout in mean-field scale."""

    def __init__(self, depth: int, width: int = 64):
        super().__init__()
        self.stem, self.head = nn.Linear(16, width, bias=False), nn.Linear(width, 1, bias=False)
        self.blocks = nn.ModuleList(TwoLayers(width) for _ in range(depth))
        nn.init.normal_(self.stem.weight, std=16**-0.5)
        nn.init.normal_(self.head.weight, std=1 / width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def samples() -> tuple[Tensor, Tensor]:
    """Eight points with targets of size 1, far from the network's initial values."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 1, generator=generator)


SMALL = {"sgd": 1e-3, "adam": 1e-4}
"""Learning rates at which the first steps are in the regime of the theory's table."""
