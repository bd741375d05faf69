"""What the rules do as depth grows, measured by hand on two-layer MLP ResNets, beside the table of the theory."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from canonical import SMALL, Canonical, samples
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.optim import SGD, Adam

# Slopes of the table: inner layers' own update, outer layers' own update; residual stream's update as an interval.
TABLE = {
    "depth-mup": (-0.5, -0.5, (-0.1, 0.1)),
    "depth-mup-corrected": (0.0, -0.5, (0.25, 0.6)),
    "complete-p": (0.0, 0.0, (-0.1, 0.1)),
}


def rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def walk(model: Canonical, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The last residual stream, and what the inner and outer layers take."""
    h, inner, outer = model.stem(x), [], []
    for block in model.blocks:
        inner.append(h)
        outer.append(torch.tanh(block.inner(h)))
        h = block(h)
    return h, inner, outer


def updates(depth: int, width: int, rule: str, optimizer: str, seed: int) -> tuple[float, float, float]:
    """Own updates of inner and outer layers and the stream's update after two small steps."""
    torch.manual_seed(seed)
    model, (x, y) = Canonical(depth, width), samples()
    plan = dm.parametrize(model, depth_multiplier=depth, example_inputs=x, rule=rule)
    start = copy.deepcopy(model)
    trained = {"sgd": SGD, "adam": Adam}[optimizer](model.parameters(), lr=SMALL[optimizer])
    for _ in range(2):
        trained.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        trained.step()
    with torch.no_grad():
        h, inner, outer = walk(model, x)
        m = plan.branch_multiplier(plan.branches[0])  # folded into the outer weights
        own = {"inner": 0.0, "outer": 0.0}
        for block, old, a, b in zip(model.blocks, start.blocks, inner, outer, strict=True):
            own["inner"] += rms(a @ (block.inner.weight - old.inner.weight).T) ** 2 / depth
            own["outer"] += rms(b @ (block.outer.weight - old.outer.weight).T / m) ** 2 / depth
        return math.sqrt(own["inner"]), math.sqrt(own["outer"]), rms(h - walk(start, x)[0])


@cache
def slopes(rule: str, optimizer: str, depths: tuple[int, ...], width: int, seeds: int) -> tuple[float, float, float]:
    """Slopes of log size in log depth, the size averaged over seeds on the log scale."""
    logs = torch.tensor(
        [
            [[math.log(size) for size in updates(depth, width, rule, optimizer, seed)] for depth in depths]
            for seed in range(seeds)
        ]
    ).mean(0)
    at = torch.tensor(depths).log2() * math.log(2)
    at = at - at.mean()
    return tuple(((at @ (logs - logs.mean(0))) / (at @ at)).tolist())


def check(rule: str, optimizer: str, depths: tuple[int, ...], width: int, seeds: int) -> None:
    inner, outer, stream = slopes(rule, optimizer, depths, width, seeds)
    wanted_inner, wanted_outer, (low, high) = TABLE[rule]
    assert inner == pytest.approx(wanted_inner, abs=0.1)
    assert outer == pytest.approx(wanted_outer, abs=0.1)
    assert low <= stream <= high


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", TABLE)
def test_own_updates_go_with_depth_as_the_table_says(rule: str, optimizer: str) -> None:
    check(rule, optimizer, (4, 8, 16, 32, 64), width=64, seeds=3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_only_the_corrections_price_is_paid_and_it_is_paid(optimizer: str) -> None:
    """The correction restores the inner layers, and the stream's update grows with depth for it."""
    plain = slopes("depth-mup", optimizer, (4, 8, 16, 32, 64), 64, 3)
    corrected = slopes("depth-mup-corrected", optimizer, (4, 8, 16, 32, 64), 64, 3)
    assert corrected[0] - plain[0] == pytest.approx(0.5, abs=0.05)
    assert corrected[1] - plain[1] == pytest.approx(0.0, abs=0.05)
    assert corrected[2] - plain[2] > 0.25


@pytest.mark.evidence
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", TABLE)
def test_the_table_holds_at_width_256_up_to_depth_256(rule: str, optimizer: str) -> None:
    check(rule, optimizer, (4, 16, 64, 256), width=256, seeds=2)
