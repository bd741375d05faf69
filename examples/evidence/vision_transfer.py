"""Does the learning rate transfer in depth in a convolutional network and a vision transformer? CIFAR-10, one pass.

    python examples/evidence/vision_transfer.py --data DIR --setup conv   # loads CIFAR-10 through torchvision into DIR
    python examples/evidence/vision_transfer.py --data cifar10_16px.npz --setup vit

Two set-ups (--setup) on images of 16 pixels. "conv": a stem of stride 2, basic pre-activation blocks of two 3 x 3
convolutions with BatchNorm (24 channels, 8 x 8 pixels), mean pooling and a linear head. "vit": patches of 4 pixels, 16
tokens of width 64, pre-norm blocks of attention with 4 heads and a feed-forward part of twice the width, mean pooling
and a linear head. PyTorch's own initialization, Adam, batches of 64. Depth counts residual additions: a transformer's
block has two. The loss of a run is the mean of the last fifth of its training losses, each on images that are new.

Finished runs are kept in a file (--runs): the same command goes on where it was stopped, also with more --seeds. Writes
vision_transfer_SETUP.csv beside this file and figures/vision_transfer_SETUP.png. A set-up of five seeds takes
one to two and a half hours of one core.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onepass import CLASSES, final, images, one_pass, parser_of, shuffled, swept
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm

SIDE, PATCH, BATCH = 16, 4, 64
CHANNELS, WIDTH, HEADS = 24, 64, 4
LRS = {"conv": (-11, -6), "vit": (-13, -8)}
"""Set-ups, and the powers of two of their learning rates."""


class ConvBlock(nn.Module):
    """h + conv(relu(norm(conv(relu(norm(h))))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(h))))))


class ConvNet(nn.Module):
    """(batch, 768) pixels to (batch, 10) scores."""

    def __init__(self, depth: int):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1), nn.Sequential()
        self.blocks.extend(ConvBlock() for _ in range(depth))
        self.norm, self.head = nn.BatchNorm2d(CHANNELS), nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.view(len(x), SIDE, SIDE, 3).permute(0, 3, 1, 2)
        return self.head(F.relu(self.norm(self.blocks(self.stem(pixels)))).mean((2, 3)))


class TransformerBlock(nn.Module):
    """h + attention(norm(h)), then h + feed_forward(norm(h))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        batch, tokens, _ = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, WIDTH)
        h = h + self.out(mixed)
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class VisionTransformer(nn.Module):
    """(batch, 768) pixels to (batch, 10) scores; ``depth`` residual additions, two a block."""

    def __init__(self, depth: int):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*[TransformerBlock() for _ in range(depth // 2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.view(len(x), SIDE, SIDE, 3).permute(0, 3, 1, 2)
        h = self.stem(pixels).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(h)).mean(1))


NETWORKS = {"conv": ConvNet, "vit": VisionTransformer}


@dataclass(frozen=True)
class OnePass:
    """Trains on new images in every step. Returns the mean of the last fifth of the losses."""

    source: str
    steps: int

    def __call__(self, model: nn.Module, lr: float, seed: int) -> float:
        optimizer = dm.Adam(model, lr=lr)
        return final(one_pass(model.train(), optimizer, shuffled(self.source, seed, BATCH, self.steps * BATCH)))


def main() -> None:
    parser = parser_of(__doc__, NETWORKS, [4, 16, 64])
    parser.add_argument("--steps", type=int, default=150, help="of a run; 781 are a pass (default 150)")
    options = parser.parse_args()
    swept(
        f"vision_transfer_{options.setup}", NETWORKS[options.setup], OnePass(options.data, options.steps), options,
        LRS[options.setup], f"CIFAR-10 at {SIDE} pixels, {options.steps} batches of {BATCH}, {options.setup}",
        images(options.data)[0][:16],
    )  # fmt: skip


if __name__ == "__main__":
    main()
