"""Networks as factories of their width, and their training with all matrices formed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm

X = F.normalize(torch.randn(3, 10, generator=torch.Generator().manual_seed(0))) * math.sqrt(10)
Y = torch.tensor([[1.0], [-1.0], [0.5]])
WIDTH = 128


class Norms(nn.Module):
    """Pre-norm MLP blocks with biases."""

    def __init__(self, n: int, norm: bool = True):
        super().__init__()
        self.stem, self.head = nn.Linear(10, n), nn.Linear(n, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(n) if norm else nn.Identity() for _ in range(2))
        self.up, self.down = (nn.ModuleList(nn.Linear(n, n) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            h = h + down(F.gelu(up(norm(h))))
        return self.head(h)


class Transformer(nn.Module):
    """Two pre-norm layers of fused attention and MLP on tokens, with learned positions."""

    def __init__(self, n: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, n), nn.Parameter(0.5 * torch.randn(4, n))
        self.qkv, self.out, self.up, self.down = (
            nn.ModuleList(nn.Linear(a, b) for _ in range(2)) for a, b in ((n, 3 * n), (n, n), (n, 2 * n), (2 * n, n))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(n) for _ in range(4))
        self.head = nn.Linear(n, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens((x.abs() * 3).long()[:, :4] % 7) + self.positions
        for i in range(2):
            q, k, v = (z.unflatten(2, (2, -1)).transpose(1, 2) for z in self.qkv[i](self.norms[i](h)).chunk(3, -1))
            h = h + self.out[i](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            h = h + self.down[i](F.gelu(self.up[i](self.norms[i + 2](h))))
        return self.head(h).mean(1)


class Torch(nn.Module):
    """nn.TransformerEncoderLayer: packed projections inside nn.MultiheadAttention."""

    def __init__(self, n: int):
        super().__init__()
        self.stem, self.head = nn.Linear(5, n), nn.Linear(n, 1)
        self.layer = nn.TransformerEncoderLayer(n, 2, 2 * n, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x.unflatten(1, (2, 5))))).mean(1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5, nesterov=True, weight_decay=1e-3)


def dense(
    make: Callable[[int], nn.Module],
    seed: int,
    steps: int = 3,
    width: int = WIDTH,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    inputs: Tensor = X,
    targets: Tensor = Y,
) -> Tensor:
    """Outputs before each step and after the last one."""
    return watched(make, seed, steps, width, optimizer, inputs, targets, watch=False)[0]


def watched(
    make: Callable[[int], nn.Module],
    seed: int,
    steps: int = 3,
    width: int = WIDTH,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    inputs: Tensor = X,
    targets: Tensor = Y,
    watch: bool = True,
) -> tuple[Tensor, dm.diagnostics.FeatureMonitor | None]:
    """The same, with a monitor's record at each step."""
    torch.manual_seed(seed)
    model = make(width)
    stepping, outputs = optimizer(model), []
    monitor = dm.diagnostics.FeatureMonitor(model, inputs) if watch else None
    for step in range(steps + 1):
        value = model(inputs)
        outputs.append(value.detach().clone())
        if monitor is not None:
            monitor.record(step)
        stepping.zero_grad()
        F.mse_loss(value, targets).backward()
        if step < steps:
            stepping.step()
    return torch.stack(outputs), monitor


MODELS = {"biases": lambda n: Norms(n, norm=False), "pre-norm": Norms, "transformer": Transformer, "torch's own": Torch}
