"""The network of plain_torch.py with CompleteP in depth by hand, from a base of depth 4: arXiv 2505.01618, table 1.

The branches are divided by the depth ratio, and so is Adam's eps in the blocks; learning rates stay, as alpha is 1. The
width is the base's. The package that has this rule, EleutherAI/nanoGPT-mup, is a training script for one GPT.
"""

from torch import Tensor, nn, optim
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, norm: bool, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(F.gelu(self.up(self.norm(h)))) / self.ratio


class Network(nn.Module):
    def __init__(self, depth: int, norm: bool, width: int = 128) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(768, width), nn.Linear(width, 10)
        self.blocks = nn.Sequential(*[Block(width, norm, depth / 4) for _ in range(depth)])
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))


loss = F.cross_entropy


def make(depth: int, norm: bool, lr: float) -> tuple[nn.Module, optim.Optimizer]:
    model = Network(depth, norm)
    ends = [parameter for name, parameter in model.named_parameters() if not name.startswith("blocks.")]
    blocks = {"params": model.blocks.parameters(), "eps": 1e-8 / (depth / 4)}
    return model, optim.Adam([blocks, {"params": ends}], lr=lr)
