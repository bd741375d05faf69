"""Which sums are residual: skips in any form, streams that read each other, and what only looks alike."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm

N = 6


def body(inputs: int = N, outputs: int = N) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, 10), nn.Tanh(), nn.Linear(10, outputs))


class Net(nn.Module):
    """Blocks with three bodies a, b, c each, between a stem and a head; a forward says how they are put together."""

    def __init__(self, forward: Callable, depth: int = 3):
        super().__init__()
        self.stem, self.head, self.function = nn.Linear(5, N), nn.Linear(N, 2), forward
        self.a, self.b, self.c = (nn.ModuleList(body() for _ in range(depth)) for _ in range(3))
        self.short = nn.ModuleList(nn.Linear(N, N) for _ in range(depth))

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        return self.head(self.function(self, self.stem(x), m))


def blocks(step: Callable) -> Callable:
    """A network's forward from one block's: ``step(h, a, b, short)``, branches already multiplied."""

    def forward(net: Net, h: Tensor, m: float) -> Tensor:
        for a, b, short in zip(net.a, net.b, net.short, strict=True):
            h = step(h, lambda x, a=a: a(x) * m if m != 1 else a(x), lambda x, b=b: b(x) * m if m != 1 else b(x), short)
        return h

    return forward


THREE_WAY = {
    "scaled": lambda h, a, b, short: h * 0.9 + a(h) + b(h),
    "sum of a list": lambda h, a, b, short: sum([h, a(h), b(h)]),
    "cast": lambda h, a, b, short: (h.double() + a(h)).float() + b(h),
    "cloned, in place": lambda h, a, b, short: h.clone().add_(a(h)).add_(b(h)),
    "viewed": lambda h, a, b, short: h.flatten().view(h.shape) + a(h) + b(h),
    "projected": lambda h, a, b, short: short(h) + a(h) + b(h),
    "projected, second": lambda h, a, b, short: a(h) + short(h) + b(h),
    "normed after": lambda h, a, b, short: nn.functional.layer_norm(h[:, :] + a(h) + b(h), (N,)),
}


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("name", THREE_WAY)
def test_a_skip_in_any_form_has_both_branches(name: str, how: str) -> None:
    check(Net(blocks(THREE_WAY[name])), {"a", "b"}, how)


def reversible(net: Net, h: Tensor, m: float) -> Tensor:
    x = y = h
    for a, b in zip(net.a, net.b, strict=True):
        x = x + m * a(y)
        y = y + m * b(x)
    return x * y


def crossed(net: Net, h: Tensor, m: float) -> Tensor:
    x, y = torch.tanh(h), torch.sin(h)
    for a, b in zip(net.a, net.b, strict=True):
        x, y = x + m * a(y), y + m * b(x)
    return x + 2 * y


def twice_and_once(net: Net, h: Tensor, m: float) -> Tensor:
    x, y = torch.tanh(h), torch.sin(h)
    for a, b, c in zip(net.a, net.b, net.c, strict=True):
        y = y + m * a(x)
        y = y + m * b(y)
        x = x + m * c(y)
    return x


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize(
    ("forward", "used"), [(reversible, {"a", "b"}), (crossed, {"a", "b"}), (twice_and_once, {"a", "b", "c"})]
)
def test_streams_that_read_each_other_keep_all_their_branches(forward: Callable, used: set[str], how: str) -> None:
    check(Net(forward), used, how)


def check(net: Net, used: set[str], how: str) -> None:
    """All branches are found with their roles, and the scaled network is the one with branches multiplied by hand."""
    inputs = torch.randn(4, 5)
    found = dm.find_branches(net, inputs)
    assert sorted(b.name for b in found) == sorted(f"{part}.{i}" for part in used for i in range(3))
    for branch in found:
        assert set(branch.outer) == {f"{branch.name}.3.weight", f"{branch.name}.3.bias"}
        assert len(branch.inner) == 4 and branch.levels == 2
    plain = copy.deepcopy(net)
    dm.parametrize(net, depth_multiplier=3, example_inputs=inputs, how=how, rule="complete-p")
    torch.testing.assert_close(net(inputs), plain(inputs, 1 / 3))


class Pooled(nn.Module):
    """Where the resolution halves, the skip is a pooled projection, as in hierarchical transformers."""

    def __init__(self, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.before, self.after = nn.ModuleList(body() for _ in range(2)), nn.ModuleList(body(8, 8) for _ in range(2))
        self.norm, self.proj, self.down, self.pool = nn.LayerNorm(N), nn.Linear(N, 8), body(N, 8), pool

    def forward(self, x: Tensor) -> Tensor:
        for block in self.before:
            x = x + block(x)
        h = self.norm(x)
        x = self.pool(self.proj(h)) + self.down(h[:, ::2])
        for block in self.after:
            x = x + block(x)
        return x


@pytest.mark.parametrize(
    "pool",
    [
        lambda h: h.unflatten(1, (-1, 2)).amax(2),
        lambda h: h.unflatten(1, (-1, 2)).max(2).values,
        lambda h: nn.functional.max_pool1d(h.mT, 2).mT,
        lambda h: h.unflatten(1, (-1, 2)).mean(2),
    ],
)
def test_a_pooled_and_projected_skip_keeps_the_stream_together(pool: Callable) -> None:
    found = dm.find_branches(Pooled(pool), torch.randn(2, 8, N))
    assert [(b.name, b.position, b.additions) for b in found] == [
        ("before.0", 0, 5), ("before.1", 1, 5), ("down", 2, 5), ("after.0", 3, 5), ("after.1", 4, 5),
    ]  # fmt: skip
    assert [b.skip for b in found].count("projection") == 1


def test_a_cast_skip_is_not_hidden_by_a_sum_inside_the_branch() -> None:
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.mid, self.out = nn.Linear(N, 8), nn.Linear(8, 8), nn.Linear(8, N)
            self.direct = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return x.double() + self.out(torch.tanh(self.mid(h)) + h * self.direct)

    class Stack(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = block(x).float()
            return x

    found = dm.find_branches(Stack(*[Mixer() for _ in range(3)]), torch.randn(2, N))
    assert [(b.name, b.additions, b.levels) for b in found] == [(f"{i}", 3, 3) for i in range(3)]
    assert set(found[0].carrier) == {"0.out.weight", "0.out.bias"}


def test_declaring_the_skip_in_place_of_the_branch_says_so() -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(N), body()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return x + self.mlp(x)

    model = nn.Sequential(Block(), Block())
    with pytest.raises(dm.DepthMuPError, match="norm: .* it is the skip"):
        dm.find_branches(model, torch.randn(2, N), branches=["*.norm"])
    assert len(dm.find_branches(model, torch.randn(2, N), branches=["*.mlp"])) == 2


class Post(nn.Module):
    """Post-norm blocks on sequences, whose sums are written in some way."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor], depth: int = 3):
        super().__init__()
        self.bodies, self.norms = (
            nn.ModuleList(make() for _ in range(depth)) for make in (body, lambda: nn.LayerNorm(N))
        )
        self.way = way

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        for f, norm in zip(self.bodies, self.norms, strict=True):
            x = norm(self.way(x, f(x) * m if m != 1 else f(x)))
        return x


