"""Convolutions without their entries: patches are queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from wide import dense, sgd

from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.diagnostics.nfd import implicit_model, predict
from torch_depthmup.diagnostics.nfd.building import hidden_matrices
from torch_depthmup.diagnostics.nfd.gaussian import GaussianMatrix, Noise
from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix
from torch_depthmup.errors import DepthMuPError

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([[1.0], [-1.0]])


@pytest.mark.parametrize("coming", ["4", "5"])
@pytest.mark.parametrize(
    "dims, options",
    [
        (2, {}),
        (2, {"padding": 1}),
        (2, {"stride": 2, "padding": (1, 0)}),
        (2, {"dilation": 2, "padding": "same"}),
        (1, {"stride": 2, "padding": 2}),
        (1, {"dilation": 2}),
    ],
)
def test_a_convolution_and_its_gradients_are_those_of_the_entries(dims: int, options: dict, coming: str) -> None:
    """The weight's entries are read off by asking for all unit vectors."""
    kernel = (3,) * dims
    start = GaussianMatrix(5, 4 * 3**dims, Noise([0], dtype=torch.float64), std=0.3)
    matrix = TrainedMatrix.at_start(start).product("right", torch.eye(start.columns, dtype=torch.float64)[None])[0].T
    formed = matrix.reshape(5, 4, *kernel).clone().requires_grad_()
    weight = nn.Parameter(ImplicitWeight(TrainedMatrix.at_start(start), "w", kernel))
    assert weight.shape == formed.shape
    x = torch.randn(2, 4, *(int(coming) + 3,) * dims, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    function, signs = (F.conv1d, F.conv2d)[dims - 1], torch.tensor([1.0, -1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    found = []
    for w in (weight, formed):
        bias, y = signs.clone().requires_grad_(), x.clone().requires_grad_()
        value = function(y, w, bias, **options)
        value.pow(2).sum().backward()
        optimizer = torch.optim.SGD([w], lr=0.01)
        optimizer.step()
        found.append((value.detach(), y.grad, bias.grad, function(x, w, **options).detach()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


class ResNet(nn.Module):
    """Basic blocks with batch norm; the second one halves the image."""

    def __init__(self, n: int, stem: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(3, n, 3, stride=stem, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for _ in range(4))
        self.head = nn.Linear(n, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for i in (0, 2):
            y = F.relu(self.norms[i](self.convs[i](h)))
            h = h + self.norms[i + 1](self.convs[i + 1](y))
        return self.head(h.mean((2, 3)))


def slow(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02)


def agree(measured: Tensor, predicted: Tensor) -> None:
    error = (measured.var(0) / len(measured) + predicted.var(0) / len(predicted)).sqrt()
    assert float(((measured.mean(0) - predicted.mean(0)) / error).abs().max()) < 4


def test_a_residual_network_with_batch_norm_is_predicted() -> None:
    measured = torch.stack([dense(ResNet, seed, 2, 128, slow, IMAGES, TARGETS) for seed in range(20)])
    predicted = predict(ResNet, IMAGES, TARGETS, width=128, optimizer=slow, steps=2, seeds=range(100, 120)).outputs
    assert float((measured[:, -1] - measured[:, 0]).mean(0).abs().max()) > 0.3
    agree(measured, predicted)


@pytest.mark.evidence
def test_a_network_of_1024_channels_is_where_narrower_ones_go() -> None:
    """8 x 8 positions in each layer: networks of 128 and 256 channels approach the prediction at 1,024."""

    def make(n: int) -> nn.Module:
        return ResNet(n, stem=1)

    predicted = predict(make, IMAGES, TARGETS, width=1024, optimizer=slow, steps=3, seeds=4).outputs[:, -1]
    for width in (128, 256):
        measured = torch.stack([dense(make, seed, 3, width, slow, IMAGES, TARGETS)[-1] for seed in range(12)])
        error = (measured.var(0) / 12 + predicted.var(0) / 4).sqrt()
        assert float(((measured.mean(0) - predicted.mean(0)).abs() / (error + 2 / width)).max()) < 4


def test_a_monitor_watches_convolutions() -> None:
    model = implicit_model(ResNet, 256)
    monitor, optimizer = FeatureMonitor(model, IMAGES), sgd(model)
    F.mse_loss(model(IMAGES), TARGETS).backward()
    optimizer.step()
    monitor.record(1)
    own = {row["layer"]: row["own"] for row in monitor.rows if row["kind"] == "layer"}
    assert {f"convs.{i}.weight" for i in range(4)} <= set(own) and min(own.values()) > 0


class Grouped(ResNet):
    def __init__(self, n: int):
        super().__init__(n)
        self.convs[0] = nn.Conv2d(n, n, 3, padding=1, groups=4, bias=False)
        self.convs[1] = nn.Conv2d(n, n, 3, padding=1, groups=n, bias=False)
        self.convs[2] = nn.ConvTranspose2d(n, n, 5, padding=2, bias=False)


def test_convolutions_with_groups_and_transposed_ones_are_formed() -> None:
    assert set(hidden_matrices(Grouped, 32)) == {"convs.3.weight"}
    predicted = predict(Grouped, IMAGES, TARGETS, width=96, optimizer=slow, steps=1, seeds=range(20)).outputs
    agree(torch.stack([dense(Grouped, seed, 1, 96, slow, IMAGES, TARGETS) for seed in range(30, 50)]), predicted)


class Functional(ResNet):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.stem(x).repeat(1, 2, 1, 1), self.convs[0].weight, groups=2).mean((2, 3))


class Volume(ResNet):
    def __init__(self, n: int):
        super().__init__(n)
        self.convs[0] = nn.ParameterDict({"weight": nn.Parameter(torch.randn(2, n, n))})


@pytest.mark.parametrize(
    "make, message",
    [
        (Functional, "convs.0.weight: aten.convolution needs the entries.*without groups"),
        (Volume, "convs.0.weight of shape .* experts side by side"),
    ],
)
def test_what_is_not_covered_is_named(make, message: str) -> None:
    with pytest.raises(DepthMuPError, match=message):
        predict(make, IMAGES, TARGETS, width=64, optimizer=slow, steps=1, seeds=1)
