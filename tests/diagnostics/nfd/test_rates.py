"""Learning rates from predictions, against networks that are trained on the same grid."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from wide import X, Y

import torch_depthmup as dm
from torch_depthmup.diagnostics import nfd
from torch_depthmup.errors import DepthMuPError, DivergenceError

WIDTH, STEPS = 96, 3
RULES = ("depth-mup-corrected", "complete-p")


def block(n: int) -> nn.Module:
    return dm.Residual(nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n)))


def make(depth: int, n: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(10, n), *(block(n) for _ in range(depth)), nn.Linear(n, 1))


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return dm.SGD(model, lr=lr, momentum=0.5)


def train(model: nn.Module, lr: float, seed: int) -> float:
    optimizer = sgd(model, lr)
    losses = []
    for step in range(STEPS + 1):
        loss = F.mse_loss(model(X), Y)
        losses.append(loss.item())
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses[-1] if losses[-1] <= losses[0] else math.inf


def test_predicted_losses_and_edges_are_those_of_networks() -> None:
    lrs = [0.003, 0.01, 3.0]
    grid = {"depths": [1, 2], "lrs": lrs, "rules": RULES}
    predicted = nfd.sweep(make, X, Y, width=WIDTH, steps=STEPS, optimizer=sgd, seeds=range(50, 53), **grid)
    trained = dm.diagnostics.transfer_sweep(
        make, train, seeds=8, example_inputs=X, executor=ThreadPoolExecutor(1), progress=False, **grid
    )
    for rule in RULES:
        for depth in (1, 2):
            for lr in lrs[:2]:
                ours, theirs = (torch.tensor(sweep.losses(rule, depth, lr)) for sweep in (predicted, trained))
                error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
                assert float((ours.mean() - theirs.mean()).abs() / error) < 5, (rule, depth, lr)
            assert predicted.optimum(rule, depth).lr == trained.optimum(rule, depth).lr
            assert predicted.edge_of_stability(rule, depth) == trained.edge_of_stability(rule, depth)


def test_a_factory_that_ignores_depth_is_named() -> None:
    with pytest.raises(DepthMuPError, match="2 residual branches at depth 4 and at depth 2: it ignores depth"):
        nfd.sweep(
            lambda depth, n: make(2, n), X, Y, depths=[2, 4], width=WIDTH, lrs=[0.01], steps=1, optimizer=sgd,
            rules="complete-p", seeds=1,
        )  # fmt: skip


@pytest.mark.parametrize("lr", [1e6, 1e20, 1e38])
def test_training_that_leaves_the_numbers_is_told(lr: float) -> None:
    def plain(n: int) -> nn.Module:
        return nn.Sequential(nn.Linear(10, n), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n), nn.Linear(n, 1))

    with pytest.raises(DivergenceError, match="diverged at step"):
        nfd.predict(
            plain, X, Y, width=WIDTH, steps=9, seeds=1, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=lr)
        )