def into_slice(x: Tensor, f: Tensor) -> Tensor:
    wide = nn.functional.pad(f, (0, 2))[..., :N]
    wide += x
    return wide


def row_by_row(x: Tensor, f: Tensor) -> Tensor:
    y = x.clone()
    y[:] += f
    return y


def transposed(x: Tensor, f: Tensor) -> Tensor:
    h = f.transpose(0, 1)
    h += x.transpose(0, 1)
    return h.transpose(0, 1)


ROWS = torch.arange(2)
WAYS = {
    "in place on a view": lambda x, f: f.add_(x),
    "in place on a slice": into_slice,
    "in place on a transposed view": transposed,
    "in place on an index": row_by_row,
    "minus in place on a view": lambda x, f: x.clone().view(x.shape).sub_(f),
    "stack and sum": lambda x, f: torch.stack([x, f]).sum(0),
    "stack and mean": lambda x, f: torch.stack((f, x), dim=-1).mean(-1),
    "addcmul": lambda x, f: torch.addcmul(x, f, torch.ones(N), value=0.5),
    "addcdiv in place": lambda x, f: x.clone().addcdiv_(f, torch.full((N,), 2.0)),
    "index_add": lambda x, f: x.index_add(0, ROWS, f),
    "scatter_add": lambda x, f: torch.scatter_add(x, 0, ROWS[:, None, None].expand_as(f), f),
}


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("name", WAYS)
def test_every_spelling_of_a_sum_is_seen_and_measured(name: str, how: str) -> None:
    net, inputs = Post(WAYS[name]), torch.randn(2, 4, N)
    assert [(b.name, b.additions) for b in dm.find_branches(net, inputs)] == [(f"bodies.{i}", 3) for i in range(3)]
    plain = copy.deepcopy(net)
    dm.parametrize(net, depth_multiplier=3, example_inputs=inputs, how=how, rule="complete-p")
    torch.testing.assert_close(net(inputs), plain(inputs, 1 / 3))


