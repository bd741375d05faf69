"""Parameters that scale skips: there are as many as additions, none behind a branch multiplier."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


class ScaledSkips(nn.Module):
    """x = lambda * x + f(x), lambda a number or a gain of each block, or an entry of a stack."""

    def __init__(self, depth: int, kind: str, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.stem, self.head = kind, nn.Linear(5, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        if kind == "stack":
            self.lambdas = nn.Parameter(torch.ones(depth))
        else:
            self.lambdas = nn.ParameterList(torch.ones(width if kind == "gain" else ()) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for i, block in enumerate(self.blocks):
            h = (h * self.lambdas[i] + block(h)) if self.kind != "swapped" else (block(h) + self.lambdas[i] * h)
        return self.head(h)


@pytest.mark.parametrize("kind", ["stack", "number", "gain", "swapped"])
def test_scales_of_skips_stand_on_the_trunk_and_move_the_function_alike_at_every_depth(kind):
    moved = []
    for depth in (4, 16, 64):
        model = ScaledSkips(depth, kind)
        plan = dm.parametrize(model, base=ScaledSkips(4, kind), example_inputs=X, rule="depth-mup")
        scales = {name for name in plan.parameters if name.startswith("lambdas")}
        assert {plan[name].role for name in scales} == {"trunk"}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in scales)
        optimizer = dm.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        before = model(X)
        before.square().mean().backward()
        optimizer.step()
        moved.append(float((model(X) - before).detach().norm()))
    assert abs(math.log(moved[-1] / moved[0]) / math.log(16)) < 0.2  # with the rates of what is outside it would be 1
