"""What the finder cannot see is refused by name, with and without a base."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.errors import AmbiguousBranchError


def half() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


class Halves(nn.Module):
    """A branch written with +, and one whose sum does not show."""

    def __init__(self, depth: int, way):
        super().__init__()
        self.seen, self.unseen = (nn.ModuleList(half() for _ in range(depth)) for _ in range(2))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        for seen, unseen in zip(self.seen, self.unseen, strict=True):
            x = self.way(x + seen(x), unseen(x))
        return x


WAYS = {
    "logaddexp": torch.logaddexp,
    "product with a constant matrix": lambda x, f: torch.cat([x, f], -1) @ torch.eye(8).repeat(2, 1),
    "einsum": lambda x, f: torch.einsum("k,kbi->bi", torch.ones(2), torch.stack([x, f])),
    "hypot": lambda x, f: torch.hypot(x, f + 1),
}
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_sum_that_does_not_show_is_refused_and_the_model_left_alone(way: str, how) -> None:
    model = Halves(8, WAYS[way])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AmbiguousBranchError, match=r"unseen\.0.*lie outside, and|not be told"):
        dm.parametrize(model, base=Halves(2, WAYS[way]), example_inputs=X, how=how)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", sorted(WAYS))
def test_without_a_base_what_repeats_like_the_blocks_is_refused(way: str) -> None:
    with pytest.raises(AmbiguousBranchError, match="as many as there are blocks|not be told"):
        dm.parametrize(Halves(8, WAYS[way]), depth_multiplier=4, example_inputs=X)


@pytest.mark.parametrize("way", ["logaddexp", "einsum"])
def test_the_advice_works(way: str) -> None:
    model = Halves(8, WAYS[way])
    plan = dm.parametrize(model, base=Halves(2, WAYS[way]), example_inputs=X, exclude=["unseen.*"])
    assert {plan[name].role for name, _ in model.named_parameters() if name.startswith("unseen")} == {"outside"}
    plus = Halves(8, torch.add)
    assert len(dm.parametrize(plus, base=Halves(2, torch.add), example_inputs=X).branches) == 16


class Sometimes(nn.Module):
    """A block without a skip in front of blocks with one, as where a stage changes its width."""

    def __init__(self, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(half() for _ in range(depth + 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = x + block(x)
        return x


def test_as_many_blocks_without_a_skip_as_in_the_base_are_meant() -> None:
    plan = dm.parametrize(Sometimes(8), base=Sometimes(2), example_inputs=X)
    assert plan["blocks.0.0.weight"].role == "outside" and plan["blocks.1.0.weight"].role == "inner"
    with pytest.raises(AmbiguousBranchError, match="of the same kind, lies in one; pass base=small_model"):
        dm.parametrize(Sometimes(8), depth_multiplier=4, example_inputs=X)


def test_layers_of_one_branch_are_no_blocks() -> None:
    """``blocks.3.0`` is inner and ``blocks.3.2`` outer in every block; that is one part each."""
    model = nn.Sequential(*[dm.Residual(half()) for _ in range(6)])
    plan = dm.parametrize(model, depth_multiplier=3, example_inputs=X)
    assert {plan[f"{i}.branch.0.weight"].role for i in range(6)} == {"inner"}


def test_a_kind_that_the_base_has_not_is_of_another_family() -> None:
    def net(depth: int, bias: bool) -> nn.Module:
        model = nn.Sequential(*[dm.Residual(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) for _ in range(depth)])
        return nn.Sequential(OrderedDict(stem=nn.Linear(4, 4, bias=bias), blocks=model))

    with pytest.raises(dm.DepthMuPError, match=r"stem\.bias has no counterpart in the base"):
        dm.parametrize(net(4, True), base=net(2, False), example_inputs=torch.randn(2, 4))


class Fused(nn.Module):
    """Expands and projects in one go; ``conv.1`` projects."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Linear(8, 12), nn.Sequential(nn.Tanh(), nn.Linear(12, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Separate(nn.Module):
    """Expands, mixes and projects; ``conv.1`` mixes."""

    def __init__(self) -> None:
        super().__init__()
        mix = nn.Sequential(nn.Tanh(), nn.Linear(12, 12))
        self.conv = nn.Sequential(nn.Linear(8, 12), mix, nn.Tanh(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


@pytest.mark.parametrize("order", [lambda i: i % 2, lambda i: i < 2, lambda i: i > 2], ids=["turns", "first", "last"])
def test_blocks_of_two_classes_may_call_different_layers_alike(order) -> None:
    model = nn.Sequential(*(Fused() if order(i) else Separate() for i in range(4)))
    plan = dm.parametrize(model, depth_multiplier=4, example_inputs=X)
    assert {len(b.outer) for b in plan.branches} == {2}
    assert {plan["3.conv.1.1.weight"].role} == {"outer" if order(3) else "inner"}


class Stages(nn.Module):
    """Three stages of three blocks, and before each stage a layer that changes the stream."""

    def __init__(self, placed: str):
        super().__init__()
        blocks = lambda: nn.Sequential(*(Fused() for _ in range(3)))  # noqa: E731
        change = lambda: nn.Linear(8, 8)  # noqa: E731
        self.stages = nn.ModuleList(nn.ModuleDict({placed: change(), "blocks": blocks()}) for _ in range(3))
        self.placed = placed

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage["blocks"](torch.tanh(stage[self.placed](x)))
        return x


@pytest.mark.parametrize("placed", ["downsample", "0", "a_first"])
def test_a_layer_of_every_stage_is_no_hidden_branch(placed: str) -> None:
    plan = dm.parametrize(Stages(placed), depth_multiplier=3, example_inputs=X)
    assert len(plan.branches) == 9
    assert {plan[f"stages.{i}.{placed}.weight"].role for i in range(3)} <= {"input", "outside"}


class Mixed(nn.Module):
    """Every second layer's sum does not show; ``name`` gives the layers' names."""

    def __init__(self, depth: int, name: str):
        super().__init__()
        self.names = [name.format("ab"[i % 2], i // 2, i) for i in range(2 * depth)]
        self.layers = nn.ModuleDict({each: nn.Linear(8, 8) for each in self.names})

    def forward(self, x: Tensor) -> Tensor:
        for i, name in enumerate(self.names):
            f = self.layers[name](torch.tanh(x))
            x = torch.logaddexp(x, f) if i % 2 else x + f
        return x


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("{0}{1}", r"exclude=\['layers\.b\*'\]"),
        ("{0}_{1}", r"exclude=\['layers\.b_\*'\]"),
        ("{2}", "ModuleList of their own"),
    ],
)
def test_what_is_to_be_left_out_is_not_what_lies_in_branches(name: str, advice: str) -> None:
    with pytest.raises(AmbiguousBranchError, match=f"4 of its kind lie outside, and 2 in the base.*{advice}"):
        dm.parametrize(Mixed(4, name), base=Mixed(2, name), example_inputs=X)
    if name != "{2}":
        pattern = advice.partition("'")[2].partition("'")[0].replace("\\", "")
        plan = dm.parametrize(Mixed(4, name), base=Mixed(2, name), example_inputs=X, exclude=[pattern])
        assert len(plan.branches) == 4


@pytest.mark.parametrize("ends", [(0,), (5,), (0, 5)])
def test_a_bias_that_the_base_lacks_is_no_hidden_sum(ends: tuple[int, ...]) -> None:
    def flat(depth: int, biased: bool) -> nn.Module:
        """Modules with numbers for names: the first and the last are no blocks."""
        bias = [biased or i not in ends for i in (0, 5)]
        blocks = [dm.Residual(half()) for _ in range(depth)]
        return nn.Sequential(nn.Linear(8, 8, bias=bias[0]), *blocks, nn.Linear(8, 8, bias=bias[1]))

    with pytest.raises(AmbiguousBranchError, match=r"\.bias has no counterpart in the base"):
        dm.parametrize(flat(4, True), base=flat(2, False), example_inputs=X)
    assert len(dm.parametrize(flat(4, True), base=flat(2, True), example_inputs=X).branches) == 4
