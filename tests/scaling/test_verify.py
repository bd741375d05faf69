"""The whole network is measured: a multiplier that reaches anything but its addition is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.errors import DepthMuPError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Residual blocks whose branches' last weights give something else besides."""

    def __init__(self, depth: int, last: int, forward):
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(8, 12) for _ in range(depth))
        self.last = nn.ModuleList(nn.Linear(12, last) for _ in range(depth))
        self.aux, self.way = nn.Linear(8, 3), forward

    def forward(self, x: Tensor):
        return self.way(self, x)


def tapped(net: Net, x: Tensor):
    taps = []
    for first, last in zip(net.first, net.last, strict=True):
        f = last(torch.tanh(first(x)))
        x = x + f
        taps.append(f)
    return x, torch.stack(taps)


def skip_halves(net: Net, x: Tensor) -> Tensor:
    skips = []
    for first, last in zip(net.first, net.last, strict=True):
        f, skip = last(torch.tanh(first(x))).chunk(2, -1)
        x = x + f
        skips.append(skip)
    return torch.cat(skips, -1)


def auxiliary_head(net: Net, x: Tensor):
    aux = []
    for first, last in zip(net.first, net.last, strict=True):
        f = last(torch.tanh(first(x)))
        x = x + f
        aux.append(net.aux(f))
    return {"out": x, "aux": aux}


def one_tap(net: Net, x: Tensor):
    """Only the last block's value is returned as well."""
    for first, last in zip(net.first, net.last, strict=True):
        f = last(torch.tanh(first(x)))
        x = x + f
    return x, f


CASES = {"tapped": (8, tapped), "halves": (16, skip_halves), "auxiliary": (8, auxiliary_head), "one": (8, one_tap)}


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_value_that_is_used_twice_is_refused_and_the_model_left_alone(name: str, how) -> None:
    last, forward = CASES[name]
    model = Net(8, last, forward)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DepthMuPError, match="used for something else besides the residual|nothing to wrap"):
        dm.parametrize(model, base=Net(2, last, forward), example_inputs=X, how=how)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_branch_that_does_it_is_named() -> None:
    with pytest.raises(DepthMuPError, match=r"#7: .*last\.7\.weight.*used for something else"):
        dm.parametrize(Net(8, 8, one_tap), base=Net(2, 8, one_tap), example_inputs=X)


def test_without_the_second_use_it_is_scaled() -> None:
    def plain(net: Net, x: Tensor) -> Tensor:
        return tapped(net, x)[0]

    assert len(dm.parametrize(Net(8, 8, plain), base=Net(2, 8, plain), example_inputs=X).branches) == 8


def _casts_by_hand(linear: nn.Linear, h: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(h.bfloat16(), linear.weight.bfloat16(), linear.bias.bfloat16()).float()


@torch.autocast("cpu", dtype=torch.bfloat16)
def _decorated(linear: nn.Linear, h: torch.Tensor) -> torch.Tensor:
    return linear(h)


def _context(linear: nn.Linear, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return linear(h).float()


class LowPrecision(nn.Module):
    """A branch of a float32 stream that computes in bfloat16."""

    def __init__(self, product) -> None:
        super().__init__()
        self.inner, self.outer, self.product = nn.Linear(8, 16), nn.Linear(16, 8), product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(self.outer, torch.tanh(self.product(self.inner, x))).float()


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("product", [_casts_by_hand, _decorated, _context])
def test_branches_in_a_lower_precision_than_their_weights_are_measured_within_its_rounding(product, how) -> None:
    model = nn.Sequential(*[dm.Residual(LowPrecision(product)) for _ in range(12)])
    assert dm.parametrize(model, depth_multiplier=6, example_inputs=X, how=how).branches


def test_autocast_around_the_call_may_keep_its_casts() -> None:
    model = nn.Sequential(*[dm.Residual(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))) for _ in range(8)])
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=True):
        assert dm.parametrize(model, depth_multiplier=4, example_inputs=X).branches


class Again(nn.Module):
    """Runs its layers unseen before it runs them with a gradient; ``m`` multiplies each branch explicitly."""

    def __init__(self, depth: int, way, m: float = 1.0, squashed: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.way, self.m, self.squashed, self.unseen = nn.Linear(8, 8), way, m, squashed, False
        self.first, self.last = (nn.ModuleList(nn.Linear(8, 8) for _ in range(depth)) for _ in range(2))

    def layers(self, x: Tensor) -> Tensor:
        unseen = self.unseen or not torch.is_grad_enabled()
        x = x + torch.softmax(torch.tensor([0.0] + 7 * [-torch.inf]) + torch.zeros(8), 0)
        for first, last in zip(self.first, self.last, strict=True):
            f = last(torch.tanh(first(x)))
            x = x + self.m * (torch.tanh(f) if self.squashed and unseen else f)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def its_own_output_once_more(net: Again, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.layers(net.stem(x))
    return net.layers(net.stem(x + y))


def recycled(net: Again, x: Tensor) -> Tensor:
    for i in range(3):
        with torch.set_grad_enabled(i == 2):
            x = net.layers(net.stem(x))
    return x


def a_target_for_another_view(net: Again, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = net.layers(net.stem(x.flip(1)))
    return (net.layers(net.stem(x)) - target).square()


def in_place(net: Again, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.stem(x)
        for first, last in zip(net.first, net.last, strict=True):
            f = last(torch.tanh(first(y)))
            y += net.m * f.tanh() if net.squashed else net.m * f
    return net.layers(net.stem(x) + y)


def detached(net: Again, x: Tensor) -> Tensor:
    net.unseen = True
    y = net.layers(net.stem(x)).detach()
    net.unseen = False
    return net.layers(net.stem(x + y))


def detached_target(net: Again, x: Tensor) -> Tensor:
    net.unseen = True
    target = net.layers(net.stem(x.flip(1)))
    net.unseen = False
    return (net.layers(net.stem(x)) - target.detach()).square()


WAYS = [its_own_output_once_more, recycled, a_target_for_another_view, in_place, detached, detached_target]


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_also_run_unseen_are_folded(way) -> None:
    model = Again(8, way)
    plan = dm.parametrize(model, base=Again(2, way), example_inputs=X)
    assert [branch.additions for branch in plan.branches] == [8] * 8
    explicit = Again(8, way, m=0.5)
    torch.testing.assert_close(model(X), explicit(X))


@pytest.mark.parametrize("way", WAYS)
def test_a_branch_that_is_not_linear_where_it_runs_unseen_is_refused(way) -> None:
    model = Again(8, way, squashed=True)
    with pytest.raises(DepthMuPError, match="the branch should be 0.5 times|is not what it would be"):
        dm.parametrize(model, base=Again(2, way, squashed=True), example_inputs=X)
    torch.testing.assert_close(model(X), Again(8, way, squashed=True)(X))