def test_a_matrix_product_with_a_residual_is_a_sum() -> None:
    class Fused(Post):
        def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
            for f in self.bodies:
                x = torch.addmm(x, torch.tanh(f[1](f[0](x))), f[3].weight.T, alpha=m)
            return x

    net, inputs = Fused(torch.add), torch.randn(4, N)
    for f in net.bodies:
        f[3].bias = None
    assert [(b.levels, b.carrier) for b in dm.find_branches(net, inputs)] == [
        (2, (f"bodies.{i}.3.weight",)) for i in range(3)
    ]
    plain = copy.deepcopy(net)
    dm.parametrize(net, depth_multiplier=3, example_inputs=inputs, rule="complete-p")
    torch.testing.assert_close(net(inputs), plain(inputs, 1 / 3))


@pytest.mark.parametrize(
    "way",
    [lambda x, f: torch.lerp(x, f, 0.3), lambda x, f: x + 0.3 * (f - x), lambda x, f: torch.lerp(x, f, f.new_ones(N))],
)
def test_an_interpolation_is_found_and_refused_where_nothing_carries_it(way: Callable) -> None:
    net, inputs = Post(way), torch.randn(2, 4, N)
    assert [(b.name, b.carrier) for b in dm.find_branches(net, inputs)] == [(f"bodies.{i}", ()) for i in range(3)]
    for how in ("fold", "wrap"):
        with pytest.raises(dm.DepthMuPError, match="bodies.0"):
            dm.parametrize(net, depth_multiplier=3, example_inputs=inputs, how=how)


@pytest.mark.parametrize("nonlinear", [False, True])
def test_sums_that_collect_outputs_of_the_layers_are_no_stream(nonlinear: bool) -> None:
    class Collecting(Post):
        def forward(self, x: Tensor, m: float = 1.0) -> tuple[Tensor, Tensor]:
            collected = 0
            for f, norm in zip(self.bodies, self.norms, strict=True):
                tapped = norm(f(x)).square() if nonlinear else f(x)
                collected = collected + tapped @ self.head
                x = x + f(x)
            return x, collected

    net = Collecting(torch.add)
    net.head = nn.Parameter(torch.randn(N, 2))
    assert [(b.name, b.additions) for b in dm.find_branches(net, torch.randn(4, N))] == [
        (f"bodies.{i}", 3) for i in range(3)
    ]


def test_what_a_module_caches_in_evaluation_mode_is_let_go_of() -> None:
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.bias, self.cache = nn.Linear(N, N), nn.Parameter(torch.zeros(N)), {}

        def train(self, mode: bool = True) -> nn.Module:
            if mode:
                self.cache = {}
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.bias * 2 if self.training else self.cache.setdefault("bias", self.bias * 2)
            return x + self.f(torch.tanh(x) + bias)

    model = nn.Sequential(Cached(), Cached()).train()
    dm.parametrize(model, depth_multiplier=2, example_inputs=torch.randn(4, N))
    assert all(module.cache == {} and module.training for module in model)
    copy.deepcopy(model)


