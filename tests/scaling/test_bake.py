"""A wrapped and trained model becomes a plain one with the same outputs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from blocks import PreNorm, Stack
from optimizers import X, difference, parametrized, step
from torch import nn

import torch_depthmup as dm
from torch_depthmup.errors import MeasurementError, PlanError


@pytest.mark.parametrize("inputs", [None, X])
def test_a_baked_model_computes_the_same_with_nothing_left_on_it(inputs) -> None:
    model = parametrized("wrap")
    optimizer = dm.AdamW(model, lr=1e-3)
    for _ in range(3):
        step(model, optimizer)
    before = copy.deepcopy(model)
    assert dm.bake(model, inputs) is model
    assert difference(model, before) < 1e-5
    assert b"torch_depthmup" not in pickle.dumps(model)
    plain = Stack(8, PreNorm)
    plain.load_state_dict(model.state_dict())
    assert difference(plain, before) < 1e-5
    with pytest.raises(PlanError, match="no plan"):
        dm.plan_of(model)


def test_a_folded_model_has_nothing_to_bake() -> None:
    with pytest.raises(PlanError, match="folded.*nothing to bake"):
        dm.bake(parametrized())


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))


def test_a_branch_that_is_not_linear_in_its_last_weights_keeps_its_hook() -> None:
    model = nn.Sequential(*[dm.Residual(Gated()) for _ in range(4)])
    dm.parametrize(model, depth_multiplier=4, example_inputs=X, how="wrap")
    before = model(X)
    with pytest.raises(PlanError, match="0.branch: the branch is not linear"):
        dm.bake(model)
    assert torch.equal(model(X), before)


def test_a_model_whose_outputs_would_change_is_left_as_it_was() -> None:
    model = parametrized("wrap")
    nn.utils.parametrizations.spectral_norm(model.blocks[0].fc2)  # takes any factor on the weight out again
    before, weights = model.eval()(X), copy.deepcopy(model.state_dict())
    with pytest.raises(MeasurementError, match="the outputs differ"):
        dm.bake(model, X)
    assert torch.allclose(model(X), before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
