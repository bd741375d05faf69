"""Readouts in any form: what the graph does with widths decides, and what is measured is what is supplied."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import mup
import pytest
import torch
from blocks import PreNorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import torch_depthmup as dm
from torch_depthmup.errors import PlanError
from torch_depthmup.scaling.responses import Ratio, missing_power

BASE, WORDS = 16, 12
TOKENS = torch.randint(WORDS, (4, 6), generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """Tokens -> two blocks -> a norm -> a head that ``read(self, h)`` applies."""

    def __init__(self, width: int, head: Callable[[int], nn.Module], read: Callable[[Reader, Tensor], Tensor]):
        super().__init__()
        self.width, self.read = width, read
        self.stem, self.body = nn.Embedding(WORDS, width), nn.Sequential(PreNorm(width), PreNorm(width))
        self.norm, self.head = nn.LayerNorm(width), head(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read(self, self.norm(self.body(self.stem(tokens))))


class Matrix(nn.Module):
    """A parameter of its own, with a gain for each row."""

    def __init__(self, width: int):
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(WORDS, width) / math.sqrt(width)), nn.Parameter(torch.ones(WORDS, 1))


def called(model: Reader, h: Tensor) -> Tensor:
    return model.head(h)


def linear(width: int) -> nn.Module:
    return nn.Linear(width, WORDS)


HEADS: dict[str, tuple[Callable[[int], nn.Module], Callable[[Reader, Tensor], Tensor], float]] = {
    "linear": (linear, called, 1),
    "a convolution": (
        lambda n: nn.Conv1d(n, WORDS, 1),
        lambda model, h: model.head(h.transpose(1, 2)).transpose(1, 2),
        1,
    ),
    "a transposed convolution": (
        lambda n: nn.ConvTranspose1d(n, WORDS, 1),
        lambda model, h: model.head(h.transpose(1, 2)).transpose(1, 2),
        1,
    ),
    "a parameter": (Matrix, lambda model, h: torch.einsum("btn,kn->btk", h, model.head.v), 1),
    "tied by function": (nn.Identity, lambda model, h: F.linear(h, model.stem.weight), 1),
    "weight norm": (lambda n: parametrizations.weight_norm(nn.Linear(n, WORDS)), called, 0.5),
    "weight norm of a convolution": (
        lambda n: parametrizations.weight_norm(nn.Conv1d(n, WORDS, 1)),
        lambda model, h: model.head(h.transpose(1, 2)).transpose(1, 2),
        0.5,
    ),
    "old weight norm": (lambda n: nn.utils.weight_norm(nn.Linear(n, WORDS)), called, 0.5),
    "weight norm by hand": (
        Matrix,
        lambda model, h: h @ (model.head.g * model.head.v / model.head.v.norm(dim=1, keepdim=True)).T,
        0.5,
    ),
    "spectral norm": (lambda n: parametrizations.spectral_norm(nn.Linear(n, WORDS)), called, 0.5),
    "cosines": (Matrix, lambda model, h: 2 * F.linear(F.normalize(h, dim=-1), F.normalize(model.head.v, dim=-1)), 0),
    "MiniCPM's": (linear, lambda model, h: model.head(h / (model.width / BASE)), 0),
    "logits times base / width": (linear, lambda model, h: model.head(h) * (BASE / model.width), 0),
    "a weight over the width": (linear, lambda model, h: F.linear(h, model.head.weight / model.width), 0),
    "logits over the root of the width": (linear, lambda model, h: model.head(h) / math.sqrt(model.width), 0.5),
    "tied, with logits times base / width": (
        nn.Identity,
        lambda model, h: F.linear(h, model.stem.weight) * (BASE / model.width),
        0,
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def reader(kind: str, width: int, seed: int = 0) -> Reader:
    torch.manual_seed(seed)
    return Reader(width, *HEADS[kind][:2])


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_readout_gets_what_of_its_multiplier_is_missing(kind: str, how: str) -> None:
    model = reader(kind, 4 * BASE)
    plan = dm.parametrize(model, base=reader(kind, BASE), example_inputs=TOKENS, rule="mup", how=how)
    (entry,) = [entry for entry in plan.entries if entry.width is not None and entry.width.kind == "readout"]
    hung = math.prod(hook.multiplier for hook in plan.hooks if hook.branch is None)
    assert entry.folded * hung == pytest.approx(4 ** -HEADS[kind][2])
    assert ("of it is there already" in plan.explain(entry.name)) == (HEADS[kind][2] < 1)


def moved(kind: str, width: int, seed: int, optimizer: Callable[..., torch.optim.Optimizer], lr: float) -> float:
    """How far six steps move the outputs."""
    model = reader(kind, width, seed).eval()  # spectral norm looks for its direction while training
    dm.parametrize(model, base=reader(kind, BASE, seed), example_inputs=TOKENS, rule="mup")
    stepping = optimizer(model.parameters(), lr=lr)
    before = model(TOKENS).detach()
    for _ in range(6):
        stepping.zero_grad()
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flip(1).flatten()).backward()
        stepping.step()
    return float((model(TOKENS).detach() - before).square().mean().sqrt())


@pytest.mark.parametrize("optimizer, lr", [(dm.Adam, 1e-3), (dm.SGD, 1e-3)])
@pytest.mark.parametrize(
    "kind", ["linear", "weight norm", "spectral norm", "cosines", "MiniCPM's", "a weight over the width"]
)
def test_outputs_move_alike_at_every_width(
    kind: str, optimizer: Callable[..., torch.optim.Optimizer], lr: float
) -> None:
    small, large = (sum(moved(kind, n, seed, optimizer, lr) for seed in range(3)) for n in (BASE, 8 * BASE))
    assert abs(math.log(large / small) / math.log(8)) < 0.17  # a factor 1 / sqrt(width) too much or too little is 0.5


def test_hidden_weight_norm_scales_directions_as_a_matrix_and_gains_as_a_vector() -> None:
    def net(width: int) -> nn.Module:
        torch.manual_seed(0)
        block = PreNorm(width)
        parametrizations.weight_norm(block.fc1)
        return nn.Sequential(nn.Linear(8, width), block, nn.Linear(width, 3))

    plan = dm.parametrize(net(64), base=net(16), example_inputs=torch.ones(2, 8), rule="mup")
    gain, direction = (plan[f"1.fc1.parametrizations.weight.original{i}"] for i in (0, 1))
    assert gain.width is not None and gain.width.kind == "vector" and gain.scale == 1
    assert direction.width is not None and direction.width.kind == "hidden"
    assert plan.multipliers(direction.name, "adam").lr == 1 / 4 and plan.multipliers(gain.name, "adam").lr == 1


@pytest.mark.filterwarnings("ignore:the base is narrower and on the meta device")
def test_a_computed_readout_needs_values_to_be_planned_and_a_plain_one_does_not() -> None:
    with torch.device("meta"):
        weight_normed = reader("weight norm", 64), reader("weight norm", BASE)
        plain = reader("linear", 64), reader("linear", BASE)
    with pytest.raises(PlanError, match=r"head\..* is computed from it .* Build model and base on a real device"):
        dm.plan(weight_normed[0], base=weight_normed[1], example_inputs=TOKENS, rule="mup")
    assert dm.plan(plain[0], base=plain[1], example_inputs=TOKENS, rule="mup")["head.weight"].folded == 1 / 4


def test_a_ratio_that_chance_explains_is_none() -> None:
    assert missing_power(Ratio(1.1, 0.05), 4) == 0 and missing_power(Ratio(2.1, 0.05), 4) == 0.5
    assert missing_power(Ratio(2.1, 0.3), 4) == 1 and missing_power(Ratio(2.1, 0.3), 4, is_plain=False) == 0.5
    assert missing_power(Ratio(40.0, 0.1), 4) == 1 and missing_power(Ratio(math.nan, 0.1), 4) == 1


def _zeroed(width: int, depth: int, zero: str) -> nn.Sequential:
    torch.manual_seed(0)
    body = [
        dm.Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)))
        for _ in range(depth)
    ]
    model = nn.Sequential(nn.Linear(5, width), *body, nn.LayerNorm(width), nn.Linear(width, 3))
    for name, parameter in model.named_parameters():
        if re.fullmatch(zero, name):
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("zero", [r"\d+\.weight", r".*branch\.3\..*", r".*"], ids=["head and stem", "branches", "all"])
def test_weights_that_start_at_zero_are_measured_and_stay_at_zero(zero):
    model, x = _zeroed(32, 4, zero), torch.randn(4, 5)
    before = {name for name, parameter in model.named_parameters() if not parameter.any()}
    plan = dm.parametrize(model, base=_zeroed(8, 2, zero), example_inputs=x)
    assert {name for name, parameter in model.named_parameters() if not parameter.any()} == before
    head = list(plan.parameters)[-2]
    assert plan[head].folded == pytest.approx(1 / 4) and plan[head].width.kind == "readout"


class Routed(nn.Module):
    """Two experts, weighted by a router that is a bare parameter, with numbers around its product."""

    def __init__(self, width: int, spelling: str):
        super().__init__()
        self.norm, self.spelling = nn.LayerNorm(width), spelling
        self.router = nn.Parameter(torch.randn(2, width) / math.sqrt(width))
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        x, n = self.norm(h), h.shape[-1]
        scores = {
            "plain": lambda: x @ self.router.T,
            "value": lambda: x @ self.router.T * (BASE / n),
            "data": lambda: F.linear(x / math.sqrt(n), self.router),
            "weight": lambda: torch.einsum("btn,kn->btk", x, self.router / n),
            "grows": lambda: (x @ self.router.T) * math.sqrt(n),
        }[self.spelling]()
        shares = torch.softmax(scores, -1)
        return h + sum(shares[..., k : k + 1] * expert(x) for k, expert in enumerate(self.experts))


@pytest.mark.parametrize(
    ("spelling", "power"), [("plain", 1), ("value", 0), ("data", 0.5), ("weight", 0), ("grows", 1.5)]
)
def test_a_router_that_no_module_returns_gets_what_the_numbers_around_it_leave(spelling, power):
    def network(width):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(WORDS, width), *[Routed(width, spelling) for _ in range(2)])

    plan = dm.plan(network(4 * BASE), base=network(BASE), example_inputs=TOKENS, rule="mup")
    assert plan["1.router"].folded == pytest.approx(4**-power)
    assert ("already" in plan.explain("1.router")) == (power < 1)


@pytest.mark.parametrize(
    "kind", ["linear", "MiniCPM's", "logits times base / width", "logits over the root of the width"]
)
def test_on_meta_the_numbers_around_a_readout_are_seen(kind):
    with torch.device("meta"):
        model = reader(kind, 4 * BASE)
    plan = dm.plan(model, base=reader(kind, BASE), example_inputs=TOKENS, rule="mup")
    assert plan["head.weight"].folded == pytest.approx(4 ** -HEADS[kind][2])


def test_mups_own_shared_readout_divides_by_the_width_once():
    def network(width: int) -> Reader:
        model = reader("linear", width)
        model.head = mup.MuSharedReadout(model.stem.weight, bias=False)
        return model

    model = network(4 * BASE)
    plan = dm.parametrize(model, base=network(BASE), example_inputs=TOKENS, rule="mup")
    h = model.norm(model.body(model.stem(TOKENS)))
    assert torch.allclose(model(TOKENS), F.linear(h / 4, model.stem.weight), atol=1e-5)
    assert not plan.hooks and plan["stem.weight"].folded == 1.0
