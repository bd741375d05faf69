"""What the tests of optimizers share: a parametrized network, its learning rates by name, and a step."""

from __future__ import annotations

import pytest
import torch
from blocks import PreNorm, Stack
from torch import nn

import torch_depthmup as dm

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def parametrized(how: str = "fold", dtype: torch.dtype = torch.float32) -> Stack:
    """Ratio 4, m = 1/2: AdamW multiplies inner by 1 (eps by 1/2), folded carriers by 1/4."""
    torch.manual_seed(0)
    net = Stack(8, PreNorm).to(dtype)
    dm.parametrize(net, depth_multiplier=4, example_inputs=X.to(dtype), how=how)
    return net


@pytest.fixture
def model() -> Stack:
    return parametrized()


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """Each parameter's learning rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def backward(model: nn.Module) -> None:
    """Gradients of one batch."""
    model.zero_grad()
    model(X.to(next(model.parameters()).dtype)).square().mean().backward()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    backward(model)
    optimizer.step()


def difference(one: nn.Module, other: nn.Module) -> float:
    """Of two networks' outputs, relative."""
    x = X.to(next(one.parameters()).dtype)
    with torch.no_grad():
        return float((one(x) - other(x)).norm() / other(x).norm())
