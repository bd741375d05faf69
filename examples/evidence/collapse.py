"""Do inner layers stop learning with depth, and does the correction repair it? Blocks of one, two and three layers.

    python examples/evidence/collapse.py

Networks h + V tanh(... W h) of width 64 without norms or biases, stem and readout frozen, depths 4 to 256, two steps at
a small learning rate (so that a step's own effect is measured), three seeds, SGD, Adam and Muon, three rules. Takes the
slopes over depth of the layers' own updates, of the stream's and of the function's with `coordinate_check`. Writes
collapse.csv beside this file and figures/collapse.png; some minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.diagnostics.coordinates.check import CoordinateCheck

HERE = Path(__file__).parent
WIDTH, INPUTS, SAMPLES = 64, 16, 8
RULES = ("depth-mup", "depth-mup-corrected", "complete-p")
OPTIMIZERS = {"sgd": (dm.SGD, 1e-3), "adam": (dm.Adam, 1e-4), "muon": (partial(dm.Muon, weight_decay=0.0), 1e-4)}
"""With learning rates. Muon's own decay, which keeps its pace, would outgrow the update in deep networks: it is off."""
QUANTITIES = ("inner", "outer", "stream", "function")


class Block(nn.Module):
    """h + W_n tanh(... tanh(W_1 h)), or h + W_1 tanh(h) for one layer; entries of variance 1/width."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=WIDTH**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        value = torch.tanh(h) if len(self.layers) == 1 else h
        for i, layer in enumerate(self.layers):
            value = layer(torch.tanh(value) if i else value)
        return h + value


class Network(nn.Module):
    """(batch, 16) to (batch, 1): frozen stem, blocks, frozen readout in mean-field scale."""

    def __init__(self, layers: int, depth: int):
        super().__init__()
        self.stem, self.head = nn.Linear(INPUTS, WIDTH, bias=False), nn.Linear(WIDTH, 1, bias=False)
        self.blocks = nn.Sequential(*[Block(layers) for _ in range(depth)])
        nn.init.normal_(self.stem.weight, std=INPUTS**-0.5)
        nn.init.normal_(self.head.weight, std=1 / WIDTH)
        for end in (self.stem, self.head):
            end.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def checked(layers: int, optimizer: str, rule: str, depths: list[int], seeds: int) -> CoordinateCheck:
    """The coordinate check of one panel and line of the figure."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(SAMPLES, INPUTS, generator=generator), torch.randn(SAMPLES, 1, generator=generator)
    constructor, lr = OPTIMIZERS[optimizer]
    return dm.diagnostics.coordinate_check(
        partial(Network, layers), data, depths=depths, base_depth=1, steps=2, rule=rule, family=optimizer,
        seeds=range(seeds), optimizer=lambda model: constructor(model.blocks.parameters(), lr=lr),
    )  # fmt: skip


def drawn(found: dict[tuple[int, str, str], CoordinateCheck]) -> Figure:
    """A panel for each optimizer and number of layers: the layers' own update over depth, relative to the first."""
    layers, optimizers = sorted({key[0] for key in found}), list(OPTIMIZERS)
    figure = Figure(figsize=(3.2 * len(optimizers), 2.6 * len(layers)), layout="constrained")
    panels = figure.subplots(len(layers), len(optimizers), squeeze=False, sharex=True, sharey=True)
    for (row, count), (column, optimizer) in itertools.product(enumerate(layers), enumerate(optimizers)):
        panel, quantity = panels[row][column], "inner" if count > 1 else "outer"
        for rule in RULES:
            sizes: dict[int, list[float]] = defaultdict(list)
            for (depth, _, _), size in found[count, optimizer, rule].sizes(quantity).items():
                sizes[depth].append(size)
            depths = sorted(sizes)
            first = fmean(sizes[depths[0]])
            panel.plot(depths, [fmean(sizes[depth]) / first for depth in depths], marker="o", markersize=3, label=rule)
        panel.set(xscale="log", yscale="log", title=f"{optimizer}, {count} layer{'s' * (count > 1)}")
        panel.set_xticks(depths, [str(depth) for depth in depths])
        panel.set_yticks([1, 0.5, 0.25, 0.125], ["1", "1/2", "1/4", "1/8"])
        panel.minorticks_off()
        if column == 0:
            panel.set_ylabel(f"{quantity} layers' own update\nover that at depth {depths[0]}")
        if row == len(layers) - 1:
            panel.set_xlabel("depth")
    panels[0][0].legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    start, found, rows = time.perf_counter(), {}, []
    for layers, optimizer, rule in itertools.product((1, 2, 3), OPTIMIZERS, RULES):
        check = found[layers, optimizer, rule] = checked(layers, optimizer, rule, options.depths, options.seeds)
        slopes = {slope.quantity: slope for slope in check.slopes}
        rows += [
            [layers, optimizer, rule, quantity, *(f"{v:.4f}" for v in (s.measured, s.low, s.high, s.predicted))]
            for quantity in QUANTITIES
            if (s := slopes.get(quantity))
        ]
        print(layers, optimizer, rule, *(f"{q} {s.measured:+.2f}" for q, s in slopes.items()), flush=True)
    with (HERE / "collapse.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layers", "optimizer", "rule", "quantity", "slope", "low", "high", "predicted"])
        writer.writerows(rows)
    drawn(found).savefig(HERE.parent / "figures" / "collapse.png", dpi=130)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
