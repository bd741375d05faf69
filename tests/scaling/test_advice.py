"""Every refusal says what to write instead; here it is written, and works. Fold and wrap never point at each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_depthmup as dm

N = 8
X = torch.randn(4, N, generator=torch.Generator().manual_seed(0))
Step = Callable[["Net", int, Tensor], Tensor]


class Net(nn.Module):
    """Blocks of a few layers, whose forward is given; ``outs`` are modules of their own for additions, or nothing."""

    def __init__(self, depth: int, step: Step, own: bool = False):
        super().__init__()
        self.first, self.second, self.third = (nn.ModuleList(nn.Linear(N, N) for _ in range(depth)) for _ in range(3))
        self.wide = nn.ModuleList(nn.Linear(N, 2 * N) for _ in range(depth))
        self.closed = nn.ModuleList(nn.Sequential(nn.Linear(N, N), nn.Tanh()) for _ in range(depth))
        self.outs = nn.ModuleList(nn.Identity() for _ in range(depth)) if own else [lambda value: value] * depth
        self.gates = nn.Parameter(torch.zeros(depth))
        self.step, self.taps = step, []

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.taps = []
        for i in range(len(self.first)):
            x = self.step(self, i, x)
        taps, self.taps = self.taps, []
        return x, taps


def gated_by_itself(net: Net, i: int, x: Tensor) -> Tensor:
    y = net.first[i](x)
    return x + net.outs[i](y * torch.sigmoid(net.second[i](y)))


def squashed(net: Net, i: int, x: Tensor) -> Tensor:
    return x + net.outs[i](torch.tanh(net.second[i](torch.relu(net.first[i](x)))))


def squashed_in_a_module(net: Net, i: int, x: Tensor) -> Tensor:
    return x + net.closed[i](x)


def gate_of_all_blocks(net: Net, i: int, x: Tensor) -> Tensor:
    return x + net.gates[i] * net.second[i](torch.tanh(net.first[i](x)))


def gate_of_all_blocks_inline(net: Net, i: int, x: Tensor) -> Tensor:
    f = net.first[i]
    return x + net.outs[i](net.gates[i] * torch.tanh(x @ f.weight.T + f.bias))


def interpolated(net: Net, i: int, x: Tensor) -> Tensor:
    return x + net.outs[i](0.3 * (net.first[i](torch.tanh(x)) - x))


def skip_half(net: Net, i: int, x: Tensor) -> Tensor:
    residual, skip = net.wide[i](torch.tanh(x)).chunk(2, -1)
    net.taps.append(skip)
    return x + net.outs[i](residual)


def tapped(net: Net, i: int, x: Tensor) -> Tensor:
    f = net.second[i](torch.tanh(net.first[i](x)))
    net.taps.append(f.square())
    return x + net.outs[i](f)


def other_channels(net: Net, i: int, x: Tensor) -> Tensor:
    y = net.wide[i](torch.tanh(x))
    return x + net.outs[i](y[:, :N]) + 0.1 * net.third[i](torch.tanh(y[:, N:]))


def by_functions(net: Net, i: int, x: Tensor) -> Tensor:
    first, second = net.first[i].weight, net.second[i].weight
    return x + torch.tanh(x @ first) @ second


def mixed(net: Net, i: int, x: Tensor) -> Tensor:
    """Neither way works for all: the first addition cannot be folded, the second not wrapped."""
    return by_functions(net, i, x + net.outs[i](torch.tanh(net.third[i](x))))


STEPS = (
    gated_by_itself,
    squashed,
    squashed_in_a_module,
    gate_of_all_blocks,
    gate_of_all_blocks_inline,
    interpolated,
    skip_half,
    tapped,
    other_channels,
    by_functions,
)


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("step", STEPS)
def test_where_one_way_is_refused_the_advice_works(step: Step, how: str) -> None:
    def attempt(own: bool = False, **options: Any) -> Any:
        return dm.parametrize(Net(6, step, own), base=Net(2, step, own), example_inputs=X, **options)

    message = refusal(attempt, how=how)
    if message is None:
        return  # this way works
    for options in advised(message, {"how": how}):
        assert attempt(own="nn.Identity()" in message, **options).streams[0].depth_multiplier == 3


def test_an_identity_takes_the_multiplier_and_nothing_else_does() -> None:
    torch.manual_seed(0)
    model, plain = Net(6, tapped, True), Net(6, tapped)
    plain.load_state_dict(model.state_dict())
    dm.parametrize(model, depth_multiplier=3, example_inputs=X, how="wrap", rule="complete-p")
    x = X
    for i in range(6):
        f = plain.second[i](torch.tanh(plain.first[i](x)))
        torch.testing.assert_close(model(X)[1][i], f.square())
        x = x + f / 3
    torch.testing.assert_close(model(X)[0], x)


def refusal(attempt: Callable[..., Any], **options: Any) -> str | None:
    try:
        attempt(**options)
    except dm.DepthMuPError as error:
        return str(error)
    return None


def advised(message: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options that a message says to write, each alternative by itself, beside those that were there."""
    found = re.findall(r"\b(how|exclude|branches|depth_multiplier)=('\w+'|\[[^]]*\]|\d+)", message.partition(". ")[2])
    wanted = [(key, ast.literal_eval(value)) for key, value in found if (key, f"'{options.get(key)}'") != (key, value)]
    assert wanted or "nn.Identity()" in message, message
    return [{**options, key: value} for key, value in wanted]


