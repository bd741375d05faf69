"""Weights that are made of parameters, and layers that are used several times: levels, sides, carriers, outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from blocks import Layers, Residuals, assert_scaled
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import torch_depthmup as dm
from torch_depthmup.tracing.additions import Reason

N = 8
FIXED = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(1)))[0]
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))

Function = Callable[[Layers, Tensor], Tensor]


def stack(function: Function, **parts: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """Networks of blocks with this branch, of any depth."""
    return lambda depth: Residuals(depth, lambda: Layers(function, N, **{k: make() for k, make in parts.items()}))


def sides(plan: dm.Plan, block: int = 1) -> dict[str, set[str]]:
    """The layers of one block on either side."""
    branch = next(b for b in plan.branches if any(name.startswith(f"blocks.{block}.") for name in b.outer))
    return {side: {name.split(".")[2] for name in getattr(branch, side)} for side in ("inner", "outer")}


# Weights that are made of parameters

MADE: dict[str, Function] = {
    "constant matrix before": lambda self, x: functional.linear(torch.tanh(self.a(x)), FIXED @ self.b.weight),
    "constant matrix after": lambda self, x: torch.tanh(self.a(x)) @ (self.b.weight.T @ FIXED),
    "constant basis": lambda self, x: torch.tanh(self.a(x)) @ torch.einsum("ij,jk->ik", FIXED, self.b.weight),
    "constant kernel": lambda self, x: functional.linear(
        torch.tanh(self.a(x)), functional.conv1d(self.b.weight[:, None], FIXED[:1, None, :3], padding=1)[:, 0]
    ),
    "mask": lambda self, x: functional.linear(torch.tanh(self.a(x)), self.b.weight * FIXED.tril(), self.b.bias),
    "number": lambda self, x: functional.linear(torch.tanh(self.a(x)), self.b.weight * 0.3, self.b.bias),
    "mean taken off": lambda self, x: functional.linear(torch.tanh(self.a(x)), self.b.weight - self.b.weight.mean(0)),
    "cast": lambda self, x: functional.linear(torch.tanh(self.a(x)), self.b.weight.double().float()),
}


@pytest.mark.parametrize("name", MADE)
def test_a_weight_that_constants_are_applied_to_is_a_weight_and_carries_the_branch(name: str) -> None:
    plan = assert_scaled(stack(MADE[name]), (X,), "fold")
    assert {branch.levels for branch in plan.branches} == {2} and len(plan.branches) == 4
    assert sides(plan) == {"inner": {"a"}, "outer": {"b"}}
    assert plan.branches[0].carrier[0] == "blocks.0.b.weight"


@pytest.mark.parametrize("name", [name for name in MADE if name.startswith("constant")])
def test_a_weight_that_constants_are_applied_to_may_be_inner(name: str) -> None:
    plan = assert_scaled(stack(lambda self, x: self.c(torch.relu(MADE[name](self, x)))), (X,), "wrap")
    assert {branch.levels for branch in plan.branches} == {3}
    assert sides(plan) == {"inner": {"a", "b"}, "outer": {"c"}}


def two_layers(self: Layers, x: Tensor) -> Tensor:
    return self.b(torch.tanh(self.a(x)))


def spectral() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(N, N))


def old_spectral() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(N, N))


def orthogonal() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(N, N))


@pytest.mark.parametrize("normed", [spectral, old_spectral, orthogonal])
def test_a_layer_with_its_weight_normed_is_a_layer(normed: Callable[[], nn.Module]) -> None:
    for how in ("fold", "wrap"):
        plan = assert_scaled(stack(two_layers, a=normed), (X,), how)
        assert {branch.levels for branch in plan.branches} == {2}
        assert sides(plan) == {"inner": {"a"}, "outer": {"b"}}
    plan = assert_scaled(stack(two_layers, b=normed), (X,), "wrap")
    assert {branch.levels for branch in plan.branches} == {2}
    assert sides(plan) == {"inner": {"a"}, "outer": {"b"}}
    with pytest.raises(dm.DepthMuPError, match="reparametrized weight comes last.*Write how='wrap'"):
        assert_scaled(stack(two_layers, b=normed), (X,), "fold")


# Constants that data are multiplied with

MIXED: dict[str, Function] = {
    "matrix": lambda self, x: two_layers(self, x) @ FIXED,
    "over positions": lambda self, x: FIXED[:4, :4] @ two_layers(self, x),
    "blur": lambda self, x: (
        functional.conv1d(two_layers(self, x).mT, FIXED[:1, None, :3].expand(N, 1, 3), padding=1, groups=N).mT
    ),
}


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("name", MIXED)
def test_a_constant_after_the_last_layer_leaves_that_the_carrier(name: str, how: str) -> None:
    plan = assert_scaled(stack(MIXED[name]), (SERIES,), how)
    assert set(plan.branches[0].carrier) == {"blocks.0.b.weight", "blocks.0.b.bias"}
    assert {branch.levels for branch in plan.branches} == {2}


def softmax_by_hand(self: Layers, x: Tensor) -> Tensor:
    return torch.softmax(self.a(x) @ self.b(x).mT, -1) @ self.c(x)


def neighbours(self: Layers, x: Tensor) -> Tensor:
    distances = torch.exp(-torch.cdist(x.detach(), x.detach()))
    return distances @ self.c(torch.tanh(self.a(x)))


@pytest.mark.parametrize("function", [softmax_by_hand, neighbours])
def test_values_that_are_mixed_by_a_matrix_of_data_carry_the_branch(function: Function) -> None:
    plan = assert_scaled(stack(function), (SERIES,), "fold")
    assert set(plan.branches[0].carrier) == {"blocks.0.c.weight", "blocks.0.c.bias"}


# Recurrences, unrolled


def cell(self: Layers, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for step in x.unbind(1):
        h = torch.tanh(self.a(step) + self.b(h))
        out.append(h)
    return self.c(torch.stack(out, 1))


def residual_cell(self: Layers, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for step in x.unbind(1):
        h = h + torch.tanh(self.a(step) + self.b(h))
        out.append(h)
    return self.c(torch.stack(out, 1))


def looped(self: Layers, x: Tensor) -> Tensor:
    h = self.a(x)
    for _ in range(3):
        h = h + torch.tanh(self.b(h))
    return self.c(h)


def fixed_point(self: Layers, x: Tensor) -> Tensor:
    h = x
    for _ in range(3):
        h = h + torch.tanh(self.a(x) + self.b(h))
    return self.c(h)


def decaying(self: Layers, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for step in x.unbind(1):
        h = 0.9 * h + self.a(step * torch.sigmoid(self.b(h)))
        out.append(h)
    return self.c(torch.stack(out, 1))


STEPS = {residual_cell: 3, looped: 3, fixed_point: 3, decaying: 3}
"""Recurrences whose steps are residual additions, with their number in a block: the first state may be a constant."""


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("function", [cell, *STEPS])
def test_the_steps_of_a_recurrence_in_a_branch_are_a_part_of_it(function: Function, how: str) -> None:
    plan = assert_scaled(stack(function), (SERIES,), how)
    assert sides(plan) == {"inner": {"a", "b"}, "outer": {"c"}}
    assert [(s.additions, s.depth_multiplier) for s in plan.streams] == [(4, 2.0)]
    steps = {left.reason: left.count for left in plan.left_alone}.get(Reason.RECURRENCE, 0)
    assert steps == 4 * STEPS.get(function, 0)


class Stacked(nn.Module):
    """Time outside, layers inside: each layer's addition is written once and happens at every step."""

    def __init__(self, depth: int, cell: type[nn.RNNCellBase]):
        super().__init__()
        self.stem, self.head = nn.Linear(5, N), nn.Linear(N, 3)
        self.cells = nn.ModuleList(cell(N, N) for _ in range(depth))
        self.outs = nn.ModuleList(nn.Linear(N, N) for _ in range(depth))

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        states, out = [torch.zeros_like(self.stem(x[:, 0]))] * len(self.cells), []
        for step in x.unbind(1):
            h = self.stem(step)
            for i, (cell, last) in enumerate(zip(self.cells, self.outs, strict=True)):
                states[i] = cell(h, states[i])
                h = h + (last(states[i]) if m == 1 else m * last(states[i]))
            out.append(self.head(h))
        return torch.stack(out, 1)


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.RNNCell])
def test_layers_inside_of_steps_are_scaled_once(kind: type[nn.RNNCellBase], how: str) -> None:
    plan = assert_scaled(lambda depth: Stacked(depth, kind), (SERIES,), how)
    assert [(s.additions, s.depth_multiplier) for s in plan.streams] == [(4, 2.0)] * SERIES.shape[1]
    assert {plan[f"outs.{i}.weight"].role for i in range(4)} == {"outer"}
    assert {plan[f"cells.{i}.weight_hh"].role for i in range(4)} == {"inner"}


