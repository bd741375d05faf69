"""Parameters with entries for every block train as parameters of the blocks do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm
from torch_depthmup.errors import PlanError

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))

ENTRIES = {
    "index": lambda stack: [stack[i] for i in range(len(stack))],
    "unbind": lambda stack: stack.unbind(),
    "split": lambda stack: [part.squeeze(0) for part in stack.split(1)],
    "narrow": lambda stack: [stack.narrow(0, i, 1)[0] for i in range(len(stack))],
    "flat": lambda stack: [part.view(stack.shape[1:]) for part in stack.flatten().chunk(len(stack))],
}


class Stacked(nn.Module):
    """Branches lambda * V relu(W norm(h)) of stacks, or of one parameter a block."""

    def __init__(self, depth: int, entries: str, width: int = 12):
        super().__init__()
        generator = torch.Generator().manual_seed(depth)
        self.entries = entries
        w, v = (torch.randn(depth, width, width, generator=generator) / math.sqrt(width) for _ in range(2))
        gains, lambdas = torch.ones(depth, width), torch.full((depth,), 0.5)
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 2)
        nn.init.normal_(self.stem.weight, generator=generator)
        nn.init.normal_(self.head.weight, std=width**-0.5, generator=generator)
        for bias in (self.stem.bias, self.head.bias):
            nn.init.zeros_(bias)
        for name, value in {"w": w, "v": v, "gains": gains, "lambdas": lambdas}.items():
            made = nn.Parameter(value) if entries != "alone" else nn.ParameterList(map(nn.Parameter, value))
            setattr(self, name, made)

    def forward(self, x: Tensor) -> Tensor:
        stacks = (self.w, self.v, self.gains, self.lambdas)
        h = self.stem(x)
        for w, v, gain, scale in zip(*(ENTRIES.get(self.entries, list)(s) for s in stacks), strict=True):
            h = h + scale * F.linear(F.relu(F.linear(F.layer_norm(h, h.shape[-1:]) * gain, w)), v)
        return self.head(h)


def trained(entries: str, how: str, optimizer: str, width: int) -> tuple[dm.Plan, list[float]]:
    model = Stacked(8, entries, width)
    plan = dm.parametrize(model, base=Stacked(2, entries), example_inputs=X, how=how)
    stepping = {"sgd": dm.SGD, "adamw": dm.AdamW}[optimizer](model, lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(4):
        loss = F.mse_loss(model(X), TARGETS)
        stepping.zero_grad()
        loss.backward()
        stepping.step()
        losses.append(loss.item())
    return plan, losses


@pytest.mark.parametrize("width", [12, 24])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("entries", ENTRIES)
def test_a_stack_trains_as_parameters_of_the_blocks_do(entries: str, optimizer: str, width: int) -> None:
    plan, losses = trained(entries, "fold", optimizer, width)
    alone, wanted = trained("alone", "fold", optimizer, width)
    assert losses == pytest.approx(wanted, rel=1e-4)
    for name in ("w", "v", "gains", "lambdas"):
        one, each = plan[name], alone[f"{name}.3"]
        assert (one.role, one.depth_multiplier, one.folded) == (each.role, each.depth_multiplier, each.folded)


class Tied(nn.Module):
    def __init__(self, depth: int, entries: int):
        super().__init__()
        self.depth, self.entries = depth, entries
        self.stem, self.w = nn.Linear(5, 8), nn.Parameter(torch.randn(max(entries, 4), 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h, taken = self.stem(x), self.w.unbind()
        for i in range(self.depth):
            h = h + torch.tanh(h) @ (self.w[i % self.entries].T if self.entries < 4 else taken[i // 2])
        return h


@pytest.mark.parametrize("entries", [1, 2, 8])
def test_entries_that_several_blocks_take_are_tied_weights(entries: int) -> None:
    with pytest.raises(PlanError, match="tied"):
        dm.plan(Tied(8, entries), depth_multiplier=4, example_inputs=X)
