"""Does the coordinate check call a right set-up broken? Nine networks, five optimizers, four rules, its defaults.

    python examples/benchmarks/right_setups.py             # all 176; a quarter of an hour on one core
    python examples/benchmarks/right_setups.py --share 0.35  # a random third

In each, `dm.parametrize` and this package's optimizers do what the rule says, so "broken" is a false alarm. Muon
takes matrices, so the convolutions are not trained with it. Writes right_setups.csv beside this file, and goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm

WIDTH, TOKENS, INPUTS, CLASSES, SAMPLES = 32, 8, 16, 5, 32
DEPTHS = (2, 4, 8, 16)
HEADER = ["network", "optimizer", "rule", "verdict", "seeds", "why"]
RULES = ("mup", "depth-mup", "depth-mup-corrected", "complete-p")


class Gated(nn.Module):
    """down(silu(gate(h)) * up(h))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(h)) * self.up(h))


class Attention(nn.Module):
    """Four heads over (batch, tokens, width)."""

    def __init__(self, causal: bool):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), causal

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).view(*h.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(h.shape))


class Scaled(nn.Module):
    """LayerScale: a gain of 0.1 for each feature after the branch."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch, self.gamma = branch, nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, h: Tensor) -> Tensor:
        return self.gamma * self.branch(h)


class Block(nn.Module):
    """h + branch(norm(h)), or norm(h + branch(h))."""

    def __init__(self, branch: nn.Module, norm: nn.Module, post: bool = False):
        super().__init__()
        self.branch, self.norm, self.post = branch, norm, post

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h + self.branch(h)) if self.post else h + self.branch(self.norm(h))


def mlp(layers: int) -> nn.Module:
    """Linear maps with tanh before each but the first; before the only one of a single-layer branch."""
    hidden = [part for _ in range(layers - 1) for part in (nn.Tanh(), nn.Linear(WIDTH, WIDTH))]
    return nn.Sequential(*([nn.Tanh()] if layers == 1 else []), nn.Linear(WIDTH, WIDTH), *hidden)


def of_features(branch: Callable[[], nn.Module], depth: int, post: bool = False) -> nn.Module:
    """A stack over (batch, inputs)."""
    blocks = [Block(branch(), nn.LayerNorm(WIDTH), post) for _ in range(depth)]
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))


def of_tokens(causal: bool, depth: int) -> nn.Module:
    """Attention and a feed-forward part in turn, over (batch, tokens, inputs)."""
    branches = (branch for _ in range(depth) for branch in (Attention(causal), mlp(2)))
    blocks = [Block(branch, nn.LayerNorm(WIDTH)) for branch in branches]
    pooled = nn.Identity() if causal else Pool(1)
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), *blocks, nn.LayerNorm(WIDTH), pooled, nn.Linear(WIDTH, CLASSES))


class Pool(nn.Module):
    """The mean over axes."""

    def __init__(self, *axes: int):
        super().__init__()
        self.axes = axes

    def forward(self, h: Tensor) -> Tensor:
        return h.mean(self.axes)


def of_pixels(depth: int) -> nn.Module:
    """3 x 3 convolutions with BatchNorm, pre-activation, 16 channels on 8 x 8 pixels."""

    def branch() -> nn.Module:
        convs = [nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2)]
        return nn.Sequential(nn.ReLU(), convs[0], nn.BatchNorm2d(16), nn.ReLU(), convs[1])

    blocks = [Block(branch(), nn.BatchNorm2d(16)) for _ in range(depth)]
    ends = nn.BatchNorm2d(16), nn.ReLU(), Pool(2, 3), nn.Linear(16, CLASSES)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks, *ends)


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "pre-norm MLP": (partial(of_features, partial(mlp, 2)), (INPUTS,)),
    "one-layer blocks": (partial(of_features, partial(mlp, 1)), (INPUTS,)),
    "three-layer blocks": (partial(of_features, partial(mlp, 3)), (INPUTS,)),
    "gated MLP": (partial(of_features, Gated), (INPUTS,)),
    "LayerScale": (partial(of_features, lambda: Scaled(mlp(2))), (INPUTS,)),
    "post-norm MLP": (partial(of_features, partial(mlp, 2), post=True), (INPUTS,)),
    "conv, BatchNorm": (of_pixels, (3, 8, 8)),
    "ViT": (partial(of_tokens, False), (TOKENS, INPUTS)),
    "GPT": (partial(of_tokens, True), (TOKENS, INPUTS)),
}
"""Networks by depth, and the shape of a sample."""


def hidden(model: nn.Module) -> list[nn.Parameter]:
    """The blocks' matrices, which Muon takes; the rest stays as it is."""
    return [p for block in model.children() if isinstance(block, Block) for p in block.parameters() if p.ndim == 2]


OPTIMIZERS: dict[str, dict[str, object]] = {
    "SGD": {"optimizer": "sgd"},
    "momentum": {"optimizer": lambda model: dm.SGD(model, lr=1e-3, momentum=0.9), "family": "sgd"},
    "Adam": {"optimizer": "adam"},
    "AdamW": {"optimizer": "adamw"},
    "Muon": {"optimizer": lambda model: dm.Muon(hidden(model), lr=1e-3, weight_decay=0.0), "family": "muon"},
}
"""What is passed to the check beside the network, the data, the depths and the rule."""


def data(network: str) -> tuple[Tensor, Tensor]:
    """Normal inputs; a class for each sample, or for each token of a causal network."""
    generator, shape = torch.Generator().manual_seed(0), NETWORKS[network][1]
    inputs = torch.randn(SAMPLES, *shape, generator=generator)
    wanted = (SAMPLES, TOKENS) if network == "GPT" else (SAMPLES,)
    return inputs, torch.randint(CLASSES, wanted, generator=generator)


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the set-ups, drawn at random (default: all)")
    parser.add_argument("--anew", action="store_true", help="without what the file holds already")
    options = parser.parse_args()
    start = time.perf_counter()
    setups = [s for s in itertools.product(NETWORKS, OPTIMIZERS, RULES) if s[:2] != ("conv, BatchNorm", "Muon")]
    chosen = set(random.Random(0).sample(setups, round(options.share * len(setups))))
    path = Path(__file__).with_suffix(".csv")
    rows = [HEADER] if options.anew or not path.exists() else list(csv.reader(path.open()))
    done = {tuple(row[:3]) for row in rows}
    for network, optimizer, rule in (setup for setup in setups if setup in chosen - done):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check = dm.diagnostics.coordinate_check(
                NETWORKS[network][0], data(network), depths=DEPTHS, rule=rule, loss=loss, **OPTIMIZERS[optimizer]
            )
        far = [f"{s.words} {s.measured:+.2f} ({s.prediction})" for s in check.slopes if s.verdict == check.verdict]
        why = "; ".join(far) if check.verdict != "holds" else ""
        rows.append([network, optimizer, rule, check.verdict, str(max(s.seeds for s in check.slopes)), why])
        print(*rows[-1], *check.mistakes, sep=" | ", flush=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    print(dict(Counter(row[3] for row in rows[1:])), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
