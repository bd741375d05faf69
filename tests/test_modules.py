"""dm.Residual."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torch_depthmup as dm


def branch() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def test_residual_adds_its_branch_to_its_shortcut() -> None:
    x, f, shortcut = torch.randn(3, 8), branch(), nn.Linear(8, 8)
    assert torch.equal(dm.Residual(f)(x), x + f(x))
    assert torch.equal(dm.Residual(f, shortcut)(x), shortcut(x) + f(x))


def test_residual_passes_arguments_on_and_tuples_through() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    value, weights = dm.Residual(attention)(x, memory, memory, need_weights=True)
    wanted, wanted_weights = attention(x, memory, memory)
    assert torch.equal(value, x + wanted) and torch.equal(weights, wanted_weights)


@pytest.mark.parametrize("shortcut", [None, nn.Sequential(nn.Linear(8, 8), nn.Tanh())])
@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_residual_is_scaled_whatever_its_shortcut(shortcut, how: str) -> None:
    model = nn.Sequential(*[dm.Residual(branch(), copy.deepcopy(shortcut)) for _ in range(4)])
    plan = dm.parametrize(model, depth_multiplier=4, example_inputs=torch.randn(3, 8), how=how)
    assert [b.name for b in plan.branches] == [f"{i}.branch" for i in range(4)]
    assert plan.branches[0].skip == ("identity" if shortcut is None else "projection")


@pytest.mark.parametrize("arguments", [(torch.relu,), (branch(), 3)])
def test_what_is_not_a_module_is_refused(arguments) -> None:
    with pytest.raises(TypeError, match="nn.Module"):
        dm.Residual(*arguments)
