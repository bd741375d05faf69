"""Networks trained for a few steps under a rule: checked, or watched by a monitor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from canonical import SMALL, Canonical, samples
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.diagnostics.coordinates.check import CoordinateCheck, coordinate_check
from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.optim import Adam

DEPTHS = (4, 16, 64)


def check(rule: str = "depth-mup-corrected", optimizer: str | Callable = "adam", **options) -> CoordinateCheck:
    given = {"depths": DEPTHS, "base_depth": 1, "steps": 2, "seeds": 2} | options
    lr = SMALL[optimizer] if isinstance(optimizer, str) else 1.0
    return coordinate_check(given.pop("make", Canonical), samples(), rule=rule, optimizer=optimizer, lr=lr, **given)


def run(depth: int, rule: str, *, lr: float = 1e-3, steps: int = 5, optimizer: Callable = Adam) -> FeatureMonitor:
    torch.manual_seed(0)
    model, (x, y) = Canonical(depth), samples()
    dm.parametrize(model, base=Canonical(4), example_inputs=x, rule=rule)
    trained, monitor = optimizer(model.parameters(), lr=lr), FeatureMonitor(model, x)
    for step in range(steps):
        trained.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        trained.step()
        monitor.record(step)
    return monitor


def rms(value: Tensor) -> float:
    return float(value.detach().square().mean().sqrt())


def train(model: nn.Module, x: Tensor, steps: int, monitor: FeatureMonitor | None = None, **options) -> list[float]:
    target = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if monitor is not None:
            monitor.record(step)
    return losses
