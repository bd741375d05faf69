"""Networks of several seeds side by side: each one's numbers are those it has alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from wide import MODELS, X, Y, sgd

import torch_depthmup as dm
from torch_depthmup.diagnostics.nfd import predict, sweep
from torch_depthmup.diagnostics.nfd.simulate import NoRoomError
from torch_depthmup.diagnostics.nfd.training import Run
from torch_depthmup.errors import DivergenceError

SEEDS = (3, 8, 5)


class Spelled(nn.Module):
    """Two residual blocks of weights that a function multiplies by."""

    def __init__(self, n: int, product: Callable[[Tensor, Tensor], Tensor], shape: Sequence[int] = (), state=None):
        super().__init__()
        self.stem, self.head = nn.Linear(10, n), nn.Linear(n, 1)
        self.weights = nn.ParameterList(torch.randn(n, n, *shape) / n**0.5 for _ in range(2))
        self.product, self.state = product, state

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for weight in self.weights:
            h = h + torch.tanh(self.product(h, weight))
        return self.head(h)


class Attention(nn.Module):
    """A layer of attention over two tokens, no two of which are alike: what is new in equal rows is rounding."""

    def __init__(self, n: int):
        super().__init__()
        self.stem, self.head = nn.Linear(5, n), nn.Linear(n, 1)
        self.qkv, self.out = nn.Linear(n, 3 * n), nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.unflatten(1, (2, 5)))
        q, k, v = (
            z.unflatten(2, (2, -1)).transpose(1, 2) for z in self.qkv(F.layer_norm(h, h.shape[-1:])).chunk(3, -1)
        )
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(h).mean(1)


class Convolutions(nn.Module):
    """Basic blocks with batch statistics, whose running means a pass writes."""

    def __init__(self, n: int):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, n, 3), nn.Linear(n, 1)
        self.convs = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, stride=s, bias=s == 1) for s in (1, 2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for _ in range(2))
        self.shortcut = nn.Conv2d(n, n, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.unflatten(1, (1, 2, 5)).repeat(1, 1, 2, 1))
        h = h + F.relu(self.norms[0](self.convs[0](h)))
        h = self.shortcut(h) + F.relu(self.norms[1](self.convs[1](h)))
        seen = torch.stack([norm.running_mean.square().mean() for norm in self.norms]).sum()
        return self.head(h.mean((2, 3))) + seen


WAYS: dict[str, Callable[[int], nn.Module]] = {
    "biases": MODELS["biases"],
    "pre-norm": MODELS["pre-norm"],
    "torch's own": MODELS["torch's own"],
    "attention": Attention,
    "convolutions": Convolutions,
    "x @ w.T": lambda n: Spelled(n, lambda h, w: h @ w.T),
    "x @ w": lambda n: Spelled(n, torch.matmul),
    "w @ x": lambda n: Spelled(n, lambda h, w: (w @ h.mT).mT),
    "addmm": lambda n: Spelled(n, lambda h, w: torch.addmm(h, h, w, beta=0.5, alpha=2.0)),
    "einsum": lambda n: Spelled(n, lambda h, w: torch.einsum("bi,oi->bo", h, w)),
    "a factor": lambda n: Spelled(n, lambda h, w: F.linear(h, 2 * w / math.sqrt(2) * -1)),
    "transposes": lambda n: Spelled(n, lambda h, w: F.linear(h, w.transpose(0, 1).permute(1, 0).mT)),
    "a weight used twice": lambda n: Spelled(n, lambda h, w: F.linear(torch.sin(F.linear(h, w)), w.t())),
    "one-dimensional convolution": lambda n: Spelled(n, lambda h, w: F.conv1d(h[..., None], w)[..., 0], (1,)),
    "the inputs themselves": lambda n: nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 1)),
}


def side_by_side(seeds: Sequence[int], draw: Callable) -> list:
    return [draw(seeds)]


def one_after_the_other(seeds: Sequence[int], draw: Callable) -> list:
    return [draw([seed]) for seed in seeds]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """Outputs of both, where whatever stands in the way of the first is raised."""

    def run(make: Callable[[int], nn.Module], x: Tensor = X, optimizer: Callable = sgd, **options) -> tuple:
        found = []
        for way in (side_by_side, one_after_the_other):
            monkeypatch.setitem(predict.__globals__, "_together", way)
            found.append(predict(make, x, Y, width=96, optimizer=optimizer, steps=3, seeds=SEEDS,
                                 dtype=torch.float64, **options).outputs)  # fmt: skip
        return tuple(found)

    return run


@pytest.mark.parametrize("way", WAYS)
def test_networks_side_by_side_have_the_numbers_that_they_have_alone(way: str, both) -> None:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)) if way == "the inputs themselves" else X
    together, alone = both(WAYS[way], x)
    assert float((alone[:, -1] - alone[:, 0]).abs().max()) > 1e-3
    assert float((alone[0] - alone[1]).abs().max()) > 1e-3
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)


def clipped(model: nn.Module) -> torch.optim.Optimizer:
    """Gradients of each seed's network are clipped by their own norm."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def clip(*_) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=False)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def scaled(how: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        dm.parametrize(model, depth_multiplier=2, example_inputs=X.double(), how=how)
        return dm.SGD(model, lr=0.01, momentum=0.9)

    return optimizer


