"""A model that was trained or loaded before it is parametrized is told so; a fresh one is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from blocks import PreNorm, Stack
from optimizers import X, parametrized, step
from torch import nn

import torch_depthmup as dm


class BatchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.n(self.a(x))))


def test_a_checkpoint_before_parametrize_is_told() -> None:
    trained = parametrized()
    step(trained, dm.AdamW(trained, lr=0.1))
    fresh = Stack(8, PreNorm)
    fresh.load_state_dict(trained.state_dict())
    with pytest.warns(UserWarning, match="looks trained or loaded: the gains of blocks.0.norm differ"):
        dm.parametrize(fresh, depth_multiplier=4, example_inputs=X)


def test_counted_batches_are_told() -> None:
    model = nn.Sequential(*[BatchNormed() for _ in range(4)])
    for _ in range(20):
        model(X)
    with pytest.warns(UserWarning, match="0.n has counted 20 batches"):
        dm.parametrize(model, depth_multiplier=4, example_inputs=X)


def test_fresh_models_and_bases_are_told_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parametrized()
        trained = Stack(4, PreNorm)
        nn.init.normal_(trained.blocks[0].norm.weight)
        dm.parametrize(trained, depth_multiplier=1, example_inputs=X)
