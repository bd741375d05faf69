"""What depth and width still change for a network of one's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from wide import X, Y

import torch_depthmup as dm
from torch_depthmup.diagnostics.nfd import predict, returns
from torch_depthmup.errors import DepthMuPError


class Blocks(nn.Module):
    """Pre-norm MLP blocks; the readout divides by its width, so that there is a limit."""

    def __init__(self, depth: int, n: int):
        super().__init__()
        self.stem, self.head = nn.Linear(10, n), nn.Parameter(torch.randn(n, 1))
        self.up, self.down = (nn.ModuleList(nn.Linear(n, n, bias=False) for _ in range(depth)) for _ in range(2))
        self.norm = nn.LayerNorm(n, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            h = h + down(F.gelu(up(self.norm(h))))
        return h @ self.head / h.shape[1]


def scaled(rule: str, lr: float):
    def optimizer(model: nn.Module, depth: int) -> torch.optim.Optimizer:
        dm.parametrize(model, depth_multiplier=depth, example_inputs=X, rule=rule)
        hidden = [p for p in model.parameters() if p.ndim == 2 and p.shape[0] == p.shape[1]]
        return dm.SGD(hidden, lr=lr)

    return optimizer


def test_the_distance_to_infinite_width_is_that_to_a_very_wide_network() -> None:
    def plain(model: nn.Module, depth: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [p for p in model.parameters() if p.ndim == 2 and p.shape[0] == p.shape[1]], lr=1 / depth
        )

    common = {"steps": 2, "loss": F.mse_loss}
    gains = returns(Blocks, X, Y, depth=1, width=32, optimizer=plain, seeds=16, **common)
    near, far = (
        predict(
            lambda n: Blocks(1, n), X, Y, width=n, optimizer=lambda m: plain(m, 1), seeds=range(500, 500 + k), **common
        )
        for n, k in ((32, 40), (1024, 6))
    )
    wanted = (near.mean() - far.mean())[-1].square().mean().sqrt()
    error = math.hypot(
        gains.infinite_width[1], float((near.error()[-1].square() + far.error()[-1].square()).mean().sqrt())
    )
    assert abs(gains.infinite_width[0] - float(wanted)) < 4 * error
    assert gains.seed_spread > 0


@pytest.mark.parametrize("rule, grows", [("mup", True), ("complete-p", False)])
def test_growth_with_depth_is_told_from_a_limit(rule: str, grows: bool) -> None:
    gains = returns(Blocks, X, Y, depth=4, width=256, optimizer=scaled(rule, 1.0), steps=1, seeds=6, loss=F.mse_loss)
    exponent, error = gains.growth
    assert ("no limit in sight" in str(gains)) is grows
    assert exponent > 2 * error if grows else abs(exponent) < max(0.35, 3 * error)
    assert gains.next_depth[1] > 0 and gains.next_width_loss[1] > 0


@pytest.mark.parametrize(
    "options, message", [({"seeds": 1}, "single seed"), ({"depth": 0}, "depth"), ({"width": 2.5}, "width")]
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DepthMuPError, match=message):
        returns(Blocks, X, Y, **{"depth": 2, "width": 64, "optimizer": scaled("mup", 0.1), "steps": 1} | options)
