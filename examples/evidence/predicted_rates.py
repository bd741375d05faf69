"""Can the best learning rate be read off predictions, without training? Predicted beside trained, over depth and rules.

    python examples/evidence/predicted_rates.py

Networks h + V tanh(W h) with frozen stem and readout on sixteen scanned digits (odd against even), SGD, base depth 4.
`nfd.sweep` predicts the loss after ten steps at width 512, in which no matrix is formed; dense networks of width 256
are trained by `transfer_sweep` on the same grid. Writes predicted_rates.csv and predicted_rates_trained.csv beside this
file and figures/predicted_rates.png; five minutes of one core.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.diagnostics import nfd
from torch_depthmup.diagnostics.shared.digits import digits
from torch_depthmup.diagnostics.transfer.result import Sweep

HERE = Path(__file__).parent
RULES = ("depth-mup", "depth-mup-corrected", "complete-p")
SAMPLES, STEPS, BASE = 16, 10, 4


class Block(nn.Module):
    """h + V tanh(W h) / 2: at the base depth of 4 the branches together add as much variance as the stem has."""

    def __init__(self, n: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False)
        nn.init.normal_(self.inner.weight, std=n**-0.5)
        nn.init.normal_(self.outer.weight, std=BASE**-0.5 * n**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.outer(torch.tanh(self.inner(h)))


class Network(nn.Module):
    """(batch, 64) to (batch, 1), the readout in mean-field scale; stem and readout stay as they are."""

    def __init__(self, depth: int, n: int):
        super().__init__()
        self.stem, self.head = nn.Linear(64, n, bias=False), nn.Linear(n, 1, bias=False)
        self.blocks = nn.Sequential(*[Block(n) for _ in range(depth)])
        nn.init.normal_(self.stem.weight, std=1 / 8)
        nn.init.normal_(self.head.weight)
        for end in (self.stem, self.head):
            end.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.head.in_features
        return self.head(self.blocks(self.stem(x))) / n


def data() -> tuple[Tensor, Tensor]:
    images, labels = digits()
    inputs = images[:SAMPLES] / images[:SAMPLES].square().mean(1, keepdim=True).sqrt()
    return inputs, 1.0 - 2.0 * (labels[:SAMPLES, None] % 2)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The readout is divided by the width, so that rates of the hidden matrices are the same at all widths."""
    return dm.SGD(model.blocks.parameters(), lr=lr)


def train(model: nn.Module, lr: float, seed: int) -> float:
    """The loss after all steps; infinite where it ends above where it began, as `nfd.sweep` counts."""
    optimizer, (x, y) = sgd(model, lr), data()
    losses = []
    for step in range(STEPS + 1):
        loss = nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses[-1] if losses[-1] <= losses[0] else math.inf


def narrow(depth: int, width: int) -> nn.Module:
    """A network that workers can make."""
    return Network(depth, width)


def drawn(predicted: Sweep, trained: Sweep, widths: tuple[int, int]) -> Figure:
    """A panel for each rule: loss against learning rate, a colour for each depth; lines predicted, marks trained."""
    figure = Figure(figsize=(3.6 * len(RULES), 3.5), layout="constrained")
    for panel, rule in zip(figure.subplots(1, len(RULES), sharey=True), RULES, strict=True):
        for i, depth in enumerate(predicted.depths):
            for sweep, style, what in ((predicted, "-", "predicted"), (trained, "o", "trained")):
                points = [(lr, sweep.losses(rule, depth, lr)) for lr in sweep.lrs]
                points = [(lr, sum(losses) / len(losses)) for lr, losses in points if math.inf not in losses]
                label = f"depth {depth}, {what}, n = {widths[what == 'trained']}"
                panel.plot(*zip(*points, strict=True), style, color=f"C{i}", markersize=4, label=label)
        panel.set_xscale("log", base=2)
        panel.set(yscale="log", title=rule, xlabel="learning rate of the base")
    figure.axes[0].set_ylabel(f"loss after {STEPS} steps")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, loc="outside lower center", ncols=len(predicted.depths))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--network-width", type=int, default=256)
    parser.add_argument(
        "--lrs", type=float, nargs=3, default=[-2.5, 2, 0.5], help="log2 of first and last, and the step"
    )
    parser.add_argument("--seeds", type=int, nargs=2, default=[2, 3], help="of predictions and of networks")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    first, last, step = options.lrs
    lrs = [2 ** (first + step * i) for i in range(round((last - first) / step) + 1)]
    grid = {"depths": options.depths, "lrs": lrs, "rules": RULES}
    start = time.perf_counter()
    predicted = nfd.sweep(
        Network, *data(), width=options.width, steps=STEPS, optimizer=sgd, seeds=options.seeds[0], progress=True, **grid
    )
    print(predicted, f"predicted in {time.perf_counter() - start:.0f} s", sep="\n", flush=True)
    predicted.frame().to_csv(options.out / "predicted_rates.csv", index=False)
    start = time.perf_counter()
    make = partial(narrow, width=options.network_width)
    trained = dm.diagnostics.transfer_sweep(make, train, seeds=options.seeds[1], example_inputs=data()[0], **grid)
    print(trained, f"trained in {time.perf_counter() - start:.0f} s", sep="\n")
    trained.frame().to_csv(options.out / "predicted_rates_trained.csv", index=False)
    figures = HERE.parent / "figures" if options.out == HERE else options.out
    drawn(predicted, trained, (options.width, options.network_width)).savefig(figures / "predicted_rates.png", dpi=130)


if __name__ == "__main__":
    main()
