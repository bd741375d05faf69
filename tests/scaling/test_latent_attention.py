"""Latent attention: one weight makes a latent, which a norm follows, and rotary keys. Each part starts as it should.

A projection to a fixed size inside a network reads out of the width: its values and the gradients that arrive at them
are O(1), so its rate goes as 1 / width, whether a norm follows or not. Without a norm it starts as a readout does, at
1 / width; before a norm, which takes such a size out again, at 1 / sqrt(width), as a hidden weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import torch_depthmup as dm
from torch_depthmup.errors import PlanError
from torch_depthmup.scaling import width as widths

BASE, HEAD, RANK, WORDS = 32, 8, 6, 12
TOKENS = torch.randint(WORDS, (6, 8), generator=torch.Generator().manual_seed(0))
Pair = tuple[Tensor, Tensor]

APART: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "split": lambda x, w: torch.split(F.linear(x, w), [RANK, HEAD // 2], -1),
    "slices": lambda x, w: (F.linear(x, w)[..., :RANK], F.linear(x, w)[..., RANK:]),
    "pairs": lambda x, w: (
        (z := F.linear(x, w).unflatten(-1, (5, 2)))[..., :3, :].flatten(-2),
        z[..., 3:, :].flatten(-2),
    ),
    "einsum": lambda x, w: torch.einsum("btn,rn->btr", x, w).split([RANK, HEAD // 2], -1),
    "rows of the weight": lambda x, w: (F.linear(x, w[:RANK]), F.linear(x, w[RANK:])),
}


class Attention(nn.Module):
    """Pre-norm latent attention; its down projection is one weight, or two where ``apart`` is ``None``."""

    def __init__(self, width: int, apart: str | None):
        super().__init__()
        self.apart, self.heads, kept = apart, width // HEAD, HEAD // 2
        self.norm, self.latent_norm = nn.RMSNorm(width), nn.RMSNorm(RANK)
        if apart is None:
            self.latent, self.keys = nn.Linear(width, RANK, bias=False), nn.Linear(width, kept, bias=False)
        else:
            self.down = nn.Parameter(torch.zeros(RANK + kept, width))
        self.q = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(RANK, self.heads * (kept + HEAD), bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, kept = self.norm(x), HEAD // 2
        latent, keys = (self.latent(h), self.keys(h)) if self.apart is None else APART[self.apart](h, self.down)
        self.taken, self.made = h.detach(), (latent.detach(), keys.detach())
        q, kv = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (self.q(h), self.up(self.latent_norm(latent)))
        )
        keys = torch.stack([keys[..., 0::2] - keys[..., 1::2], keys[..., 0::2] + keys[..., 1::2]], -1).flatten(-2)
        k = torch.cat([kv[..., :kept], keys[:, None].expand(-1, self.heads, -1, -1)], -1)
        mixed = F.scaled_dot_product_attention(q, k, kv[..., kept:], is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def network(width: int, apart: str | None, depth: int = 2, seed: int = 0) -> nn.Sequential:
    """The same values whether the down projection is one weight or two."""
    torch.manual_seed(seed)
    body = [Attention(width, apart) for _ in range(depth)]
    model = nn.Sequential(nn.Embedding(WORDS, width), *body, nn.RMSNorm(width), nn.Linear(width, WORDS))
    generator = torch.Generator().manual_seed(seed)
    for block in body:
        for layer in (block.q, block.up, block.out):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features)
        down = torch.randn(RANK + HEAD // 2, width, generator=generator) / math.sqrt(width)
        if apart is None:
            block.latent.weight.data, block.keys.weight.data = down[:RANK].clone(), down[RANK:].clone()
        else:
            block.down.data = down
    torch.nn.init.normal_(model[0].weight, generator=generator)
    torch.nn.init.normal_(model[-1].weight, std=width**-0.5, generator=generator)
    nn.init.zeros_(model[-1].bias)
    return model


def planned(width: int, apart: str | None, seed: int = 0, depth: int = 2, **options: Any) -> nn.Sequential:
    model, options = network(width, apart, depth, seed), {"rule": "mup", **options}
    dm.parametrize(model, base=network(BASE, apart, 2, seed), example_inputs=TOKENS, **options)
    return model


def trained(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
    return model(TOKENS).detach()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: dm.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: dm.AdamW(parameters, lr=3e-3, eps=1e-20, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule, depth", [("mup", 2), ("depth-mup-corrected", 4)])
@pytest.mark.parametrize("apart", APART)
def test_one_weight_trains_as_two_do(apart: str, rule: str, depth: int, optimizer: str) -> None:
    one, two = (planned(128, kind, depth=depth, rule=rule) for kind in (apart, None))
    assert torch.allclose(one(TOKENS), two(TOKENS), atol=1e-5)
    made = [trained(model, OPTIMIZERS[optimizer](model.parameters()), 4) for model in (one, two)]
    assert torch.allclose(*made, atol=1e-3) and not torch.allclose(made[0], network(128, apart)(TOKENS), atol=0.1)


@pytest.mark.parametrize("apart", APART)
def test_the_plan_says_which_rows_start_smaller(apart: str) -> None:
    model = planned(4 * BASE, apart)
    plan, fresh = dm.plan_of(model), network(4 * BASE, apart)
    entry = plan["1.down"]
    assert entry.width is not None and (entry.width.kind, entry.width.unnormalised) == ("hidden", ((RANK, 10),))
    assert (entry.scale, entry.rows_scale, entry.folded) == (1.0, 0.5, 1.0)  # by fan-in, as it starts here
    assert "rows 6 to 9, which no norm follows, read out of a width: 0.5 more" in plan.explain("1.down")
    assert "1, 0.5" in str(plan) and dm.Plan.from_json(plan.to_json()) == plan
    assert torch.equal(model[1].down[:RANK], fresh[1].down[:RANK])
    assert torch.equal(model[1].down[RANK:], fresh[1].down[RANK:] / 2)
    dm.undo(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_at_the_width_of_the_base_nothing_changes() -> None:
    assert torch.equal(planned(BASE, "split")(TOKENS), network(BASE, "split")(TOKENS))


def test_an_initialization_that_is_kept_is_told() -> None:
    with pytest.warns(UserWarning, match=r"1\.down \(its rows that no norm follows 2 times their size\)"):
        model = planned(4 * BASE, "split", initialization="keep")
    assert torch.equal(model[1].down, network(4 * BASE, "split")[1].down)


def test_frozen_weights_are_left_alone() -> None:
    model, base = network(4 * BASE, "split"), network(BASE, "split")
    before = model[1].down.detach().clone()
    model[1].down.requires_grad_(False)
    dm.parametrize(model, base=base, example_inputs=TOKENS, rule="mup")
    assert torch.equal(model[1].down, before) and dm.plan_of(model)["2.down"].rows_scale == 0.5


@pytest.mark.filterwarnings("ignore:the base is narrower and on the meta device")
@pytest.mark.parametrize("apart", APART)
def test_the_same_is_planned_on_meta(apart: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(WORDS, 128), Attention(128, apart), nn.Linear(128, WORDS))
        base = nn.Sequential(nn.Embedding(WORDS, BASE), Attention(BASE, apart), nn.Linear(BASE, WORDS))
    width = dm.plan(model, base=base, example_inputs=TOKENS, rule="mup")["1.down"].width
    assert width is not None and width.unnormalised == ((RANK, 10),)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_rows_of_a_sharded_weight_are_scaled(group: None) -> None:
    model, wanted = network(4 * BASE, "split"), planned(4 * BASE, "split")
    plan = dm.plan(model, base=network(BASE, "split"), example_inputs=TOKENS, rule="mup")
    fully_shard(model)
    dm.apply(model, plan)
    assert torch.equal(model[1].down.full_tensor(), wanted[1].down)


def test_a_checkpoint_of_a_model_without_the_plan_is_told() -> None:
    model, fresh = planned(16 * BASE, "split"), network(16 * BASE, "split")
    ratio = float(model[1].down.detach().norm() / fresh[1].down.detach().norm())
    assert dm.plan_of(model)["1.down"].size_factor == pytest.approx(ratio, rel=0.02) and ratio < 0.9
    model.load_state_dict(fresh.state_dict())
    with pytest.warns(UserWarning, match=r"1\.down was loaded with values of a model whose multipliers are elsewhere"):
        dm.AdamW([model[1].down], lr=0.1)


def test_values_that_are_drawn_again_are_told() -> None:
    model = planned(16 * BASE, "split")
    nn.init.normal_(model[1].down, std=(16 * BASE) ** -0.5)
    with pytest.warns(UserWarning, match=r"1\.down was written to after dm.parametrize"):
        dm.AdamW([model[1].down], lr=0.1)


def own_changes(width: int, seed: int, optimizer: str, lr: float) -> Tensor:
    """By how much a few steps of a down projection's own change the normalised latent, and the keys, of a block."""
    model = planned(width, "split", seed)
    model(TOKENS)
    block = model[2]
    before, taken, (latent, _) = block.down.detach().clone(), block.taken, block.made
    make = dm.Adam if optimizer == "adam" else dm.SGD
    trained(model, make(model.parameters(), lr=lr), 4)
    own = taken @ (block.down.detach() - before).T
    moved = block.latent_norm(latent + own[..., :RANK]) - block.latent_norm(latent)
    return torch.stack([z.detach().square().mean().sqrt() for z in (moved, own[..., RANK:])])


