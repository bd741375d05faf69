"""Muon trains a matrix that is never formed; what needs entries is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from wide import Norms, X, Y, dense

import torch_depthmup as dm
from torch_depthmup.diagnostics.nfd import predict
from torch_depthmup.diagnostics.nfd.spanned import Spanned
from torch_depthmup.errors import DepthMuPError

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


class Both(torch.optim.Optimizer):
    """Muon for the matrices between layers, SGD for the rest."""

    def __init__(self, model: nn.Module, **options):
        named = dict(model.named_parameters())
        hidden = [p for name, p in named.items() if name.startswith(("up", "down")) and p.ndim == 2]
        rest = [p for p in named.values() if all(p is not q for q in hidden)]
        self.parts = torch.optim.Muon(hidden, **options), torch.optim.SGD(rest, lr=0.02)
        super().__init__(named.values(), {})

    def step(self, closure=None) -> None:
        for part in self.parts:
            part.step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02},
        {"lr": 0.02, "nesterov": False, "momentum": 0.5, "weight_decay": 0.5},
        {"lr": 0.005, "adjust_lr_fn": "match_rms_adamw"},
    ],
)
def test_muon_trains_as_with_the_entries(options: dict) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return Both(model, **options)

    measured = torch.stack([dense(Norms, seed, 3, 128, optimizer) for seed in range(24)])
    predicted = predict(Norms, X, Y, width=128, optimizer=optimizer, steps=3, seeds=range(100, 124)).outputs
    assert float((measured[:, -1] - measured[:, 0]).mean(0).abs().max()) > 0.3
    error = (measured.var(0) / len(measured) + predicted.var(0) / len(predicted)).sqrt()
    assert float(((measured.mean(0) - predicted.mean(0)) / error).abs().max()) < 4


class Pair:
    """Two optimizers as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def planned(model: nn.Module) -> Pair:
    """`dm.Muon` for the matrices between layers and `dm.SGD` for the rest, after `dm.parametrize`."""
    dm.parametrize(model, depth_multiplier=2, example_inputs=X)
    hidden = [p for name, p in model.named_parameters() if name.startswith(("up", "down")) and p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return Pair(dm.Muon(hidden, lr=0.02), dm.SGD(rest, lr=0.02))


def test_muon_with_a_plan_trains_as_with_the_entries() -> None:
    measured = torch.stack([dense(Norms, seed, 3, 128, planned) for seed in range(24)])
    predicted = predict(Norms, X, Y, width=128, optimizer=planned, steps=3, seeds=range(100, 124)).outputs
    plain = predict(Norms, X, Y, width=128, optimizer=lambda m: Both(m, lr=0.02), steps=3, seeds=4).outputs
    error = (measured.var(0) / len(measured) + predicted.var(0) / len(predicted)).sqrt()
    assert float(((measured.mean(0) - predicted.mean(0)) / error).abs().max()) < 4
    assert float(((plain - predicted[:4])[:, -1].mean(0) / error[-1]).abs().max()) > 4


def spanned() -> tuple[Spanned, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    u, v = (
        torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64))[0]
        for size, k in ((7, 2), (9, 3))
    )
    return Spanned.of((7, 9), inner.clone(), "w"), (u, inner, v)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: (x @ x.T) @ x,
        lambda x: torch.addmm(x, x @ x.T, x, beta=2.0, alpha=0.5),
        lambda x: x.clone().div_(x.norm().clamp(min=1e-7)),
    ],
)
def test_coordinates_follow_the_entries(act) -> None:
    ours, (u, inner, v) = spanned()
    found = act(ours)
    assert found.shape == (7, 9)
    torch.testing.assert_close(u @ found.coordinates @ v.T, act(u @ inner @ v.T))


@pytest.mark.parametrize(
    "act", [torch.sign, lambda x: x * x, lambda x: x + 1.0, lambda x: x.norm(dim=1), lambda x: x.sqrt()]
)
def test_what_acts_on_entries_is_refused(act) -> None:
    with pytest.raises(DepthMuPError, match="w: .* needs the entries"):
        act(spanned()[0])
