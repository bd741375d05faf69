"""What counts as a residual branch, on the smallest networks that show it."""

from __future__ import annotations

import pytest
import torch
from blocks import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_depthmup as dm
from torch_depthmup.errors import AmbiguousBranchError, TracingError
from torch_depthmup.running import normalise_name

WIDTH = 8


class Block(nn.Module):
    """A module whose forward is given as a function of itself and its inputs."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, *inputs):
        return self.function(self, *inputs)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def mlp(function, count: int = 3) -> nn.Sequential:
    return nn.Sequential(*[Block(function, a=linear(), b=linear()) for _ in range(count)])


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (3,)), WIDTH)


def two_layers(self, h):
    return self.b(torch.relu(self.a(h)))


def test_fields_of_a_plain_block() -> None:
    branches = dm.find_branches(mlp(lambda self, h: h + two_layers(self, h)), x())
    assert [(b.name, b.stream, b.position, b.additions, b.skip, b.levels) for b in branches] == [
        ("0", 0, 0, 3, "identity", 2), ("1", 0, 1, 3, "identity", 2), ("2", 0, 2, 3, "identity", 2),
    ]  # fmt: skip
    assert set(branches[1].inner) == {"1.a.weight", "1.a.bias"}
    assert set(branches[1].outer) == set(branches[1].carrier) == {"1.b.weight", "1.b.bias"}


@pytest.mark.parametrize(
    "addition",
    [
        lambda self, h: h + two_layers(self, h),
        lambda self, h: two_layers(self, h) + h,
        lambda self, h: h - two_layers(self, h),
        lambda self, h: torch.add(h, two_layers(self, h), alpha=0.5),
        lambda self, h: torch.add(input=h, other=two_layers(self, h)),
        lambda self, h: two_layers(self, h).add_(h),
        lambda self, h: sum([h, two_layers(self, h)]),
        lambda self, h: h.double().float() + two_layers(self, h),
        lambda self, h: h + checkpoint(lambda y: two_layers(self, y), h, use_reentrant=False),
        lambda self, h: h + 0.1 * torch.dropout(two_layers(self, h), 0.5, self.training),
    ],
)
@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_every_way_to_write_an_addition_is_found_and_folded(addition, how: str) -> None:
    model = mlp(addition)
    assert [b.additions for b in dm.find_branches(model, x())] == [3, 3, 3]
    if how == "fold":
        dm.parametrize(model, depth_multiplier=3, example_inputs=x())
        assert dm.plan_of(model).branches[0].carrier == ("0.b.weight", "0.b.bias")


def test_the_gain_before_a_single_layer_is_inner() -> None:
    model = nn.Sequential(Block(lambda self, h: h + self.a(self.norm(h)), a=linear(), norm=nn.LayerNorm(WIDTH)))
    (branch,) = dm.find_branches(model, x())
    assert branch.levels == 1
    assert set(branch.inner) == {"0.norm.weight", "0.norm.bias"}


@pytest.mark.parametrize("linear_attention", [False, True])
def test_parallel_paths_in_one_sum_are_one_branch(linear_attention: bool) -> None:
    def forward(self, h):
        n = self.norm(h)
        first = self.c(n) if linear_attention else self.c(torch.tanh(self.d(n)))
        return first + two_layers(self, n) + h

    model = nn.Sequential(
        *[Block(forward, a=linear(), b=linear(), c=linear(), d=linear(), norm=nn.LayerNorm(WIDTH)) for _ in range(3)]
    )
    branches = dm.find_branches(model, x())
    assert [b.additions for b in branches] == [3, 3, 3]
    assert set(branches[0].carrier) == {"0.b.weight", "0.b.bias", "0.c.weight", "0.c.bias"}


def test_two_additions_on_one_skip_are_two_branches() -> None:
    def forward(self, h):
        n = self.norm(h)
        return (h + self.c(n)) + two_layers(self, n)

    model = nn.Sequential(
        *[Block(forward, a=linear(), b=linear(), c=linear(), norm=nn.LayerNorm(WIDTH)) for _ in range(2)]
    )
    assert [(b.levels, b.position, b.additions) for b in dm.find_branches(model, x())] == [
        (1, 0, 4), (2, 1, 4), (1, 2, 4), (2, 3, 4),
    ]  # fmt: skip


def test_injections_into_the_stream_are_not_branches() -> None:
    def forward(self, tokens):
        h = start = self.embed(tokens)
        for block in self.blocks:
            h = block(h + 0.1 * start) + self.position
        return h @ self.embed.weight.T

    blocks = mlp(lambda self, h: h + two_layers(self, h))
    model = Block(forward, embed=nn.Embedding(9, WIDTH), position=nn.Parameter(torch.ones(WIDTH)), blocks=blocks)
    branches = dm.find_branches(model, torch.tensor([[1, 2, 3]]))
    assert [b.name for b in branches] == ["blocks.0", "blocks.1", "blocks.2"]
    assert {b.additions for b in branches} == {3}


def test_long_skips_join_the_stream_and_are_not_counted() -> None:
    def forward(self, h):
        kept = []
        for block in self.down:
            kept.append(h)
            h = block(h)
        for block in self.up:
            h = block(h + kept.pop())
        return h

    def half():
        return mlp(lambda self, h: h + two_layers(self, h), 2)

    branches = dm.find_branches(Block(forward, down=half(), up=half()), x())
    assert [(b.name, b.additions) for b in branches] == [("down.0", 4), ("down.1", 4), ("up.0", 4), ("up.1", 4)]


def test_a_bias_that_all_layers_share_is_not_a_skip() -> None:
    class Biased(Attention):
        def forward(self, h, bias):
            q, k, v = self.qkv(h).chunk(3, dim=-1)
            return self.proj(torch.softmax(q @ k.transpose(-2, -1) + bias, dim=-1) @ v)

    def forward(self, h):
        bias = self.bias(torch.arange(5)[None, :] - torch.arange(5)[:, None] + 4).squeeze(-1)
        for layer in self.layers:
            h = h + layer(h, bias)
        return h

    model = Block(forward, bias=nn.Embedding(9, 1), layers=nn.ModuleList([Biased(WIDTH) for _ in range(4)]))
    branches = dm.find_branches(model, x(2, 5))
    assert [(b.name, b.additions) for b in branches] == [(f"layers.{i}", 4) for i in range(4)]
    plan = dm.parametrize(model, depth_multiplier=2, example_inputs=x(2, 5))
    assert plan["bias.weight"].role == "outside"


def nested(count: int) -> nn.Module:
    def forward(self, h):
        return h + self.out(self.body(h))

    return nn.Sequential(
        *[Block(forward, out=linear(), body=mlp(lambda self, h: h + two_layers(self, h), 2)) for _ in range(count)]
    )


def test_streams_inside_a_branch_are_their_own() -> None:
    outer = [b for b in dm.find_branches(nested(3), x()) if ".body" not in b.name]
    assert [(b.name, b.additions, set(b.carrier)) for b in outer] == [
        (f"{i}", 3, {f"{i}.out.weight", f"{i}.out.bias"}) for i in range(3)
    ]
    plan = dm.parametrize(nested(3), base=nested(1), example_inputs=x())
    assert [stream.depth_multiplier for stream in plan.streams].count(3) == 1


def test_a_lone_addition_inside_a_branch_is_part_of_it() -> None:
    def forward(self, h):
        scanned = two_layers(self, h)
        return h + self.c(torch.sigmoid(self.d(h)) * (scanned + self.skip * h))

    blocks = [Block(forward, skip=nn.Parameter(torch.ones(WIDTH)), **{n: linear() for n in "abcd"}) for _ in range(3)]
    branches = dm.find_branches(nn.Sequential(*blocks), x())
    assert [(b.name, b.additions, b.levels) for b in branches] == [(f"{i}", 3, 3) for i in range(3)]
    assert "0.skip" in branches[0].inner


def test_paths_from_constants_are_no_levels() -> None:
    def forward(self, h):
        bias = self.b(torch.relu(self.a(torch.linspace(-1, 1, WIDTH))))  # as in Swin v2's position bias
        return h + self.c(torch.tanh(h) + bias)

    blocks = [Block(forward, **{n: linear() for n in "abc"}) for _ in range(3)]
    branches = dm.find_branches(nn.Sequential(*blocks), x())
    assert {b.levels for b in branches} == {1}
    assert set(branches[0].inner) == {"0.a.weight", "0.a.bias", "0.b.weight", "0.b.bias"}


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, h: two_layers(self, h) + self.c(torch.tanh(self.d(h))),
        lambda self, h: h * torch.sigmoid(self.a(h)) + torch.tanh(self.b(h)) * (1 - torch.sigmoid(self.a(h))),
    ],
)
def test_sums_without_a_recognisable_skip_are_refused_by_name(forward) -> None:
    parts = {name: linear() for name in "abcd"}
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(forward, **parts))
    with pytest.raises(AmbiguousBranchError, match=r"^1: .*exclude=\['1'\]"):
        dm.find_branches(model, x())
    assert dm.find_branches(model, x(), exclude=["1"]) == ()


def test_a_declared_branch_is_taken_at_its_word() -> None:
    model = Block(lambda self, h: two_layers(self, h) + self.c(torch.tanh(self.d(h))), **{n: linear() for n in "abcd"})
    (branch,) = dm.find_branches(model, x(), branches=["b"])
    assert set(branch.carrier) == {"b.weight", "b.bias"} and set(branch.inner) == {"a.weight", "a.bias"}
    with pytest.raises(TracingError, match="not added to anything"):
        dm.find_branches(nn.Sequential(linear(), nn.Tanh(), linear()), x(), branches=["0"])


def test_patterns_and_classes_choose_branches() -> None:
    model = mlp(lambda self, h: h + two_layers(self, h), 4)
    assert [b.name for b in dm.find_branches(model, x(), include="[12]")] == ["1", "2"]
    assert [b.name for b in dm.find_branches(model, x(), exclude=["0", "3"])] == ["1", "2"]
    assert dm.find_branches(model, x(), exclude=Block) == ()
    with pytest.raises(TracingError, match="no module of Sequential matches 'layer'"):
        dm.find_branches(model, x(), include=["layer"])


@pytest.mark.parametrize(
    "model, inputs, message",
    [
        (mlp(two_layers), torch.randn(2, 3), "failed on the example inputs"),
        (Block(lambda self, h: self.a(h).detach(), a=linear()), x(), "no tensor that depends"),
        (mlp(lambda self, h: h + checkpoint(self.a, h, use_reentrant=True)), x(), "use_reentrant"),
    ],
)
def test_unreadable_networks_are_refused(model, inputs, message: str) -> None:
    with pytest.raises(TracingError, match=message):
        dm.find_branches(model, inputs)


def test_networks_without_branches_have_none() -> None:
    assert dm.find_branches(nn.Sequential(linear(), nn.ReLU(), linear()), x()) == ()


def test_compiled_and_distributed_wrappers_are_looked_through() -> None:
    model = mlp(lambda self, h: h + two_layers(self, h))
    wanted = dm.find_branches(model, x())
    assert dm.find_branches(torch.compile(model), x()) == wanted
    assert dm.find_branches(nn.DataParallel(model), x()) == wanted


def test_names_lose_what_wrappers_add() -> None:
    assert normalise_name("module._orig_mod.layers.0._orig_mod.fc.weight") == "layers.0.fc.weight"
    assert normalise_name("a.parametrizations.weight.original0") == "a.weight.0"
    assert normalise_name("a.parametrizations.weight.original") == "a.weight"


def test_inference_tensors_do_as_example_inputs() -> None:
    with torch.inference_mode():
        inputs = x()
    assert len(dm.find_branches(mlp(lambda self, h: h + two_layers(self, h)), inputs)) == 3


def test_a_graph_that_waits_for_its_backward_pass_is_not_spoiled() -> None:
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), mlp(lambda self, h: h + two_layers(self, h)))
    loss = model.eval()(x()).sum()  # saves the running statistics
    dm.find_branches(model, x())
    loss.backward()
