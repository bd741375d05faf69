"""``"complete-p"`` for AdamW beside a GPT that is written by hand, with the groups of arXiv 2505.01618, table 1."""

from __future__ import annotations

import pytest
import torch
from oracles import completep_groups
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm

VOCABULARY, LENGTH, HEAD = 11, 6, 4
TOKENS = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6}


class Block(nn.Module):
    def __init__(self, width: int, residual: float):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (t.view(batch, length, -1, HEAD).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(*heads, is_causal=True, scale=1 / HEAD)
        x = x + self.residual * self.c_proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.residual * self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Gpt(nn.Module):
    """With multipliers in the forward pass, 1 each as users write it; embedding and readout are tied."""

    def __init__(self, layers: int, width: int, *, residual: float = 1.0, output: float = 1.0, std: float = 0.02):
        super().__init__()
        torch.manual_seed(layers)
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.h = nn.ModuleList(Block(width, residual) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        self.output = output
        for name, parameter in self.double().named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=std if ".c_" in name or ".mlp_" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x)) * self.output


def trajectory(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> list[float]:
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def pair(how: str) -> tuple[nn.Module, nn.Module, dm.Plan]:
    """A GPT of 4 times the depth and 3 times the width of its base: written by hand, and parametrized."""
    explicit = Gpt(8, 24, residual=1 / 4, output=1 / 3, std=0.02 * 3**-0.5)
    model = Gpt(8, 24)
    plan = dm.parametrize(model, base=Gpt(2, 8), example_inputs=TOKENS, rule="complete-p", how=how)
    return explicit, model, plan


@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_every_group_is_as_published(how: str) -> None:
    explicit, model, plan = pair(how)
    carriers = {name for branch in plan.branches for name in branch.carrier} if how == "fold" else set()
    for name, (lr, weight_decay, eps) in completep_groups(explicit, width=3, depth=4).items():
        ours, m = plan.multipliers(name, "adamw"), 1 / 4 if name in carriers else 1.0
        assert (ours.lr, ours.weight_decay, ours.eps) == pytest.approx((lr * m, weight_decay / m, eps / m)), name


@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_is_as_published(clip: float | None) -> None:
    for how in ("fold", "wrap") if clip is None else ("wrap",):
        explicit, model, _ = pair(how)
        groups = [
            {"params": [dict(explicit.named_parameters())[name]], "lr": OPTIONS["lr"] * lr,
             "weight_decay": OPTIONS["weight_decay"] * decay, "eps": OPTIONS["eps"] * eps}
            for name, (lr, decay, eps) in completep_groups(explicit, width=3, depth=4).items()
        ]  # fmt: skip
        wanted = trajectory(explicit, torch.optim.AdamW(groups, betas=OPTIONS["betas"]), clip)
        found = trajectory(model, dm.AdamW(model.parameters(), **OPTIONS), clip)
        assert found == pytest.approx(wanted, rel=1e-9)
        assert wanted[-1] < 0.5 * wanted[0]
