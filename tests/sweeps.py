"""What the tests of sweeps train and read: small networks, and curves with known answers."""

from __future__ import annotations

import math
import random

import torch
from torch import nn

from torch_depthmup.diagnostics.shared.digits import DigitsResNet, digits
from torch_depthmup.diagnostics.shared.training import Training
from torch_depthmup.diagnostics.transfer.runs import Job, Run

GRID = {"depths": [2, 4], "lrs": [0.001, 0.01], "rules": ["mup", "depth-mup-corrected"], "seeds": 2, "progress": False}


def small(depth: int) -> nn.Module:
    return DigitsResNet(depth, 8)


def training(steps: int = 3) -> Training:
    return Training(*(part[:64] for part in digits()), steps=steps, batch_size=16)


def here(job_or_model: nn.Module, lr: float, seed: int) -> float:
    """A loss that needs no training, so that only the sweep is tested."""
    return lr + seed + sum(p.numel() for p in job_or_model.parameters())


X = torch.zeros(4, 64)


def parabola(
    rule: str, depth: int, centre: float, floor: float = 0.1, edge: float = math.inf, seeds: int = 2
) -> list[Run]:
    """Runs whose log loss is a parabola in log2 lr around ``centre``, diverged from ``edge`` on."""
    runs = []
    for i in range(-10, 0):
        loss = math.inf if i >= edge else floor * math.exp(0.1 * (i - centre) ** 2)
        runs += [Run(Job(rule, depth, 2.0**i, seed), loss, 1.0) for seed in range(seeds)]
    return runs


def noisy(
    centre: float, seeds: int, noise: float, random_seed: int, depth: int = 4, shared: float = 0.0, rule: str = "mup"
) -> list[Run]:
    """The same curves with independent noise in log loss, and a shift of each seed's optimum that depths share."""
    shifts = random.Random(random_seed)
    moved = [shared * shifts.gauss(0, 1) for _ in range(seeds)]
    generator = random.Random(1000 * random_seed + depth)
    return [
        Run(
            Job(rule, depth, 2.0**i, seed),
            0.1 * math.exp(0.1 * (i - centre - moved[seed]) ** 2 + noise * generator.gauss(0, 1)),
            1.0,
        )
        for i in range(-10, 0)
        for seed in range(seeds)
    ]
