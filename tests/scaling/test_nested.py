"""Streams inside of branches: their number may grow with the outer depth, or their depth with the network's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm

N = 6
X = torch.randn(3, N, generator=torch.Generator().manual_seed(0))


def body(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, width))


class Bottleneck(nn.Module):
    """As in MobileBERT: a narrow stream of its own between two layers, post-norm."""

    def __init__(self, inner: int):
        super().__init__()
        self.into, self.out, self.norm = nn.Linear(N, 4), nn.Linear(4, N), nn.LayerNorm(N)
        self.inner = nn.ModuleList(body(4) for _ in range(inner))

    def forward(self, x: Tensor, outer: float = 1.0, inner: float = 1.0) -> Tensor:
        h = self.into(x)
        for f in self.inner:
            h = h + inner * f(h)
        return self.norm(x + outer * self.out(h))


class Group(nn.Module):
    """As in RCAN: blocks and a last layer, with a skip around all of them."""

    def __init__(self, inner: int):
        super().__init__()
        self.inner, self.out = nn.ModuleList(body(N) for _ in range(inner)), nn.Linear(N, N)

    def forward(self, x: Tensor, outer: float = 1.0, inner: float = 1.0) -> Tensor:
        h = x
        for f in self.inner:
            h = h + inner * f(h)
        return outer * self.out(h) + x


class Transformer(nn.Module):
    """As in a diffusion model's U-Net: blocks between two projections, behind a plain residual block."""

    def __init__(self, inner: int):
        super().__init__()
        self.plain, self.into, self.out = body(N), nn.Linear(N, 5), nn.Linear(5, N)
        self.inner = nn.ModuleList(nn.ModuleList([body(5), body(5)]) for _ in range(inner))

    def forward(self, x: Tensor, outer: float = 1.0, inner: float = 1.0) -> Tensor:
        x = x + outer * self.plain(x)
        h = self.into(x)
        for f, g in self.inner:
            h = h + inner * f(h)
            h = h + inner * g(h)
        return x + outer * self.out(torch.relu(h))


class EndsInSum(nn.Module):
    """The last thing in the branch is a sum: no layer is the last."""

    def __init__(self, inner: int):
        super().__init__()
        self.body = Narrow(inner)

    def forward(self, x: Tensor, outer: float = 1.0, inner: float = 1.0) -> Tensor:
        return x + outer * self.body(x, inner)


class Narrow(nn.Module):
    def __init__(self, inner: int):
        super().__init__()
        self.into, self.inner = nn.Linear(N, N), nn.ModuleList(body(N) for _ in range(inner))

    def forward(self, x: Tensor, inner: float = 1.0) -> Tensor:
        h = torch.relu(self.into(x))
        for f in self.inner:
            h = h + inner * f(h)
        return h


class Net(nn.Module):
    def __init__(self, block: Callable[[int], nn.Module], depth: int, inner: int):
        super().__init__()
        self.stem, self.blocks = nn.Linear(N, N), nn.ModuleList(block(inner) for _ in range(depth))

    def forward(self, x: Tensor, outer: float = 1.0, inner: float = 1.0) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, outer, inner) if outer * inner != 1 else block(x)
        return x


BLOCKS = {"bottleneck": (Bottleneck, 1), "group": (Group, 1), "transformer": (Transformer, 2)}


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize(("depth", "base"), [(4, 2), (4, 1)])
@pytest.mark.parametrize("name", BLOCKS)
def test_more_blocks_have_more_streams_inside_which_stay_as_they_are(name: str, depth: int, base: int, how) -> None:
    make, outer = BLOCKS[name]
    model, ratio = Net(make, depth, 2), depth / base
    plain = copy.deepcopy(model)
    plan = dm.parametrize(model, base=Net(make, base, 2), example_inputs=X, how=how, rule="complete-p")
    depths = sorted((s.additions, s.depth_multiplier) for s in plan.streams)
    assert depths.count((depth * outer, ratio)) == 1 and len(depths) == depth + 1
    torch.testing.assert_close(model(X), plain(X, outer=1 / ratio))
    inside = [entry for entry in plan.entries if ".inner." in entry.name]
    assert {(e.role, e.depth_multiplier) for e in inside} == {("inner", ratio)}
    assert plan["blocks.0.out.weight"].role == "outer"


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("base", [2, 1])
@pytest.mark.parametrize("name", BLOCKS)
def test_deeper_streams_inside_leave_the_outer_branches_alone(name: str, base: int, how) -> None:
    make, _ = BLOCKS[name]
    model = Net(make, 2, 4)
    plain = copy.deepcopy(model)
    plan = dm.parametrize(model, base=Net(make, 2, base), example_inputs=X, how=how, rule="complete-p")
    assert {s.depth_multiplier for s in plan.streams} == {1.0, 4 / base}
    torch.testing.assert_close(model(X), plain(X, inner=base / 4))
    assert plan["blocks.0.out.weight"].depth_multiplier == 1
    inside = [entry for entry in plan.entries if ".inner." in entry.name]
    assert {(e.role, e.depth_multiplier) for e in inside} == {("inner", 4 / base), ("outer", 4 / base)}


def test_a_branch_that_ends_in_a_sum_is_wrapped() -> None:
    model = Net(EndsInSum, 4, 2)
    plain = copy.deepcopy(model)
    with pytest.raises(dm.DepthMuPError, match="Write how='wrap'"):
        dm.parametrize(model, base=Net(EndsInSum, 2, 2), example_inputs=X)
    plan = dm.parametrize(model, base=Net(EndsInSum, 2, 2), example_inputs=X, how="wrap", rule="complete-p")
    torch.testing.assert_close(model(X), plain(X, outer=0.5))
    assert [plan[f"blocks.0.body.inner.{i}.2.weight"].role for i in range(2)] == ["inner", "outer"]


def test_two_depths_at_once_are_refused_and_the_advice_works() -> None:
    with pytest.raises(dm.DepthMuPError, match="both depths change.*outer depth, or that of the streams inside"):
        dm.parametrize(Net(Bottleneck, 4, 4), base=Net(Bottleneck, 2, 2), example_inputs=X)
    for outer, inner in ((4, 2), (2, 4)):
        base = Net(Bottleneck, outer, inner)
        assert len(dm.parametrize(Net(Bottleneck, 4, 4), base=base, example_inputs=X).streams) == 5
