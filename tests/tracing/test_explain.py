"""Why the sums that are no residual additions are left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.tracing.additions import Reason

N, LAYERS = 8, 4
X = torch.randn(3, N, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """``LAYERS`` blocks of ``step(net, i, x, stem)``, where ``stem`` is the stream's first value."""

    def __init__(self, step: Callable[[Net, int, Tensor, Tensor], Tensor]):
        super().__init__()
        self.stem, self.positions = nn.Linear(N, N), nn.Parameter(torch.randn(N))
        for name in ("first", "second", "scale", "shift"):
            self.add_module(name, nn.ModuleList(nn.Linear(N, N) for _ in range(LAYERS)))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        h = stem = self.stem(x) + self.positions
        for i in range(LAYERS):
            h = self.step(self, i, h, stem)
        return h


def inner(net: Net, i: int, x: Tensor) -> Tensor:
    return net.second[i](torch.tanh(net.first[i](x)))


def plain(net: Net, i: int, x: Tensor, stem: Tensor) -> Tensor:
    return x + inner(net, i, x)


def parallel(net: Net, i: int, x: Tensor, stem: Tensor) -> Tensor:
    return x + (net.second[i](torch.tanh(net.first[i](x))) + net.scale[i](torch.relu(net.shift[i](x))))


def low_rank(net: Net, i: int, x: Tensor, stem: Tensor) -> Tensor:
    hidden = net.first[i](x) + net.scale[i](net.shift[i](x))
    return x + net.second[i](torch.tanh(hidden))


def long_skip(net: Net, i: int, x: Tensor, stem: Tensor) -> Tensor:
    x = x + inner(net, i, x)
    return x + stem if i == LAYERS - 1 else x


CASES = {
    "position": (plain, Reason.PARAMETER, 1),
    "parallel": (parallel, Reason.BESIDE, LAYERS),
    "low rank": (low_rank, Reason.LINEAR, LAYERS),
    "long skip": (long_skip, Reason.LONG_SKIP, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_every_other_sum_has_a_reason(name: str) -> None:
    step, reason, count = CASES[name]
    net = Net(step)
    found = dm.find_branches(net, X, explain=True)
    assert found.branches == dm.find_branches(net, X) and len(found.branches) == LAYERS
    assert {left.reason: left.count for left in found.left_alone}[reason] == count
    lines = str(found).splitlines()
    assert f"{count} sum{'s' * (count > 1)} left alone in the model: " in " ".join(lines)
    assert reason.value in " ".join(line.strip() for line in lines) and max(map(len, lines)) <= 80


def test_reasons_are_in_the_plan_and_its_json() -> None:
    plan = dm.plan(Net(long_skip), depth_multiplier=2, example_inputs=X)
    assert {left.reason for left in plan.left_alone} == {Reason.PARAMETER, Reason.LONG_SKIP}
    assert dm.Plan.from_json(plan.to_json()) == plan


def test_a_branch_that_is_left_out_is_said_to_be() -> None:
    model = nn.Sequential(*[dm.Residual(nn.Linear(N, N)) for _ in range(3)])
    found = dm.find_branches(model, X, exclude=["0", "1"], explain=True)
    assert [branch.name for branch in found.branches] == ["2.branch"]
    assert [(left.place, left.count, left.reason) for left in found.left_alone] == [("*", 2, Reason.CHOSEN)]
