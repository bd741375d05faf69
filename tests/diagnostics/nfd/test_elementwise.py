"""Optimizers that act entry by entry train a matrix that is never formed, as they train the entries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from formed import COLUMNS, ROWS, entries, implicit
from torch import Tensor, nn
from torch.nn import functional as F
from wide import Norms, dense
from wide import X as INPUTS
from wide import Y as TARGETS

import torch_depthmup as dm
from torch_depthmup.diagnostics.nfd import entries as by_entries
from torch_depthmup.diagnostics.nfd import implicit_model, predict
from torch_depthmup.diagnostics.nfd.gaussian import GaussianMatrix, Noise
from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix
from torch_depthmup.errors import DepthMuPError

X = torch.randn(2, 3, COLUMNS, dtype=torch.float64)
P = torch.randn(2, 3, ROWS, dtype=torch.float64)


class Lion(torch.optim.Optimizer):
    """An optimizer of someone else's."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                memory = self.state[p].setdefault("memory", torch.zeros_like(p))
                p.mul_(0.99).add_((0.9 * memory + 0.1 * p.grad).sign(), alpha=-group["lr"])
                memory.lerp_(p.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[Tensor], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam([p], lr=0.1),
    "Adam, rate and betas": lambda p: torch.optim.Adam([p], lr=torch.tensor(0.05), betas=(0.5, 0.8), eps=0.1),
    "AdamW": lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0.3),
    "AMSGrad": lambda p: torch.optim.AdamW([p], lr=0.1, amsgrad=True, maximize=True),
    "NAdam": lambda p: torch.optim.NAdam([p], lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam([p], lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop([p], lr=0.01, momentum=0.4, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad([p], lr=0.1, initial_accumulator_value=0.1),
    "Adamax": lambda p: torch.optim.Adamax([p], lr=0.1),
    "Lion": lambda p: Lion([p], lr=0.1),
}
if hasattr(torch.optim, "Adafactor"):
    OPTIMIZERS["Adafactor"] = lambda p: torch.optim.Adafactor([p], lr=0.1, weight_decay=0.1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these small matrices have several."""
    monkeypatch.setattr(by_entries, "BLOCK", 5 * COLUMNS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_trained_like_the_entries(name: str) -> None:
    weight = implicit()
    dense = nn.Parameter(entries(weight))
    for matrix in (weight, dense):
        optimizer = OPTIMIZERS[name](matrix)
        for step in range(4):
            optimizer.zero_grad()
            value = torch.tanh(F.linear(X[0] + step, matrix))
            F.linear(value, matrix.T).sin().sum().backward()
            optimizer.step()
    torch.testing.assert_close(entries(weight), dense.detach())
    torch.testing.assert_close(weight.detach().norm(), dense.detach().norm())
    for rows, ours, theirs in ((X[1], weight, dense), (P[1], weight.T, dense.T)):
        torch.testing.assert_close(F.linear(rows, ours), F.linear(rows, theirs))


def test_a_feature_that_is_off_in_every_sample_keeps_its_weights() -> None:
    """Adam divides by the gradient's own size: rounding, where a gradient is zero, would move a weight at full rate."""
    weight = implicit()
    optimizer = torch.optim.Adam([weight], lr=0.1, eps=1e-30)
    for step in range(3):
        x = X[0].clone()
        x[:, : 3 - step] = 0.0  # the first one is always off, the second one on in the last step only
        optimizer.zero_grad()
        F.linear(x, weight).relu().sum().backward()
        optimizer.step()
    ones = torch.eye(COLUMNS, dtype=torch.float64)[:2]
    with torch.no_grad():
        moved = F.linear(ones, weight) - TrainedMatrix.at_start(weight.matrix.start).product("right", ones[None])[0]
    late = 0.1 * (0.1 / (1 - 0.9**3)) / (0.001 / (1 - 0.999**3)) ** 0.5
    assert float(moved[0].abs().max()) < 1e-12
    near = torch.stack([moved[1].abs(), (moved[1].abs() - late).abs()]).amin(0)  # rows that relu cuts do not move
    assert float(near.max()) < 1e-6 and float(moved[1].abs().max()) > 0.01


def test_a_convolution_is_trained_like_the_entries() -> None:
    start = GaussianMatrix(5, 4 * 9, Noise([0], dtype=torch.float64), std=0.3)
    formed = nn.Parameter(
        TrainedMatrix.at_start(start)
        .product("right", torch.eye(36, dtype=torch.float64)[None])[0]
        .T.reshape(5, 4, 3, 3)
        .clone()
    )
    weight = nn.Parameter(ImplicitWeight(TrainedMatrix.at_start(start), "w", (3, 3)))
    images = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for w in (weight, formed):
        optimizer = torch.optim.AdamW([w], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            F.conv2d(images, w, padding=1).sin().sum().backward()
            optimizer.step()
    torch.testing.assert_close(F.conv2d(images, weight), F.conv2d(images, formed))


def planned(model: nn.Module) -> torch.optim.Optimizer:
    dm.parametrize(model, depth_multiplier=2, example_inputs=INPUTS)
    return dm.AdamW(model, lr=2e-3, eps=1e-4, weight_decay=0.1)


def test_a_network_under_adamw_with_a_plan_is_predicted() -> None:
    measured = torch.stack([dense(Norms, seed, 3, 128, planned) for seed in range(24)])
    predicted = predict(Norms, INPUTS, TARGETS, width=128, optimizer=planned, steps=3, seeds=range(100, 124)).outputs
    assert float((measured[:, -1] - measured[:, 0]).mean(0).abs().max()) > 0.3
    error = (measured.var(0) / len(measured) + predicted.var(0) / len(predicted)).sqrt()
    assert float(((measured.mean(0) - predicted.mean(0)) / error).abs().max()) < 4


def test_a_monitor_watches_what_adam_trains() -> None:
    model = implicit_model(Norms, 128)
    monitor, optimizer = dm.diagnostics.FeatureMonitor(model, INPUTS), torch.optim.Adam(model.parameters(), lr=1e-3)
    F.mse_loss(model(INPUTS), TARGETS).backward()
    optimizer.step()
    monitor.record(1)
    (row,) = (row for row in monitor.rows if row["layer"] == "up.0.weight")
    assert row["weight_update"] == pytest.approx(1e-3 * 128, rel=0.01)  # each entry moves by the rate


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "Adam cannot train.*up.0.weight.*AdamW"),
        (lambda p: torch.optim.Rprop(p), "Rprop cannot train.*up.0.weight.*index_put"),
        (lambda p: torch.optim.Adam(p, foreach=True), "Adam cannot train.*_foreach"),
    ],
)
def test_what_needs_the_initial_entries_is_refused_by_name(make, message: str) -> None:
    with pytest.raises(DepthMuPError, match=message):
        predict(Norms, INPUTS, TARGETS, width=128, optimizer=lambda model: make(model.parameters()), steps=2, seeds=1)
