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


def modulated(net: Net, i: int, x: Tensor, stem: Tensor) -> Tensor:
    condition = torch.sigmoid(stem)
    return x + net.first[i](torch.tanh(net.second[i](x)) * net.scale[i](condition) + net.shift[i](condition))


def interpolated(net: Net, i: int, x: Tensor, stem: Tensor) -> Tensor:
    return x + 0.3 * (inner(net, i, x) - x)


def skip_in_the_branch(net: Net, i: int, x: Tensor, stem: Tensor) -> Tensor:
    hidden = net.first[i](x)
    return x + net.second[i](torch.tanh(net.scale[i](hidden)) + 0.5 * hidden)


def written_out(net: Net, i: int, x: Tensor, stem: Tensor) -> Tensor:
    h = net.first[i](x)
    return x + net.second[i](0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h**3))))


def bias_of_all(net: Net, i: int, x: Tensor, stem: Tensor) -> Tensor:
    scores = net.first[i](x) + torch.tanh(net.shift[0](stem))
    return x + net.second[i](torch.softmax(scores, -1) * net.scale[i](x))


CASES = {
    "modulation": (modulated, Reason.MODULATION, LAYERS - 1),  # the first block modulates the condition itself
    "interpolation": (interpolated, Reason.TAKEN_AWAY, LAYERS),
    "skip in the branch": (skip_in_the_branch, Reason.LONE, LAYERS),
    "activation": (written_out, Reason.NO_WEIGHTS, LAYERS),
    "bias of all layers": (bias_of_all, Reason.BESIDE, LAYERS),
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


def test_a_model_that_returns_its_loss_adds_numbers() -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*[dm.Residual(nn.Linear(N, N)) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y.square().mean() + 0.1 * y.abs().mean()

    found = dm.find_branches(Trained(), X, explain=True)
    assert [(left.count, left.reason) for left in found.left_alone] == [(1, Reason.NUMBERS)]
    assert "adds single numbers, such as losses" in str(found)
