"""Tune the learning rate on a shallow, narrow transformer, train the deep, wide one with it. Fifteen seconds.

    python examples/transfer_a_transformer.py

The task is to copy a sequence backwards. The model is written without a thought of this package; the only lines that
know of it are those with `dm.parametrize` and `dm.AdamW`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm

LENGTH, VOCABULARY = 8, 12


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, width // 16, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, depth: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.place)))


def train(depth: int, width: int, lr: float, steps: int = 60) -> float:
    torch.manual_seed(0)
    model, base = Transformer(depth, width), Transformer(2, 32)
    tokens = torch.randint(VOCABULARY, (32, LENGTH))
    dm.parametrize(model, base=base, example_inputs=tokens)
    optimizer = dm.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (32, LENGTH))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def main() -> None:
    rates = [2.0**-i for i in range(10, 3, -1)]
    print("loss after 60 steps")
    print("lr            ", *(f"{lr:8.5f}" for lr in rates))
    for depth, width in ((2, 32), (8, 64)):
        losses = [train(depth, width, lr) for lr in rates]
        best = rates[min(range(len(rates)), key=losses.__getitem__)]
        print(f"{depth} x {width:<3} layers ", *(f"{loss:8.4f}" for loss in losses), f"  best lr {best}")
    print(dm.parametrize(Transformer(8, 64), base=Transformer(2, 32), example_inputs=torch.zeros(1, LENGTH).long()))


if __name__ == "__main__":
    main()
