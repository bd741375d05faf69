"""Factors of the width that a forward pass has on its weights: they train as in a network that has the base's."""

from __future__ import annotations

import math

import mup
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError, PlanError
from torch_depthmup.rules import Family

BASE, WIDTH, WORDS, HEADS = 8, 32, 11, 2
INPUTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(WORDS, (3, 4), generator=torch.Generator().manual_seed(1))
SPELLINGS = ("weight", "divided", "buffer", "input", "value", "product", "alpha", "path", "convolution")


class Equalised(nn.Module):
    """A layer of normal entries whose value is divided by the root of its fan-in, or, fixed, by that of the base's."""

    def __init__(self, taken: int, given: int, spelling: str, ratio: float):
        super().__init__()
        self.spelling, self.root = spelling, math.sqrt(taken / ratio)
        self.weight = nn.Parameter(torch.randn(given, taken))
        self.bias = nn.Parameter(torch.zeros(given))
        self.register_buffer("scale", torch.full((1,), 1 / self.root))

    def forward(self, x: Tensor) -> Tensor:
        w, b, c = self.weight, self.bias, 1 / self.root
        if self.spelling == "convolution":
            return F.conv1d(x.unsqueeze(-1), (w * c).unsqueeze(-1), b).squeeze(-1)
        if self.spelling == "path":
            return torch.einsum("oi,bi->bo", (w.T * c).T, x) + b
        if self.spelling == "alpha":
            return torch.addmm(b, x, w.T, alpha=c)
        return {
            "weight": lambda: F.linear(x, w * c, b),
            "divided": lambda: F.linear(x, w / self.root, b),
            "buffer": lambda: F.linear(x, self.scale * w, b),
            "input": lambda: F.linear(x * c, w, b),
            "value": lambda: F.linear(x, w) * c + b,
            "product": lambda: (x @ w.T).div(self.root).add(b),
        }[self.spelling]()