class Loop(nn.Module):
    """One block many times (``outer``), or a branch that holds such a loop."""

    def __init__(self, depth: int, outer: bool):
        super().__init__()
        self.stem, self.out, self.depth, self.outer = nn.Linear(5, N), nn.Linear(N, N), depth, outer
        self.f = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N))

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        h = start = self.stem(x)
        for _ in range(self.depth):
            h = h + self.f(h)
        return h if self.outer else start + self.out(h)


@pytest.mark.parametrize(("outer", "message"), [(True, "tied weights"), (False, "weight layers in the model and")])
def test_a_loop_that_gets_longer_is_refused(outer: bool, message: str) -> None:
    with pytest.raises(dm.DepthMuPError, match=message):
        dm.parametrize(Loop(8, outer), base=Loop(2, outer), example_inputs=X)


class Field(nn.Module):
    """Everything is computed from coordinates that are made inside forward; the input only shifts the result."""

    def __init__(self, depth: int, layer: Callable[[], nn.Module]):
        super().__init__()
        self.stem, self.head = nn.Linear(2, N), nn.Linear(N, 5)
        self.ups = nn.ModuleList(layer() for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(N, N) for _ in range(depth))

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        axis = torch.linspace(-1, 1, 3)
        h = self.stem(torch.cartesian_prod(axis, axis))
        for up, down in zip(self.ups, self.downs, strict=True):
            h = h + m * down(torch.sin(up(h)))
        return self.head(h).mean(0) + x


@pytest.mark.parametrize("layer", [lambda: nn.Linear(N, N), spectral, orthogonal])
def test_a_network_on_constants_is_read_as_any_other(layer: Callable[[], nn.Module]) -> None:
    plan = assert_scaled(lambda depth: Field(depth, layer), (X,), "fold")
    assert [(branch.levels, branch.additions) for branch in plan.branches] == [(2, 4)] * 4
    assert plan["downs.1.weight"].role == "outer" and plan["stem.weight"].role == "outside"
