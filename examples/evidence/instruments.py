"""One network, three instruments: its training watched at four widths, predicted, and its rules compared over depth.

    python examples/evidence/instruments.py

The network of `predicted_rates.py` (blocks h + V tanh(W h) on sixteen digits), three steps of SGD at learning rate
1/2. Left: what each matrix learns by itself (the monitor's ``own``), layer by layer, in networks of four widths (mean
and standard deviation over seeds) and in `nfd.predict` at width 1,024. Middle: how far single networks and their mean
are from the prediction. Right: the inner layers' own update over depth under three rules, predicted (lines) and trained
(marks). Writes instruments.csv beside this file and figures/instruments.png; some minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from predicted_rates import BASE, RULES, Network, data
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.diagnostics import FeatureMonitor, nfd

HERE = Path(__file__).parent
DEPTH, STEPS, LR = 8, 3, 0.5
FIELDS = ("part", "source", "rule", "depth", "width", "layer", "seed", "own")


def optimizer(model: nn.Module, rule: str, depth: int) -> torch.optim.Optimizer:
    dm.parametrize(model, depth_multiplier=depth / BASE, example_inputs=data()[0], rule=rule)
    return dm.SGD(model.blocks.parameters(), lr=LR)


def own(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What each hidden matrix added by itself in the last step's record, in units of the entries of its output."""
    return {
        row["layer"]: row["own"]
        for row in rows
        if row["kind"] == "layer" and row["step"] == STEPS and row["layer"].startswith("blocks")
    }


def trained(width: int, depth: int, rule: str, seed: int) -> dict[str, float]:
    """Of a network with its matrices."""
    torch.manual_seed(1000 + seed)
    model, (x, y) = Network(depth, width), data()
    stepping, monitor = optimizer(model, rule, depth), FeatureMonitor(model, x)
    for _ in range(STEPS):
        stepping.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        stepping.step()
    monitor.record(STEPS)
    return own(monitor.rows)


def predicted(width: int, depth: int, rule: str, seed: int) -> dict[str, float]:
    """Of a network without them."""
    x, y = data()
    found = nfd.predict(
        partial(Network, depth), x, y, width=width, steps=STEPS, seeds=[seed], probe=x,
        optimizer=lambda model: optimizer(model, rule, depth),
    )  # fmt: skip
    return own(found.rows[0])


def measured(part: str, source: str, rule: str, depth: int, width: int, seeds: int) -> list[dict[str, Any]]:
    """A row for each layer and seed."""
    run = predicted if source == "predicted" else trained
    print(part, source, rule, depth, width, flush=True)
    return [
        {"part": part, "source": source, "rule": rule, "depth": depth, "width": width, "layer": layer, "seed": seed,
         "own": f"{value:.6g}"}
        for seed in range(seeds)
        for layer, value in run(width, depth, rule, seed).items()
    ]  # fmt: skip


def table(rows: list[dict[str, Any]], **wanted: Any) -> Tensor:
    """Own updates of shape (seeds, layers), inner and outer layers in turn."""
    chosen = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    seeds = sorted({row["seed"] for row in chosen})
    return torch.tensor([[float(row["own"]) for row in chosen if row["seed"] == seed] for seed in seeds])


