"""A hand-written loop as in nanoGPT: decay groups, a learning-rate function, clipping, resume. # dm marks what is new.

python examples/recipes/nanogpt_loop.py
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

import torch_depthmup as dm  # dm


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int = 32, vocabulary: int = 17):
        super().__init__()
        self.wte, self.h = nn.Embedding(vocabulary, width), nn.ModuleList(Block(width) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(17, (16, 1), generator=torch.Generator().manual_seed(step))
    tokens = (starts + 3 * torch.arange(9)) % 17
    return tokens[:, :-1], tokens[:, 1:]


def learning_rate(step: int) -> float:
    return 3e-3 * min(1.0, (step + 1) / 5) * (0.55 + 0.45 * math.cos(math.pi * step / 40))


def program(checkpoint: dict | None, steps: range) -> tuple[dict, float]:
    torch.manual_seed(0)
    model = GPT(layers=8)
    dm.parametrize(model, base=GPT(layers=2), example_inputs=batch(0)[0])  # dm: before anything is loaded
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = dm.AdamW(groups, lr=3e-3)  # dm: in place of torch.optim.AdamW
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    for step in steps:
        dm.set_lr(optimizer, learning_rate(step))  # dm: in place of the loop over param_groups
        inputs, targets = batch(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        dm.clip_grad_norm_(model.parameters(), 1.0)  # dm: in place of torch's
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, float(loss.detach())


def main() -> None:
    half, _ = program(None, range(20))
    _, resumed = program(half, range(20, 40))
    _, whole = program(None, range(40))
    print(f"loss after 40 steps {whole:.5f}, with a resume after 20 {resumed:.5f}")
    assert abs(resumed - whole) < 1e-5 < whole < 2.0


if __name__ == "__main__":
    main()
