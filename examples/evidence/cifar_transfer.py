"""Does the learning rate transfer in depth on real images? CIFAR-10 at 16 pixels, one pass: nothing can be memorised.

    python examples/evidence/cifar_transfer.py --data DIR                # loads CIFAR-10 through torchvision into DIR
    python examples/evidence/cifar_transfer.py --data cifar10_16px.npz   # or the arrays train_images, train_labels

Trains networks of two-layer blocks, h + V relu(W h) / 2 (so that depth 4 is depth-muP's own scale), of width 128 with
batches of 128, at depths 4, 8, 16 and 64 under four rules. Three set-ups (--setup): "adam" and "sgd" without
normalization, and "adam-norm" with a LayerNorm before each block and before the readout. The loss of a run is the mean
of the last fifth of its training losses; as every image is seen once, each of these was taken before the image was
trained on.

Finished runs are kept in a file (--runs): the same command goes on where it was stopped, also with more --seeds. Writes
cifar_transfer_SETUP.csv beside this file and figures/cifar_transfer_SETUP.png. A set-up takes half an hour on one core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from onepass import CLASSES, PIXELS, final, one_pass, parser_of, shuffled, swept
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm

WIDTH, BATCH = 128, 128
SETUPS = {"adam": (-13, -9), "adam-norm": (-8, -4), "sgd": (-8, -2)}
"""Set-ups, and the powers of two of their learning rates."""
EPS = 1e-12  # Adam's own 1e-8 is not small beside the gradients of a readout that is divided by the width
SCALE = 0.5  # 1 / sqrt(4): at the base depth of 4 the branches together are as large as the stream they start from


class Block(nn.Module):
    """h + V relu(W norm(h)) / 2, W with the variance 1 / fan-in and V with twice that."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(self.inner.weight, std=WIDTH**-0.5)
        nn.init.normal_(self.outer.weight, std=(2 / WIDTH) ** 0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h + SCALE * self.outer(F.relu(self.inner(self.norm(h))))


class Network(nn.Module):
    """Linear stem, blocks, and a readout of unit variance that is divided by the width."""

    def __init__(self, depth: int, norm: bool):
        super().__init__()
        self.stem, self.readout = nn.Linear(PIXELS, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES, bias=False)
        self.blocks = nn.Sequential(*[Block(norm) for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        nn.init.normal_(self.stem.weight, std=PIXELS**-0.5)
        nn.init.normal_(self.readout.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.norm(self.blocks(self.stem(x)))) / WIDTH


@dataclass(frozen=True)
class OnePass:
    """Trains once through the data. Returns the mean of the last fifth of the losses; infinite where chance is less."""

    source: str
    setup: str

    def __call__(self, model: nn.Module, lr: float, seed: int) -> float:
        hidden = {"params": list(model.blocks.parameters()), "lr": lr}
        ends = {"params": [p for name, p in model.named_parameters() if not name.startswith("blocks.")]}
        if self.setup == "sgd":
            optimizer = dm.SGD([hidden, {**ends, "lr": lr * WIDTH}])
        else:
            optimizer = dm.Adam([hidden, {**ends, "lr": lr * WIDTH**0.5}], eps=EPS)
        loss = final(one_pass(model, optimizer, shuffled(self.source, seed, BATCH)))
        return loss if loss < math.log(CLASSES) else math.inf


def main() -> None:
    options = parser_of(__doc__, SETUPS, [4, 8, 16, 64]).parse_args()
    swept(
        f"cifar_transfer_{options.setup}", partial(Network, norm=options.setup == "adam-norm"),
        OnePass(options.data, options.setup), options, SETUPS[options.setup],
        f"CIFAR-10 at 16 pixels, one pass, width {WIDTH}, {options.setup}",
        torch.zeros(4, PIXELS).normal_(generator=torch.Generator().manual_seed(0)), digits=3,
    )  # fmt: skip


if __name__ == "__main__":
    main()