def slopes(optimizer: str, lr: float) -> list[float]:
    small, large = (sum(own_changes(n, seed, optimizer, lr) for seed in range(3)) for n in (4 * BASE, 16 * BASE))
    assert isinstance(small, Tensor) and isinstance(large, Tensor)
    return ((large / small).log() / math.log(4)).tolist()


def test_both_parts_learn_alike_at_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """With SGD they do once gradients add up over the width: at first these are sums of random signs, 1 / its root."""
    latent, keys = slopes("adam", 1e-4)
    assert abs(latent) < 0.1 and abs(keys) < 0.1
    monkeypatch.setattr(widths, "_unnormalised", lambda dims, summed, uses: None)  # a readout as a whole
    latent, keys = slopes("adam", 1e-4)
    assert latent > 0.3 and abs(keys) < 0.1


def stock(kind: str, width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "qk_nope_head_dim": 8,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if kind != "MiniCPM3":
        sizes |= {"moe_intermediate_size": width // 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
        sizes |= {"n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("kind", ["DeepseekV2", "DeepseekV3", "MiniCPM3"])
def test_stock_latent_attention_is_told(kind: str) -> None:
    plan = dm.plan(stock(kind, 128), base=stock(kind, 32), example_inputs=TOKENS, rule="mup")
    parts = [e for e in plan.entries if "kv_a_proj_with_mqa" in e.name]
    assert len(parts) == 2
    assert all(e.width is not None and e.width.unnormalised == ((16, 24),) and e.rows_scale == 0.5 for e in parts)
    kinds = {name.split(".")[-2]: entry.width.kind for name, entry in plan.parameters.items() if entry.width}
    assert (kinds["q_a_proj"], kinds["q_b_proj"], kinds["kv_b_proj"]) == ("hidden", "vector", "vector")


def stock_changes(width: int, seed: int) -> Tensor:
    """As `own_changes`, of the last block of DeepSeek-V3, from its own initialization."""
    torch.manual_seed(seed)
    model, base = stock("DeepseekV3", width), stock("DeepseekV3", 64)
    dm.parametrize(model, base=base, example_inputs=TOKENS, rule="mup")
    attention = model.model.layers[1].self_attn
    down, norm = attention.kv_a_proj_with_mqa, attention.kv_a_layernorm
    seen: list[Tensor] = []
    hook = down.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0].detach(), output.detach())))
    model(TOKENS)
    hook.remove()
    taken, made = seen
    before, optimizer = down.weight.detach().clone(), dm.Adam(model.parameters(), lr=1e-4, eps=1e-20)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
    own = taken @ (down.weight.detach() - before).T
    moved = norm(made[..., :16] + own[..., :16]) - norm(made[..., :16])
    return torch.stack([z.detach().square().mean().sqrt() for z in (moved, own[..., 16:])])


