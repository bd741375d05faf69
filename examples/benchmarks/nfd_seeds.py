"""How much faster are several seeds of `nfd.predict` side by side than one after the other? Paired, alternating.

    python examples/benchmarks/nfd_seeds.py [--quick] [--seeds 16] [--pairs 5]

Eight pre-norm MLP blocks on 4 samples, and two pre-norm transformer blocks on 2 sequences of 16 tokens, 5 steps of SGD.
Prints processor time and its ratio (in turn / side by side, median and range) for each width.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from nfd_any import VOCABULARY, Transformer
from torch import Tensor, nn
from torch.nn import functional as F

from torch_depthmup.diagnostics.nfd import predict


class Block(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(n), nn.Linear(n, n), nn.Linear(n, n)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(F.gelu(self.up(self.norm(h))))


def mlp(n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(10, n), *(Block(n) for _ in range(8)), nn.Linear(n, 1))


def transformer(n: int) -> nn.Module:
    return Transformer(n, 2)


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def networks() -> dict[str, tuple[Callable[[int], nn.Module], Tensor, Tensor, Callable | None]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 17), generator=generator)
    x, y = torch.randn(4, 10, generator=generator), torch.randn(4, 1, generator=generator)
    return {"MLP": (mlp, x, y, None), "transformer": (transformer, tokens[:, :-1], tokens[:, 1:], loss)}


def seconds(network: str, width: int, groups: Sequence[Sequence[int]]) -> float:
    make, x, y, objective = networks()[network]
    start = time.process_time()
    for seeds in groups:
        predict(make, x, y, width=width, steps=5, seeds=seeds, loss=objective,
                optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1 / width))  # fmt: skip
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 256, 4 seeds, one pair")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    seeds, pairs = (4, 1) if options.quick else (options.seeds, options.pairs)
    for network in networks():
        for width in (256,) if options.quick else (256, 1024, 4096):
            seconds(network, width, [range(seeds)])  # the first of a kind also loads code
            times = [
                (seconds(network, width, [[seed] for seed in range(seeds)]), seconds(network, width, [range(seeds)]))
                for _ in range(pairs)
            ]
            ratios = [turn / side for turn, side in times]
            print(
                f"{network}, width {width}, {seeds} seeds: in turn {statistics.median(t for t, _ in times):.2f} s, "
                f"side by side {statistics.median(s for _, s in times):.2f} s; ratio {statistics.median(ratios):.1f} "
                f"[{min(ratios):.1f}, {max(ratios):.1f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
