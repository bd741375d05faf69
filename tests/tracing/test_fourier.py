"""Branches without a weight: a Fourier transform mixes positions, and is scaled like any other branch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.errors import PlanError

N = 8
X = torch.randn(2, 4, N, generator=torch.Generator().manual_seed(0))


def real_part(h: Tensor) -> Tensor:
    return torch.fft.fft2(h).real


def cut_off(h: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(h, dim=1)[:, :2], n=h.shape[1], dim=1)


def cosine(h: Tensor) -> Tensor:
    return torch.fft.fft(torch.cat([h, h.flip(1)], 1), dim=1).real[:, : h.shape[1]] / h.shape[1] ** 0.5


class Mix(nn.Module):
    """A module without parameters."""

    def __init__(self, mix: Callable[[Tensor], Tensor]):
        super().__init__()
        self.mix = mix

    def forward(self, h: Tensor) -> Tensor:
        return self.mix(h)


class Block(nn.Module):
    """Mixes positions, then channels; ``gain`` puts a norm with weights before the mixing."""

    def __init__(self, mix: Callable[[Tensor], Tensor], gain: bool):
        super().__init__()
        self.before = nn.LayerNorm(N, elementwise_affine=gain)
        self.mix, self.after = Mix(mix), nn.LayerNorm(N)
        self.channels = nn.Sequential(nn.LayerNorm(N), nn.Linear(N, 2 * N), nn.GELU(), nn.Linear(2 * N, N))

    def forward(self, h: Tensor, m: float = 1.0) -> Tensor:
        h = self.after(h + self.mix(self.before(h)) * m)
        return h + self.channels(h) * m


class Net(nn.Module):
    def __init__(self, depth: int, mix: Callable[[Tensor], Tensor], gain: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(mix, gain) for _ in range(depth))

    def forward(self, h: Tensor, m: float = 1.0) -> Tensor:
        for block in self.blocks:
            h = block(h, m)
        return h


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("mix", [real_part, cut_off, cosine])
def test_every_mixing_is_found_and_wrapped(mix, gain: bool) -> None:
    model = Net(4, mix, gain).double()
    wanted = model(X.double(), 0.5)
    branches = dm.find_branches(model, X.double())
    assert [b.levels for b in branches] == [0, 2] * 4
    assert [b.additions for b in branches] == [8] * 8
    dm.parametrize(model, depth_multiplier=4, example_inputs=X.double(), how="wrap")
    torch.testing.assert_close(model(X.double()), wanted)


def test_what_cannot_be_folded_says_so_and_the_advice_works() -> None:
    model = Net(4, real_part, False)
    with pytest.raises(PlanError, match=r"blocks\.0\.mix: the branch has no parameters.*Write how='wrap'.*exclude"):
        dm.parametrize(model, depth_multiplier=4, example_inputs=X)
    plan = dm.parametrize(model, depth_multiplier=4, example_inputs=X, exclude=["blocks.*.mix"])
    assert [b.name for b in plan.branches] == [f"blocks.{i}.channels" for i in range(4)]
    wrapped = Net(4, real_part, False)
    dm.parametrize(wrapped, depth_multiplier=4, example_inputs=X, how="wrap")
    with pytest.raises(PlanError, match=r"blocks\.0\.mix: the branch has no parameters.*Keep the hooks"):
        dm.bake(wrapped)


def by_hand(h: Tensor) -> Tensor:
    return (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True)


def tanh_gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h**3)))


def sharpened(h: Tensor) -> Tensor:
    return h - nn.functional.avg_pool1d(h, 3, 1, 1)


@pytest.mark.parametrize("function", [by_hand, tanh_gelu, sharpened])
def test_sums_within_activations_and_norms_are_none(function) -> None:
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(N, N) for _ in range(4))

        def forward(self, h: Tensor) -> Tensor:
            for layer in self.layers:
                h = function(layer(h))
            return h

    assert dm.find_branches(Plain(), X) == ()