# Sums in doubt, patterns, and the rest


class Heads(nn.Module):
    """The model's own forward adds the values of two heads."""

    def __init__(self, depth: int):
        super().__init__()
        self.blocks = nn.Sequential(*[dm.Residual(half()) for _ in range(depth)])
        self.head, self.aux = nn.Linear(N, 3), nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return torch.relu(self.head(x)) + 0.5 * self.aux(x.square()).tanh()


def half() -> nn.Sequential:
    return nn.Sequential(nn.Linear(N, 12), nn.Tanh(), nn.Linear(12, N))


class Split(nn.Module):
    """Two paths without a skip in the middle of a network of residual blocks."""

    def __init__(self, depth: int):
        super().__init__()
        self.before, self.after = (nn.Sequential(*[dm.Residual(half()) for _ in range(depth)]) for _ in range(2))
        self.middle = Middle()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.middle(self.before(x)))


class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = half(), half()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Gates(Middle):
    """A sum of two products, of which no module returns either."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.left(x)) * torch.sin(x) + torch.tanh(self.right(x)) * x


class SplitByGates(Split):
    def __init__(self, depth: int):
        super().__init__(depth)
        self.middle = Gates()


class Looped(nn.Module):
    """One block many times, and blocks of their own."""

    def __init__(self, depth: int):
        super().__init__()
        self.block, self.rest, self.depth = half(), nn.ModuleList(half() for _ in range(depth)), depth

    def forward(self, x: Tensor) -> Tensor:
        for f in self.rest:
            x = x + self.block(x)
            x = x + f(x)
        return x


class Unmatched(nn.Sequential):
    def __init__(self, depth: int):
        super().__init__(*[dm.Residual(half()) for _ in range(depth)])


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:
        return x + f

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


MODELS: dict[str, tuple[Callable[[int], nn.Module], dict[str, Any]]] = {
    "two heads": (Heads, {}),
    "two paths": (Split, {}),
    "two gated paths": (SplitByGates, {}),
    "one block many times": (Looped, {}),
    "a pattern that the base has not": (Unmatched, {"exclude": ["7"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_in_doubt_can_be_decided_as_advised(name: str) -> None:
    make, options = MODELS[name]

    def attempt(**options: Any) -> Any:
        return dm.parametrize(make(8), base=make(2), example_inputs=X, **options)

    message = refusal(attempt, **options)
    assert message is not None
    if name.startswith("a pattern"):
        assert "matches modules of the model and none of the base" in message
        attempt(exclude=["0"])
        return
    for following in advised(message, options):
        assert len(attempt(**following).branches) >= 8


class HiddenSums(nn.Module):
    def __init__(self, depth: int, add: Callable):
        super().__init__()
        self.blocks, self.add = nn.ModuleList(half() for _ in range(depth)), add

    def forward(self, x: Tensor) -> Tensor:
        h, x = self.blocks[0](x), torch.tanh(x)
        for f in self.blocks[1:]:
            x = self.add(x, h)
            h = f(x)
        return x + h


def test_a_function_of_the_users_that_may_hide_sums_is_named() -> None:
    with pytest.raises(dm.DepthMuPError, match="Hidden, an autograd Function.* Write it"):
        dm.parametrize(HiddenSums(8, Hidden.apply), base=HiddenSums(2, Hidden.apply), example_inputs=X)
    plan = dm.parametrize(HiddenSums(8, torch.add), base=HiddenSums(2, torch.add), example_inputs=X)
    assert len(plan.branches) == 8


class Checkpointed(nn.Module):
    def __init__(self, depth: int, reentrant: bool):
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList(half() for _ in range(depth)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for f in self.blocks:
            x = x + checkpoint(f, x, use_reentrant=self.reentrant)
        return x


def test_checkpointing_that_hides_the_graph_can_be_written_otherwise() -> None:
    with pytest.raises(dm.DepthMuPError, match="use_reentrant=False"):
        dm.parametrize(Checkpointed(4, True), depth_multiplier=2, example_inputs=X)
    assert len(dm.parametrize(Checkpointed(4, False), depth_multiplier=2, example_inputs=X).branches) == 4


class Experts(nn.Module):
    """Each sample goes to one of two experts."""

    def __init__(self, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(half() for _ in range(2)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        which = (x[:, 0] > 0).long()
        for experts in self.blocks:
            y = torch.zeros_like(x)
            for i, expert in enumerate(experts):
                rows = (which == i).nonzero().squeeze(1)
                if len(rows):
                    y = y.index_add(0, rows, expert(x[rows]))
            x = torch.cat([x[:, :1], (x + y)[:, 1:]], 1)
        return x


def test_experts_that_were_not_reached_are_reached_by_more_samples() -> None:
    with pytest.raises(dm.DepthMuPError, match="not reached by the example inputs.*more tokens"):
        dm.parametrize(Experts(4), depth_multiplier=2, example_inputs=X.abs())
    assert dm.parametrize(Experts(4), depth_multiplier=2, example_inputs=X).streams[0].additions == 4


@pytest.mark.parametrize(
    ("attempt", "says", "followed"),
    [
        ({"depth_multiplier": 3}, "Pass the shallow model itself, base=small_model", {"base": 2}),
        ({}, "pass base=small_model, or depth_multiplier", {"depth_multiplier": 2}),
        ({"base": 16}, "swap the two", {"base": 8}),
        ({"base": 2, "depth_multiplier": 2}, "not both", {"base": 2}),
        ({"base": 2, "include": ["nothing"]}, "no module of Unmatched matches 'nothing'", {"base": 2, "include": "*"}),
        ({"base": 2, "branches": ["*.branch.0"]}, "not added to\\s+anything", {"base": 2, "branches": "*.branch"}),
    ],
)
def test_arguments_are_corrected_as_advised(attempt: dict, says: str, followed: dict) -> None:
    def run(base: int | None = None, **options: Any) -> Any:
        small = {} if base is None else {"base": Unmatched(base)}
        return dm.parametrize(Unmatched(8), example_inputs=X, **small, **options)

    with pytest.raises(dm.DepthMuPError, match=says):
        run(**attempt)
    assert len(run(**followed).branches) == 8
