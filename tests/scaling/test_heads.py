"""Heads that grow with the width: scores get 1 / head size relative to the base, whatever is there already."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm
from torch_depthmup.scaling import planning

HEADS, BASE, WORDS = 4, 8, 9
TOKENS = torch.randint(WORDS, (6, 8), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Pre-norm attention in one of several spellings; ``scores`` are the last ones before the softmax."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.kind, self.size = kind, width // HEADS
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        kept = width // 2 if kind == "grouped" else width
        if "fused" in kind:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, kept), nn.Linear(width, kept)
        if kind == "qk-norm":
            self.q_norm, self.k_norm = nn.RMSNorm(self.size), nn.RMSNorm(self.size)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1) if "fused" in self.kind else (self.q(x), self.k(x), self.v(x))
        q, k, v = (z.unflatten(-1, (-1, self.size)).transpose(1, 2) for z in (q, k, v))
        if self.kind == "grouped":
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.kind == "qk-norm":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kind == "cosine":
            q, k = 4 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(self.norm(x))
        fixed = self.kind in ("soft cap", "cosine")
        scale = math.sqrt(BASE) / self.size if "1/d" in self.kind else 1.0 if fixed else self.size**-0.5
        self.scores = scale * q @ k.transpose(-1, -2)
        if self.kind in ("by hand", "soft cap", "cosine"):
            mixed = (50 * torch.tanh(self.scores / 50) if self.kind == "soft cap" else self.scores).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=None if "1/d" not in self.kind else scale)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def network(kind: str, width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    body = [Attention(width, kind) for _ in range(2)]
    return nn.Sequential(nn.Embedding(WORDS, width), *body, nn.LayerNorm(width), nn.Linear(width, WORDS))


def planned(kind: str, width: int, seed: int = 0) -> tuple[nn.Sequential, dm.Plan]:
    model = network(kind, width, seed)
    return model, dm.parametrize(model, base=network(kind, HEADS * BASE, seed), example_inputs=TOKENS, rule="mup")


@pytest.mark.parametrize(
    "kind, makes, factor",
    [
        ("plain", ("q.weight", "q.bias"), 0.5),
        ("by hand", ("q.weight", "q.bias"), 0.5),
        ("grouped", ("q.weight", "q.bias"), 0.5),
        ("qk-norm", ("q_norm.weight",), 0.5),
        ("soft cap", ("q.weight", "q.bias"), 0.25),  # of a fixed scale all of 1 / head size is missing
        ("cosine", (), 1.0),
        ("1/d", (), 1.0),
        ("fused, 1/d", (), 1.0),
    ],
)
def test_what_makes_queries_carries_what_scores_lack(kind: str, makes: tuple[str, ...], factor: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, plan = planned(kind, 4 * HEADS * BASE)
    folded = {entry.name: entry.folded for entry in plan.entries if "makes queries" in entry.reason}
    assert folded == {f"{block}.{name}": pytest.approx(factor) for block in (1, 2) for name in makes}


def test_a_fused_projection_is_told_and_the_advice_is_right() -> None:
    with pytest.warns(UserWarning, match=r"2 attentions have heads .*1\.qkv\.\w+.*scale=2\.828 / head_dim") as caught:
        planned("fused", 4 * HEADS * BASE)
    assert len(caught) == 1 and round(math.sqrt(BASE), 3) == 2.828  # the scale of "fused, 1/d" above


def test_more_heads_of_one_size_need_nothing() -> None:
    def net(width: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, width // BASE, 2 * width, batch_first=True, norm_first=True)
        return nn.Sequential(nn.Embedding(WORDS, width), layer, nn.Linear(width, WORDS))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = dm.parametrize(net(32), base=net(16), example_inputs=TOKENS, rule="mup")
    assert not any("makes queries" in entry.reason for entry in plan.entries)


@pytest.mark.filterwarnings("ignore:the base is narrower and on the meta device")
def test_the_same_is_planned_on_meta() -> None:
    with torch.device("meta"):
        large, small = network("plain", 128), network("plain", 32)
    assert dm.plan(large, base=small, example_inputs=TOKENS, rule="mup")["1.q.weight"].folded == pytest.approx(0.5)


def change_of_scores(kind: str, width: int, seed: int) -> float:
    model, _ = planned(kind, width, seed)
    optimizer = dm.Adam(model.parameters(), lr=1e-3)
    model(TOKENS)
    before = model[2].scores.detach()
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.roll(1, 1).flatten()).backward()
        optimizer.step()
    model(TOKENS)
    return float((model[2].scores.detach() - before).square().mean().sqrt())


@pytest.mark.parametrize("kind", ["plain", "qk-norm"])
def test_scores_learn_alike_in_heads_of_every_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys align as they learn, so that under 1 / root of the head size scores would run away."""

    def slope() -> float:
        small, large = (sum(change_of_scores(kind, n, seed) for seed in range(2)) for n in (128, 512))
        return math.log(large / small) / math.log(4)

    assert abs(slope()) < 0.1  # -0.06 here, -0.16 between 64 and 256, -0.04 between 256 and 1024
    monkeypatch.setattr(planning, "with_head_sizes", lambda found, base, names, entries: entries)
    assert slope() > 0.25