def stock_slopes() -> list[float]:
    small, large = (sum(stock_changes(n, seed) for seed in range(3)) for n in (128, 512))
    assert isinstance(small, Tensor) and isinstance(large, Tensor)
    return ((large / small).log() / math.log(4)).tolist()


def test_both_parts_of_deepseeks_weight_learn_alike_at_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    latent, keys = stock_slopes()
    assert abs(latent) < 0.15 and abs(keys) < 0.15
    monkeypatch.setattr(widths, "_unnormalised", lambda dims, summed, uses: None)
    assert stock_slopes()[0] > 0.3


@pytest.mark.parametrize("where", ["on the keys", "on their halves"])
def test_keys_that_are_divided_by_the_width_are_refused_and_two_weights_are_not(where, monkeypatch) -> None:
    def apart(x: Tensor, w: Tensor) -> Pair:
        share = BASE / x.shape[-1]
        latent, keys = APART["split"](x, w)
        if where == "on the keys":
            return latent, keys * share
        return latent, torch.cat([half * share for half in keys.chunk(2, -1)], -1)

    monkeypatch.setitem(APART, "divided", apart)
    with pytest.raises(
        PlanError, match=r"rows 6 to 9 of 1\.down make is multiplied by 0\.25, .* Give these rows a weight"
    ):
        planned(4 * BASE, "divided")

    class Divided(Attention):
        def __init__(self, width: int):
            super().__init__(width, None)
            self.keys.register_forward_hook(lambda _, __, keys: keys * (BASE / width))

    pair = [
        nn.Sequential(nn.Embedding(WORDS, n), Divided(n), Divided(n), nn.Linear(n, WORDS)) for n in (4 * BASE, BASE)
    ]
    plan = dm.plan(pair[0], base=pair[1], example_inputs=TOKENS, rule="mup")
    assert plan["1.keys.weight"].folded == 1.0 and plan["1.latent.weight"].width.kind == "hidden"