def drawn(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    layers, distances, over_depth = figure.subplots(1, 3)
    (width,) = {row["width"] for row in rows if row["part"] == "layers" and row["source"] == "predicted"}
    limit = table(rows, part="layers", source="predicted").mean(0)
    widths = sorted({row["width"] for row in rows if row["part"] == "layers" and row["source"] == "trained"})
    found = {n: table(rows, part="layers", source="trained", width=n) for n in widths}
    draw_layers(layers, limit, width, found)
    draw_distances(distances, {n: values / limit - 1 for n, values in found.items()})
    draw_depths(over_depth, [row for row in rows if row["part"] == "depths"])
    for panel in (distances, over_depth):
        panel.minorticks_off()
    for panel in figure.axes:
        panel.legend(fontsize=7, frameon=False)
    return figure


def draw_layers(panel: Any, limit: Tensor, width: int, found: dict[int, Tensor]) -> None:
    blocks = torch.arange(1, len(limit) // 2 + 1)
    for which, style, what in ((0, "-", "inner"), (1, "--", "outer")):
        for i, (n, values) in enumerate(found.items()):
            label = None if which else f"trained, n = {n}"
            mean, spread = values.mean(0)[which::2], values.std(0)[which::2]
            panel.errorbar(blocks + 0.12 * (i - 1.5), mean, spread, fmt="o", markersize=3, color=f"C{i}", label=label)
        panel.plot(blocks, limit[which::2], style, color="black", label=f"predicted, n = {width}, {what}")
    panel.set(xlabel="block", title="each matrix's own update", ylim=(0, None))


def draw_distances(panel: Any, off: dict[int, Tensor]) -> None:
    widths = list(off)
    singles = [float(values.square().mean().sqrt()) for values in off.values()]
    means = [float(values.mean(0).square().mean().sqrt()) for values in off.values()]
    for sizes, mark, label in ((singles, "o-", "a single network"), (means, "s-", "the mean over seeds")):
        panel.plot(widths, sizes, mark, label=label)
    line = [singles[0] * (n / widths[0]) ** -0.5 for n in widths]
    panel.plot(widths, line, ":", color="grey", label="$n^{-1/2}$")
    panel.set(xscale="log", yscale="log", xlabel="width", title="relative distance to the prediction")
    panel.set_xticks(widths, [str(n) for n in widths])
    panel.set_yticks([0.02, 0.05, 0.1, 0.2], ["0.02", "0.05", "0.1", "0.2"])


def draw_depths(panel: Any, rows: list[dict[str, Any]]) -> None:
    depths = sorted({row["depth"] for row in rows})
    for i, rule in enumerate(RULES):
        for source, style in (("predicted", "-"), ("trained", "o")):
            (n,) = {row["width"] for row in rows if row["source"] == source}
            sizes = [float(table(rows, source=source, rule=rule, depth=d)[:, ::2].mean()) for d in depths]
            panel.plot(depths, sizes, style, color=f"C{i}", label=f"{rule}, {source}, n = {n}")
    panel.set(xscale="log", yscale="log", xlabel="depth", title="inner layers' own update")
    panel.set_xticks(depths, [str(depth) for depth in depths])
    panel.set_yticks([0.05, 0.1, 0.2], ["0.05", "0.1", "0.2"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs=4, default=[64, 128, 256, 512])
    parser.add_argument("--width", type=int, default=1024, help="of the prediction on the left")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--ends", type=int, nargs=2, default=[512, 256], help="widths on the right")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    start, rows, few = time.perf_counter(), [], max(2, options.seeds // 8)
    rows += measured("layers", "predicted", RULES[1], DEPTH, options.width, few)
    for width in options.widths:
        rows += measured("layers", "trained", RULES[1], DEPTH, width, options.seeds)
    for rule in RULES:
        for depth in options.depths:
            rows += measured("depths", "predicted", rule, depth, options.ends[0], few)
            rows += measured("depths", "trained", rule, depth, options.ends[1], 2 * few)
    with (options.out / "instruments.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    figures = HERE.parent / "figures" if options.out == HERE else options.out
    drawn(rows).savefig(figures / "instruments.png", dpi=130)
    for rule in RULES:
        for source in ("predicted", "trained"):
            ends = [table(rows, part="depths", source=source, rule=rule, depth=d)[:, ::2] for d in options.depths]
            slope = math.log(float(ends[-1].mean() / ends[0].mean())) / math.log(options.depths[-1] / options.depths[0])
            print(f"{rule}, {source}: inner layers' own update goes like depth^{slope:+.2f}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
