"""Layers of many kinds, wider than their base: what each sums over, and that outputs move alike at every width."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from blocks import PreNorm
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.errors import PlanError

SERIES, IMAGES = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((6, 6, 5), (6, 3, 8, 8))
)
Fan = tuple[str, int | None]


class Residual(nn.Module):
    """A stem, two residual layers that ``make`` builds, and a head on what ``pool`` leaves."""

    def __init__(self, stem: nn.Module, layers: list[nn.Module], head: nn.Module, pool: bool = False):
        super().__init__()
        self.stem, self.layers, self.head, self.pool = stem, nn.ModuleList(layers), head, pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            value = layer(x)
            x = x + (value[0] if isinstance(value, tuple) else value)
        return self.head(x.mean((2, 3)) if self.pool else x)


class Experts(nn.Module):
    """A router and stacked experts as parameters."""

    def __init__(self, width: int, spelling: str):
        super().__init__()
        self.router = nn.Parameter(torch.randn(width, 4) / math.sqrt(width))
        self.up = nn.Parameter(torch.randn(4, width, 2 * width) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(4, 2 * width, width) / math.sqrt(2 * width))
        self.norm, self.spelling = nn.LayerNorm(width), spelling

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.spelling == "einsum":
            value = torch.einsum("ebtm,emn->ebtn", torch.einsum("btn,enm->ebtm", h, self.up).relu(), self.down)
        elif self.spelling == "bmm":
            rows = h.flatten(0, 1).expand(4, -1, -1)
            value = torch.bmm(torch.bmm(rows, self.up).relu(), self.down).unflatten(1, h.shape[:2])
        else:
            value = torch.stack([(h @ self.up[e]).relu() @ self.down[e] for e in range(4)])
        return torch.einsum("bte,ebtn->btn", (h @ self.router).softmax(-1), value)


def convolutions(width: int, groups: int) -> nn.Module:
    first = nn.Conv2d(width, width, 3, padding=1, groups=groups)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(width, width, 1))


def picture(width: int, layer: Callable[[], nn.Module]) -> nn.Module:
    stem = nn.Conv2d(3, width, 3, padding=1)
    return Residual(stem, [layer(), layer()], nn.Linear(width, 3), pool=True)


def series(width: int, layer: Callable[[], nn.Module]) -> nn.Module:
    return Residual(nn.Linear(5, width), [layer(), layer()], nn.Linear(width, 3))


def up_and_down(width: int) -> nn.Module:
    def layer() -> nn.Module:
        down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        return nn.Sequential(down, nn.ReLU(), nn.ConvTranspose2d(2 * width, width, 2, stride=2))

    stem, head = nn.Conv2d(3, width, 3, padding=1), nn.ConvTranspose2d(width, 3, 2, stride=2)
    return Residual(stem, [layer(), layer()], head)


class Heads(nn.Module):
    """Several readouts, one of them with a hidden layer."""

    def __init__(self, width: int):
        super().__init__()
        self.a, self.b = nn.Linear(width, 3), nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


RECURRENT: dict[str, Fan] = {
    "layers.0.weight_ih_l0": ("hidden", 1),
    "layers.0.weight_hh_l0": ("hidden", 1),
    "layers.0.bias_hh_l0": ("vector", None),
    "head.weight": ("readout", 1),
}
EXPERTS: dict[str, Fan] = {
    "layers.0.router": ("readout", 0),
    "layers.0.up": ("hidden", 1),
    "layers.0.down": ("hidden", 1),
}
KINDS: dict[str, tuple[Callable[[int], nn.Module], Tensor, dict[str, Fan]]] = {
    "RNN": (lambda n: series(n, lambda: nn.RNN(n, n, batch_first=True)), SERIES, RECURRENT),
    "LSTM": (lambda n: series(n, lambda: nn.LSTM(n, n, batch_first=True)), SERIES, RECURRENT),
    "GRU": (lambda n: series(n, lambda: nn.GRU(n, n, batch_first=True)), SERIES, RECURRENT),
    "grouped": (
        lambda n: picture(n, lambda: convolutions(n, 4)),
        IMAGES,
        {"layers.0.0.weight": ("hidden", 1), "layers.0.2.weight": ("hidden", 1)},
    ),
    "groups of one size": (
        lambda n: picture(n, lambda: convolutions(n, n // 8)),
        IMAGES,
        {"layers.0.0.weight": ("vector", None)},
    ),
    "depthwise": (
        lambda n: picture(n, lambda: convolutions(n, n)),
        IMAGES,
        {"layers.0.0.weight": ("vector", None), "layers.0.2.weight": ("hidden", 1)},
    ),
    "transposed": (
        up_and_down,
        IMAGES,
        {"layers.0.0.weight": ("hidden", 1), "layers.0.2.weight": ("hidden", 0), "head.weight": ("readout", 0)},
    ),
    "experts by einsum": (lambda n: series(n, lambda: Experts(n, "einsum")), SERIES, EXPERTS),
    "experts by bmm": (lambda n: series(n, lambda: Experts(n, "bmm")), SERIES, EXPERTS),
    "experts in a loop": (lambda n: series(n, lambda: Experts(n, "loop")), SERIES, EXPERTS),
    "several heads": (
        lambda n: Residual(nn.Linear(5, n), [PreNorm(n), PreNorm(n)], Heads(n)),
        SERIES,
        {"head.a.weight": ("readout", 1), "head.b.0.weight": ("hidden", 1), "head.b.2.weight": ("readout", 1)},
    ),
}


def planned(kind: str, width: int, seed: int = 0) -> tuple[nn.Module, dm.Plan]:
    make, inputs, _ = KINDS[kind]
    torch.manual_seed(seed)
    base, model = make(16), make(width)
    return model, dm.parametrize(model, base=base, example_inputs=inputs, rule="mup")


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_parameter_sums_over_is_read_off_the_graph(kind: str) -> None:
    _, plan = planned(kind, 64)
    for name, wanted in KINDS[kind][2].items():
        width = plan[name].width
        assert width is not None and (width.kind, width.summed) == wanted, name
        assert plan[name].folded == (1 / 4 if wanted[0] == "readout" else 1), name


def moved(kind: str, width: int, seed: int) -> float:
    """How far four steps of Adam move the outputs."""
    inputs = KINDS[kind][1]
    model, _ = planned(kind, width, seed)
    optimizer = dm.Adam(model.parameters(), lr=1e-3)

    def output() -> Tensor:
        value = model(inputs)
        return torch.cat(value, -1) if isinstance(value, tuple) else value

    before = output().detach()
    for _ in range(4):
        optimizer.zero_grad()
        (output() - 1).square().mean().backward()
        optimizer.step()
    return float((output().detach() - before).square().mean().sqrt())


def slope_in_width(kind: str, small: int, large: int, seeds: int) -> float:
    before, after = (sum(moved(kind, n, seed) for seed in range(seeds)) for n in (small, large))
    return math.log(after / before) / math.log(large / small)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_move_alike_at_every_width(kind: str) -> None:
    assert abs(slope_in_width(kind, 32, 128, seeds=3)) < 0.1


@pytest.mark.evidence
@pytest.mark.parametrize("kind", KINDS)
def test_wider_ones_do_too(kind: str) -> None:
    """``pytest -m evidence tests/scaling/test_kinds_of_layers.py``: a minute on one core."""
    assert abs(slope_in_width(kind, 64, 256, seeds=8)) < 0.1


def test_two_wide_inputs_of_a_bilinear_layer_are_refused_and_one_is_not() -> None:
    class Pairs(nn.Module):
        def __init__(self, width: int, fixed: bool):
            super().__init__()
            self.stem, self.block = nn.Linear(5, width), PreNorm(width)
            self.head = nn.Bilinear(width, 5 if fixed else width, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.block(self.stem(x))
            return self.head(h, x if self.head.in2_features == 5 else h)

    with pytest.raises(PlanError, match=r"head.weight .* two widths at once .* Project one of the two to a fixed size"):
        dm.parametrize(Pairs(64, False), base=Pairs(16, False), example_inputs=SERIES, rule="mup")
    plan = dm.parametrize(Pairs(64, True), base=Pairs(16, True), example_inputs=SERIES, rule="mup")
    assert plan["head.weight"].folded == 1 / 4


class Layers(nn.Module):
    """Parameters with an entry for each layer."""

    def __init__(self, depth: int, width: int, spelling: str):
        super().__init__()
        self.stem, self.head, self.spelling = nn.Linear(5, width), nn.Linear(width, 3), spelling
        self.body = nn.ModuleList(PreNorm(width) for _ in range(depth))
        self.factors = nn.Parameter(torch.ones(depth, 2) if spelling == "pairs" else torch.ones(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        factors = self.factors.unbind(0) if self.spelling == "unbind" else self.factors
        for i, block in enumerate(self.body):
            kept, added = factors[i] if self.spelling == "pairs" else (factors[i], 1)
            x = kept * x + added * (block(x) - x)
        return self.head(x)


@pytest.mark.parametrize("spelling", ["vector", "unbind", "pairs"])
@pytest.mark.parametrize("depth, width", [(8, 32), (8, 64), (4, 64)])
def test_a_parameter_with_an_entry_for_each_layer_has_no_width(spelling: str, depth: int, width: int) -> None:
    model, base = Layers(depth, width, spelling), Layers(2, 32, spelling)
    plan = dm.parametrize(model, base=base, example_inputs=SERIES, rule="mup")
    factors, hidden = plan["factors"], plan["body.0.fc1.weight"]
    assert factors.scale == 1 and (factors.width is None or not factors.width.widths)
    assert plan.multipliers("factors", "sgd").lr == 1
    assert hidden.width is None or hidden.width.multiplier == width / 32
