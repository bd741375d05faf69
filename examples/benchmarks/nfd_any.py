"""How much faster and smaller is `nfd.predict` than training the network itself? The same code, paired, alternating.

    python examples/benchmarks/nfd_any.py [--quick] [--width 4096] [--blocks 16] [--steps 5] [--optimizer adamw]

A pre-norm transformer (4 heads, MLP of 4 n) on 4 sequences of 16 tokens. Prints the ratio of training times
(network / prediction, median and range; making the network's matrices is not counted, making the implicit model is),
peak memory of each in a process of its own and the width that would fill 24 GB, and the prediction's time at twice and
four times the width. Blocks are alike, so `--blocks 4` has the ratios of 16, for whose network of width 4096 one needs
27 GB.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_depthmup.diagnostics.nfd import predict

HEADS, TOKENS, SEQUENCES, VOCABULARY = 4, 16, 4, 32


class Block(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(n) for _ in range(2))
        self.qkv, self.out = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.up, self.down = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in self.qkv(self.norms[0](h)).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norms[1](h))))


class Transformer(nn.Module):
    def __init__(self, n: int, blocks: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, n), nn.Parameter(torch.randn(TOKENS, n))
        self.blocks, self.norm = nn.ModuleList(Block(n) for _ in range(blocks)), nn.LayerNorm(n)
        self.head = nn.Linear(n, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def data() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (SEQUENCES, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}
Sizes = tuple[int, int, int, str]
"""Width, blocks, steps, optimizer."""


def network(width: int, blocks: int, steps: int, name: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = Transformer(width, blocks)
    optimizer, (x, y) = OPTIMIZERS[name](model), data()

    def train() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
        with torch.no_grad():
            model(x)

    return train


def prediction(width: int, blocks: int, steps: int, name: str) -> Callable[[], None]:
    x, y = data()

    def run() -> None:
        predict(lambda n: Transformer(n, blocks), x, y, width=width, optimizer=OPTIMIZERS[name], steps=steps, seeds=1)

    return run


def seconds(action: Callable[[], None]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def _peak(kind: str, sizes: Sizes, pipe: Any) -> None:
    before = _high_water()
    {"network": network, "prediction": prediction}[kind](*sizes)()
    pipe.send(_high_water() - before)


def _high_water() -> float:
    """Gigabytes of the most resident memory so far, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6


def peak(kind: str, sizes: Sizes) -> float:
    """Gigabytes of resident memory that one run adds, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_peak, args=(kind, sizes, theirs))
    process.start()
    gigabytes = ours.recv()
    process.join()
    return gigabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 1024, 2 blocks, 2 steps")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    width, blocks, steps = (1024, 2, 2) if options.quick else (options.width, options.blocks, options.steps)
    sizes = width, blocks, steps, options.optimizer
    dense, predicted = network(*sizes), prediction(*sizes)
    pairs = [(seconds(dense), seconds(predicted)) for _ in range(options.pairs)]
    ratios = [a / b for a, b in pairs]
    print(
        f"width {width}, {blocks} blocks, {SEQUENCES} x {TOKENS} tokens, {steps} steps: network {pairs[-1][0]:.2f} s, "
        f"prediction {pairs[-1][1]:.2f} s; ratio {statistics.median(ratios):.1f} "
        f"[{min(ratios):.1f}, {max(ratios):.1f}]",
        flush=True,
    )
    del dense
    held, needed = peak("network", sizes), peak("prediction", sizes)
    print(
        f"peak memory: network {held:.2f} GB, prediction {needed:.2f} GB, ratio {held / needed:.1f}; it grows like the "
        f"width, the network's like its square: 20 at width {20 * needed / held * width:.0f}; "
        f"24 GB hold a prediction of {blocks} blocks of width {24 / needed * width:.0f}",
        flush=True,
    )
    if options.optimizer != "sgd":
        return
    times = {w: seconds(prediction(w, *sizes[1:])) for w in (width, 2 * width, 4 * width)}
    slope = statistics.linear_regression([math.log(w) for w in times], [math.log(t) for t in times.values()]).slope
    print(f"time against width: {', '.join(f'{w}: {t:.2f} s' for w, t in times.items())}; exponent {slope:.2f}")


if __name__ == "__main__":
    main()
