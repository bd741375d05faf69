"""The network of plain_torch.py under torch_depthmup's default rule, from a base of depth 4."""

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

import torch_depthmup as dm


class Block(nn.Module):
    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(F.gelu(self.up(self.norm(h))))


class Network(nn.Module):
    def __init__(self, depth: int, norm: bool, width: int = 128) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(768, width), nn.Linear(width, 10)
        self.blocks = nn.Sequential(*[Block(width, norm) for _ in range(depth)])
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))


loss = F.cross_entropy


def make(depth: int, norm: bool, lr: float) -> tuple[nn.Module, optim.Optimizer]:
    model = Network(depth, norm)
    dm.parametrize(model, base=Network(4, norm), example_inputs=torch.ones(1, 768))
    return model, dm.Adam(model.parameters(), lr=lr)