OPTIMIZERS = {
    "clipped": clipped,
    "folded": scaled("fold"),
    "wrapped": scaled("wrap"),
    "muon": muon,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("coupling", ["reused", "decoupled"])
def test_each_seed_has_an_optimizer_of_its_own(name: str, coupling, both) -> None:
    together, alone = both(MODELS["pre-norm"], optimizer=OPTIMIZERS[name], coupling=coupling)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)


class Asks(MODELS["pre-norm"]):
    """Its code depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h if float(h.detach().sum()) > 0 else -h


class Remembers(MODELS["pre-norm"]):
    """What one pass computed goes into the next."""

    def __init__(self, n: int):
        super().__init__(n)
        self.last = 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x) + self.last
        self.last = h.detach() / 2
        return h


class Kept:
    def __init__(self) -> None:
        self.value = torch.randn(1)


class OwnState(MODELS["pre-norm"]):
    """Adds what its factory drew and kept as no parameter."""

    def __init__(self, n: int, draw: Callable):
        super().__init__(n)
        self.kept = draw()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept["a"] if isinstance(self.kept, dict) else self.kept
        kept = kept.value if isinstance(kept, Kept) else kept[0].weight.detach() if isinstance(kept, list) else kept
        return super().forward(x) + torch.as_tensor(kept, dtype=x.dtype)


class Batches(MODELS["pre-norm"]):
    """Calls vmap over its samples."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward)(x)


def followed(n: int) -> nn.Module:
    model = MODELS["pre-norm"](n)
    passes = []

    def count(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        passes.append(float(output.detach().sum()))
        return output * len(passes)

    model.norms[0].register_forward_hook(count)
    return model


APART: dict[str, tuple[Callable[[int], nn.Module], Callable]] = {
    "dropout": (lambda n: nn.Sequential(MODELS["pre-norm"](n), nn.Dropout(0.5)), sgd),
    "code that depends on values": (Asks, sgd),
    "a value kept from pass to pass": (Remembers, sgd),
    "numbers kept": (lambda n: OwnState(n, lambda: float(torch.rand(()))), sgd),
    "tensors kept": (lambda n: OwnState(n, lambda: {"a": torch.randn(1)}), sgd),
    "arrays kept": (lambda n: OwnState(n, lambda: torch.randn(1).numpy()), sgd),
    "objects kept": (lambda n: OwnState(n, Kept), sgd),
    "modules kept": (lambda n: OwnState(n, lambda: [nn.Linear(1, 1)]), sgd),
    "vmap": (Batches, sgd),
    "hooks": (followed, sgd),
    "adamw": (MODELS["pre-norm"], lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)),
}


def another_law(n: int) -> nn.Module:
    model = MODELS["pre-norm"](n)
    nn.init.normal_(model.up[0].weight, std=float(torch.rand(())) / n**0.5)
    return model


APART["another law a seed"] = another_law, sgd


