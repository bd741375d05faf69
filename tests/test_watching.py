"""One look before each step: plain optimizers over scaled weights, groups without multipliers."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from blocks import PreNorm, Stack
from optimizers import X, parametrized, step

import torch_depthmup as dm


def told(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(net, optimizer)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_a_plain_optimizer_over_scaled_weights_is_told_once(cls, how: str) -> None:
    net = parametrized(how)
    (message,) = told(net, cls(net.parameters(), lr=1e-3))
    assert "a plain " + cls.__name__ in message and "dm.rescale(optimizer, model)" in message


def test_optimizers_that_are_right_are_told_nothing(model: Stack) -> None:
    assert not told(model, dm.AdamW(model, lr=1e-3))
    assert not told(model, dm.rescale(torch.optim.AdamW(model.parameters(), lr=1e-3), model))
    base = Stack(2, PreNorm)
    dm.parametrize(base, depth_multiplier=1, example_inputs=X)
    assert not told(base, torch.optim.AdamW(base.parameters()))
    assert not told(Stack(2, PreNorm), torch.optim.AdamW(Stack(2, PreNorm).parameters()))


def test_a_group_without_multipliers_beside_scaled_ones_is_told(model: Stack) -> None:
    net, optimizer = pickle.loads(pickle.dumps((model, dm.AdamW(model.blocks.parameters(), lr=0.1))))
    optimizer.add_param_group({"params": list(net.stem.parameters()), "param_names": ["a", "b"]})
    assert any("has no multipliers while others have" in message for message in told(net, optimizer))