class Block(nn.Module):
    def __init__(self, width: int, spelling: str, ratio: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = Equalised(width, width, spelling, ratio), Equalised(width, width, spelling, ratio)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(F.gelu(self.up(self.norm(h))))


def equalised(spelling: str, width: int, depth: int, ratio: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    body = [Block(width, spelling, ratio) for _ in range(depth)]
    return nn.Sequential(nn.Linear(5, width), *body, nn.LayerNorm(width), nn.Linear(width, 3))


def losses(model: nn.Module, base: nn.Module, inputs: Tensor, optimizer: str, **options) -> tuple[dm.Plan, list[float]]:
    plan = dm.parametrize(model, base=base, example_inputs=inputs, **options)
    trained = {"sgd": dm.SGD, "adam": dm.Adam, "adamw": dm.AdamW}[optimizer](model, lr=0.02, weight_decay=0.1)
    found = []
    for _ in range(4):
        loss = model(inputs).square().mean()
        trained.zero_grad()
        loss.backward()
        trained.step()
        found.append(loss.item())
    return plan, found


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_layer_that_divides_by_the_root_of_its_width_trains_as_one_that_divides_by_that_of_the_base(
    spelling, optimizer
):
    base = equalised(spelling, BASE, 2)
    plan, found = losses(equalised(spelling, WIDTH, 4), base, INPUTS, optimizer)
    _, wanted = losses(equalised(spelling, WIDTH, 4, WIDTH / BASE), base, INPUTS, optimizer)
    assert plan["1.up.weight"].present == pytest.approx((WIDTH / BASE) ** -0.5)
    assert plan["1.up.weight"].scale == pytest.approx(1.0)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert "relative to the base" in plan.explain("1.up.weight")


@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_keeping_initial_values_keeps_them_where_the_factor_is_there(how):
    model = equalised("weight", WIDTH, 2)
    before = model[1].up.weight.detach().clone()
    with pytest.warns(UserWarning, match="leaves 2 parameters at sizes"):  # the head's, which is torch's own
        dm.parametrize(model, base=equalised("weight", BASE, 2), example_inputs=INPUTS, how=how, initialization="keep")
    assert torch.equal(model[1].up.weight, before)


class Embedded(nn.Module):
    """Embeddings times the root of the width, or of the base's, before pre-norm blocks; the readout may be tied."""

    def __init__(self, spelling: str, width: int, ratio: float = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.root = spelling, math.sqrt(width / ratio)
        self.words, self.places = nn.Embedding(WORDS, width), nn.Parameter(0.1 * torch.randn(4, width))
        if "small" in spelling:
            nn.init.normal_(self.words.weight, std=1 / self.root)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)
        if "tied" in spelling:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        if "weights" in self.spelling:
            h = F.embedding(tokens, self.words.weight * self.root) + self.places
        elif "sum" in self.spelling:
            h = (self.words(tokens) + self.places / self.root) * self.root
        else:
            h = self.words(tokens) * self.root + self.places
        for block in self.blocks:
            h = h + block(h)
        return self.head(self.norm(h))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("spelling", ["", "small", "weights", "sum", "tied", "tied small", "tied weights"])
def test_embeddings_times_the_root_of_the_width_train_as_ones_times_that_of_the_base(spelling, optimizer):
    base = Embedded(spelling, BASE)
    plan, found = losses(Embedded(spelling, WIDTH), base, TOKENS, optimizer, rule="mup")
    _, wanted = losses(Embedded(spelling, WIDTH, WIDTH / BASE), base, TOKENS, optimizer, rule="mup")
    assert plan["words.weight"].present == pytest.approx((WIDTH / BASE) ** 0.5)
    assert found == pytest.approx(wanted, rel=1e-4)


class Attention(nn.Module):
    """Attention from bare parameters, whose queries and keys are divided by the root of the width."""

    def __init__(self, width: int, heads: int, ratio: float = 1.0):
        super().__init__()
        self.heads, self.root = heads, math.sqrt(width / ratio)
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(width, width)) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        q, k, v = (
            (x @ w / self.root).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return h + mixed @ self.o / self.root


def attentive(width: int, heads: int, ratio: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(WORDS, width), Attention(width, heads, ratio), Attention(width, heads, ratio), nn.Linear(width, 3)
    )


@pytest.mark.parametrize("heads", [HEADS, HEADS * WIDTH // BASE], ids=["larger heads", "more heads"])
def test_queries_that_are_divided_by_the_root_of_the_width_keep_what_heads_ask_for(heads):
    base = attentive(BASE, HEADS)
    _, found = losses(attentive(WIDTH, heads), base, TOKENS, "adam")
    _, wanted = losses(attentive(WIDTH, heads, WIDTH / BASE), base, TOKENS, "adam")
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_weight_that_is_multiplied_differently_in_two_places_is_refused():
    class Twice(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.stem, self.weight, self.head = (
                nn.Linear(5, width), nn.Parameter(torch.randn(width, width)), nn.Linear(width, 3)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.stem(x))
            h = torch.tanh(h @ self.weight / len(self.weight))
            return self.head(torch.tanh(h @ self.weight / len(self.weight) ** 0.5))

    with pytest.raises(PlanError, match="weight is used in several places that multiply it by"):
        dm.plan(Twice(WIDTH), base=Twice(BASE), example_inputs=INPUTS, rule="mup")


def test_on_meta_a_factor_that_is_a_tensor_is_not_passed_over_in_silence():
    with torch.device("meta"):
        model = equalised("buffer", WIDTH, 2)
    with pytest.warns(UserWarning, match=r"multiplies 1\.up\.weight, .* with is a tensor, whose number cannot be seen"):
        dm.plan(model, base=equalised("buffer", BASE, 2), example_inputs=INPUTS)


def test_an_optimizer_that_sees_the_size_of_weights_is_refused_with_words_that_hold_under_either_way():
    plan = dm.plan(equalised("weight", WIDTH, 2), base=equalised("weight", BASE, 2), example_inputs=INPUTS, how="wrap")
    with pytest.raises(OptimizerError, match=r"multiplies 1\.up\.weight by 0\.5 relative to the base"):
        plan.multipliers("1.up.weight", Family("belief", normalised=True, decoupled=True, foldable=False))


def test_values_of_a_model_without_a_plan_are_converted_without_the_factor_that_was_always_there():
    plain, model = equalised("weight", WIDTH, 4), equalised("weight", WIDTH, 4)
    saved = dm.parametrize(plain, base=equalised("weight", BASE, 2), example_inputs=INPUTS, how="wrap")
    plan = dm.parametrize(model, base=equalised("weight", BASE, 2), example_inputs=INPUTS)
    assert plan["1.down.weight"].scale == pytest.approx(0.5**0.5)
    found = dm.convert_state_dict(plain.state_dict(), model, plan=saved)
    assert torch.allclose(found["1.down.weight"], plain[1].down.weight * 0.5**0.5)
    model.load_state_dict(found)
    assert torch.allclose(model(INPUTS), plain(INPUTS), atol=1e-5)


def test_a_model_that_is_only_made_known_keeps_the_rates_for_the_factor_that_is_there():
    model = equalised("weight", WIDTH, 4)
    plan = dm.plan(model, base=equalised("weight", BASE, 2), example_inputs=INPUTS)
    attached = dm.attach(model, plan, rates_only=True)
    assert attached["1.up.weight"].folded == attached["1.down.weight"].folded == pytest.approx(2.0)


def test_values_of_a_model_that_nothing_was_folded_into_are_converted_without_that_factor():
    plain, model = equalised("weight", WIDTH, 4), equalised("weight", WIDTH, 4)
    saved = dm.parametrize(plain, depth_multiplier=1, example_inputs=INPUTS, rule="mup")
    dm.parametrize(model, base=equalised("weight", BASE, 4), example_inputs=INPUTS, rule="mup")
    found = dm.convert_state_dict(plain.state_dict(), model, plan=saved)
    assert torch.equal(found["1.down.weight"], plain[1].down.weight)


def test_mups_own_shared_readout_of_scaled_embeddings_is_refused_and_a_tied_linear_works():
    def network(width: int) -> Embedded:
        model = Embedded("tied", width)
        model.head = mup.MuSharedReadout(model.words.weight, bias=False)
        return model

    with pytest.raises(PlanError, match="Tie an nn.Linear to it instead"):
        dm.plan(network(WIDTH), base=network(BASE), example_inputs=TOKENS, rule="mup")
    plan = dm.plan(Embedded("tied", WIDTH), base=Embedded("tied", BASE), example_inputs=TOKENS, rule="mup")
    assert plan.hooks[0].multiplier == pytest.approx((WIDTH / BASE) ** -0.5)