@pytest.mark.parametrize("name", APART)
def test_networks_that_do_not_go_side_by_side_are_trained_in_turn(name: str) -> None:
    make, optimizer = APART[name]

    def outputs(seeds: Sequence[int]) -> Tensor:
        return predict(make, X, Y, width=96, optimizer=optimizer, steps=2, seeds=seeds, dtype=torch.float64).outputs

    alone = torch.cat([outputs([seed]) for seed in SEEDS[:2]])
    torch.testing.assert_close(outputs(SEEDS[:2]), alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("room, groups", [(3, [3]), (2, [2, 1]), (1, [1, 1, 1])])
def test_seeds_for_which_memory_is_short_go_in_smaller_groups(
    room: int, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    train = Run.train

    def short(run: Run, *args) -> tuple[Tensor, Tensor]:
        if len(run.optimizers) > room:
            raise NoRoomError("full")
        trained.append(len(run.optimizers))
        return train(run, *args)

    monkeypatch.setattr(Run, "train", short)
    found = predict(MODELS["biases"], X, Y, width=96, optimizer=sgd, steps=1, seeds=SEEDS)
    assert trained == groups and len(found.outputs) == len(SEEDS)


@pytest.mark.parametrize(
    "samples, floats, width, groups",
    [(3, True, 96, [5]), (700, True, 96, [1] * 5), (3, False, 96, [5]), (3, False, 2500, [1] * 5)],
)
def test_seeds_whose_rows_fill_a_cache_are_trained_in_turn(
    samples: int, floats: bool, width: int, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are samples, or tokens where the inputs are integers."""
    tried = []

    def note(seeds: Sequence[int], draw: Callable) -> list:
        tried.append(len(seeds))
        return [(torch.zeros(len(seeds), 1), torch.zeros(len(seeds), 1), [])]

    monkeypatch.setitem(predict.__globals__, "_together", note)
    x = torch.randn(samples, 10) if floats else torch.zeros(samples, 10, dtype=torch.long)
    predict(MODELS["biases"], x, Y, width=width, optimizer=sgd, steps=1, seeds=5)
    assert tried == groups


def test_rows_that_show_only_in_the_first_pass_are_seen_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of a convolution: fewer seeds go side by side than were begun."""
    monkeypatch.setattr("torch_depthmup.diagnostics.nfd.training.SMALL", 30_000)
    monkeypatch.setattr("torch_depthmup.diagnostics.nfd.training.IN_ALL", 25_000)
    trained, make_room = [], Run._make_room

    def note(run: Run, watched: dict) -> None:
        make_room(run, watched)
        trained.append(len(run.optimizers))

    monkeypatch.setattr(Run, "_make_room", note)
    found = predict(Convolutions, X, Y, width=256, optimizer=sgd, steps=1, seeds=5)
    assert trained == [2, 2, 1] and len(found.outputs) == 5


def test_memory_is_looked_at_for_all_seeds_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def check(needed: float, *_) -> None:
        asked.append(needed)

    monkeypatch.setattr("torch_depthmup.diagnostics.nfd.training.check_memory", check)
    for seeds in (1, 4):
        predict(MODELS["biases"], X, Y, width=96, optimizer=sgd, steps=1, seeds=seeds)
    (one, one_again), (four, four_again) = asked[:2], asked[2:]
    assert four > 16 * one and four_again == pytest.approx(16 * one_again, rel=0.2)  # of a quarter of the memory


def test_one_seed_that_diverges_stops_the_prediction_and_not_the_sweep() -> None:
    def make(depth: int, n: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(10, n), *(dm.Residual(nn.Linear(n, n)) for _ in range(depth)), nn.Linear(n, 1))
        if float(torch.rand(())) < 0.5:
            model[0].weight.data *= 1e30
        return model

    few = {"width": 96, "steps": 2, "seeds": 4}
    with pytest.raises(DivergenceError):
        predict(lambda n: make(1, n), X, Y, optimizer=sgd, **few)
    found = sweep(make, X, Y, depths=[1], lrs=[0.01], optimizer=lambda m, lr: dm.SGD(m, lr=lr), rules="mup", **few)
    diverged = [math.isinf(loss) for loss in found.losses("mup", 1, 0.01)]
    torch.manual_seed(0)
    assert any(diverged) and not all(diverged)
