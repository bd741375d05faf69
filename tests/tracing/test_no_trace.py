"""Networks that write into their own weights when they are evaluated are left as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm

N = 8
X = torch.randn(4, N, generator=torch.Generator().manual_seed(0))


def divided(weight: nn.Parameter) -> None:
    weight.div_(2)


def augmented(weight: nn.Parameter) -> None:
    weight /= 2


def entries(weight: nn.Parameter) -> None:
    weight[:] = weight / 2


class Rescaled(nn.Module):
    """Residual blocks whose last weights are halved in evaluation, against overflow, and doubled again in training."""

    def __init__(self, depth: int, halve: Callable[[nn.Parameter], None]):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N)) for _ in range(depth))
        self.halve, self.is_rescaled = halve, False

    def forward(self, h: Tensor) -> Tensor:
        if self.is_rescaled == self.training:
            with torch.no_grad():
                for block in self.blocks:
                    block[2].weight.mul_(2) if self.training else self.halve(block[2].weight)
            self.is_rescaled = not self.training
        for block in self.blocks:
            h = h + block(h)
        return h


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("halve", [divided, augmented, entries])
def test_weights_are_what_they_were(halve, training: bool) -> None:
    model = Rescaled(4, halve)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(training)
    branches = dm.find_branches(model, X)
    assert [b.name for b in branches] == [f"blocks.{i}" for i in range(4)]
    assert not model.is_rescaled
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("halve", [divided, augmented, entries])
def test_scaling_multiplies_the_weights_of_training(halve, how) -> None:
    torch.manual_seed(0)
    model = Rescaled(4, halve)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    dm.parametrize(model, depth_multiplier=4, example_inputs=X, how=how)
    factor = 0.5 if how == "fold" else 1.0
    for i in range(4):
        torch.testing.assert_close(model.state_dict()[f"blocks.{i}.2.weight"], factor * plain[f"blocks.{i}.2.weight"])
    assert not model.is_rescaled
