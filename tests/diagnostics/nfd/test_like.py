"""A user's own network, predicted from what is read off it, against many of its kind trained for real."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.diagnostics.nfd import simulate_like
from torch_depthmup.errors import DepthMuPError

X = torch.nn.functional.normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(0))) * math.sqrt(6)
Y = torch.tensor([1.0, -1.0, 0.5])


class Block(nn.Module):
    def __init__(self, width: int, layers: int, constant: float = 0.5, phi=torch.tanh, bias: bool = False):
        super().__init__()
        self.first = nn.Linear(width, width, bias=bias) if layers == 2 else None
        self.last = nn.Linear(width, width, bias=False)
        self.constant, self.phi = constant, phi

    def forward(self, h: Tensor) -> Tensor:
        return h + self.constant * self.last(self.phi(h if self.first is None else self.first(h)))


def network(depth: int = 4, width: int = 64, layers: int = 2, **options) -> nn.Sequential:
    """Plain PyTorch: uniform initialization by fan-in, stem and readout without bias."""
    blocks = [Block(width, layers, **options) for _ in range(depth)]
    model = nn.Sequential(nn.Linear(6, width, bias=False), *blocks, nn.Linear(width, 1, bias=False))
    nn.init.normal_(model[0].weight)  # a stream of size one, so that the activation bends
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    outputs = [model(X)[:, 0].detach()]
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(X)[:, 0] - Y).square().mean() / 2).backward()
        optimizer.step()
        outputs.append(model(X)[:, 0].detach())
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "layers, how, momentum", [(1, "fold", 0.0), (1, "wrap", 0.5), (2, "fold", 0.5), (2, "wrap", 0.0)]
)
def test_plain_networks_are_predicted_at_their_own_width(layers: int, how: str, momentum: float) -> None:
    runs, prediction = [], None
    for seed in range(300):
        torch.manual_seed(seed)
        model = network(layers=layers)
        dm.parametrize(model, depth_multiplier=2, example_inputs=X, how=how)
        optimizer = dm.SGD(model, lr=0.003, momentum=momentum)
        if prediction is None:
            prediction = simulate_like(model, X, Y, optimizer, 4, seeds=1000).outputs[..., 0]
        runs.append(train(model, optimizer, 4))
    measured = torch.stack(runs)
    moved = (measured[:, -1] - measured[:, 0]).mean(0)
    assert float(moved.abs().max()) > 0.1
    # over draws: change of the function in the mean, and the spread of its values
    changes = [value - value[:, :1] for value in (measured, prediction)]
    error = sum(change[:, 1:].var(0) / len(change) for change in changes).sqrt()
    difference = changes[0][:, 1:].mean(0) - changes[1][:, 1:].mean(0)
    assert float((difference / error).abs().max()) < 4.5
    torch.testing.assert_close(measured.std(0), prediction.std(0), rtol=0.3, atol=0.01)


def test_frozen_parts_stay_frozen() -> None:
    model = network()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "last" in name], lr=0.05)
    scales = simulate_like(model, X, Y, optimizer, 1).setting.scales
    assert scales.input_rate == scales.inner_rate == scales.readout_rate == 0 and scales.outer_rate == 0.05


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "model, make, message",
    [
        (network(bias=True), sgd, r"first.bias of shape \(64,\) is a bias"),
        (network(phi=lambda x: torch.tanh(2 * x)), sgd, "no branch is V phi"),
        (network(), adam, "trained by Adam"),
        (nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 1, bias=False)), sgd, "no residual branches"),
        (nn.Sequential(network(), nn.Linear(1, 1, bias=False)), sgd, "a stem and a readout"),
        (nn.Sequential(network(), nn.Sigmoid()), sgd, "not all there is"),
    ],
)
def test_what_lies_outside_is_refused_with_the_exponents(model: nn.Module, make, message: str) -> None:
    with pytest.raises(DepthMuPError, match=message) as refusal:
        simulate_like(model, X, Y, make(model), 1)
    assert "exponents in depth" in str(refusal.value)