CARRIED = {
    "viewed": lambda h: h.view(-1, N),
    "cast": lambda h: h.double().float(),
    "transposed twice": lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("carried", sorted(CARRIED))
def test_a_branch_of_a_gain_alone_is_found_beside_a_skip_in_any_form(carried: str) -> None:
    """``x + pool(norm(x))``, where the skip is not the tensor that the norm reads."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(N)

        def forward(self, h: Tensor) -> Tensor:
            return CARRIED[carried](h) + nn.functional.avg_pool1d(self.norm(h), 3, 1, 1)

    branches = dm.find_branches(nn.Sequential(*(Pooled() for _ in range(3))), torch.randn(4, N))
    assert [(b.position, b.carrier) for b in branches] == [
        (i, (f"{i}.norm.weight", f"{i}.norm.bias")) for i in range(3)
    ]


class WaveNet(nn.Module):
    """Each layer feeds the stream and a sum over all layers: by halves of one layer's output, or by a layer each."""

    def __init__(self, depth: int, halves: bool, ends: str, named: bool = True):
        super().__init__()
        self.stem, self.head, self.halves, self.ends = nn.Linear(5, N), nn.Linear(N, 2), halves, ends
        self.gates, self.residual, self.skips = (nn.ModuleList(nn.Linear(N, N) for _ in range(depth)) for _ in range(3))
        self.both = nn.ModuleList(nn.Linear(N, 2 * N) for _ in range(depth if halves else 0))
        self.names = nn.ModuleList(nn.Identity() for _ in range(depth)) if named else [lambda value: value] * depth

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        x, total = self.stem(x), 0
        for i, (gate, name) in enumerate(zip(self.gates, self.names, strict=True)):
            y = torch.tanh(gate(x))
            f, skip = self.both[i](y).chunk(2, -1) if self.halves else (self.residual[i](y), self.skips[i](y))
            x, total = x + (name(f) if m == 1 else m * f), total + skip
        return (x, total) if self.ends == "both" else self.head(torch.relu(total + x))


@pytest.mark.parametrize("ends", ["both", "joined"])
@pytest.mark.parametrize("halves", [True, False])
def test_a_sum_over_all_layers_beside_the_stream_is_no_stream(halves: bool, ends: str) -> None:
    torch.manual_seed(0)
    model, x = WaveNet(6, halves, ends), torch.randn(4, 5)
    options = {"base": WaveNet(3, halves, ends), "example_inputs": x, "how": "wrap", "rule": "complete-p"}
    if not halves:
        advice = r"sum that collects the layers' outputs.*exclude=\['skips\.\*'\]"
        with pytest.raises(dm.DepthMuPError, match=advice):
            dm.parametrize(model, **options)
        options["exclude"] = ["skips.*"]
    plain = copy.deepcopy(model)
    plan = dm.parametrize(model, **options, initialization="keep")
    assert [(s.additions, s.depth_multiplier) for s in plan.streams] == [(6, 2)]
    torch.testing.assert_close(model(x), plain(x, 0.5))
    with pytest.raises(dm.DepthMuPError, match="used for something else.*nn.Identity"):
        dm.parametrize(WaveNet(6, True, ends, False), base=WaveNet(3, True, ends, False), example_inputs=x)


GATED = {
    "gate": lambda self, x, c, m: x + m * (torch.sigmoid(self.c(c)) * self.b(torch.tanh(self.a(x)))),
    "gate without bounds": lambda self, x, c, m: self.c(c) * self.b(torch.tanh(self.a(x))) * m + x,
    "gate and a smaller skip": lambda self, x, c, m: 0.9 * x + m * (self.c(c) * self.b(torch.tanh(self.a(x)))),
    "gate of a constant": lambda self, x, c, m: x + m * (self.c(torch.ones(N)) * self.b(torch.tanh(self.a(x)))),
}
MODULATED = {
    "halves": lambda self, x, s, t: x * s + t,
    "one and half": lambda self, x, s, t: x * (1 + s) + t,
    "shift first": lambda self, x, s, t: t + s * x,
}


class Conditional(nn.Module):
    """Blocks whose branch is gated, or whose stream is modulated, by a second input."""

    def __init__(self, step: Callable, modulated: bool):
        super().__init__()
        self.stem, self.condition, self.head = nn.Linear(5, N), nn.Linear(5, N), nn.Linear(N, 2)
        self.blocks = nn.ModuleList(nn.ModuleDict({k: nn.Linear(N, N) for k in "abc"}) for _ in range(3))
        self.both, self.step = nn.Linear(N, 2 * N), step if not modulated else None
        self.modulate = step if modulated else None

    def forward(self, x: Tensor, c: Tensor, m: float = 1.0) -> Tensor:
        x, c = self.stem(x), self.condition(c)
        for block in self.blocks:
            if self.modulate is not None:
                x = self.modulate(self, x, *self.both(torch.relu(c)).chunk(2, -1))
                x = x + m * block["b"](torch.tanh(block["a"](x)))
            else:
                x = self.step(Layered(block), x, c, m)
        return self.head(x)


class Layered:
    """Layers by name."""

    def __init__(self, layers: nn.ModuleDict):
        self.__dict__.update(layers.items())


@pytest.mark.parametrize("name", [*GATED, *MODULATED])
def test_a_gate_from_elsewhere_is_no_modulation_of_the_stream(name: str) -> None:
    torch.manual_seed(0)
    model = Conditional({**GATED, **MODULATED}[name], name in MODULATED)
    inputs = torch.randn(4, 5), torch.randn(4, 5)
    wanted = model(*inputs, m=1 / 3)
    plan = dm.parametrize(model, depth_multiplier=3, example_inputs=inputs, rule="complete-p")
    assert [(s.additions, s.depth_multiplier) for s in plan.streams] == [(3, 3)]
    assert plan["blocks.1.a.weight"].role == "inner" and plan["blocks.1.b.weight"].role == "outer"
    torch.testing.assert_close(model(*inputs), wanted)
