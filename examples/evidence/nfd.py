"""Does Neural Feature Dynamics predict trained networks, what does gradient independence leave out, what is to gain?

    python examples/evidence/nfd.py

Four digits, tanh, two-layer blocks, base depth 4, four SGD steps at learning rate 1 (in units of the width). Three
questions, of which each has a CSV beside this file and a panel of figures/nfd.png:

- networks: dense networks of width 64 to 1024 at depth 8 (16 seeds or more), with one matrix for both passes as real
  networks have and with an independent one for the backward pass, beside the predictions under both couplings.
- gap: how much of the function's change the predictions differ by, at depths 8, 32 and 128, for each rule.
- returns: what doubling the depth changes in the outputs, as `nfd.returns` predicts it at width 256 and as dense
  networks of that width do.

Some minutes of one core.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from torch_depthmup.diagnostics.nfd import Setting, gia_gap, returns, simulate
from torch_depthmup.diagnostics.nfd.comparison import measure
from torch_depthmup.diagnostics.shared.digits import digits

HERE = Path(__file__).parent
RULES = ("depth-mup", "depth-mup-corrected", "complete-p")
SETTING = Setting(depth=8, steps=4, lr=1.0, base_depth=4, block_layers=2)
BACKWARD = {"reused": "tied", "decoupled": "independent"}
"""Couplings of the simulation, and how a dense network has the same."""
Rows = list[dict[str, Any]]


def data() -> tuple[Tensor, Tensor]:
    """Four digits, each of mean square 1, and whether they are even (1) or odd (-1)."""
    images, labels = digits()
    return images[:4] / images[:4].square().mean(1, keepdim=True).sqrt(), 1.0 - 2.0 * (labels[:4] % 2)


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square over samples."""
    return float((a - b).square().mean().sqrt())


def networks(widths: Sequence[int]) -> Rows:
    """For each width and kind of network: how far the mean of the trained outputs and single networks' are away."""
    inputs, targets = data()
    wanted = {
        name: simulate(SETTING, inputs, targets, width=20000, seeds=8, coupling=name).mean("outputs")[-1]
        for name in BACKWARD
    }
    rows: Rows = []
    for (kind, backward), width in ((item, width) for item in BACKWARD.items() for width in widths):
        found = measure(SETTING, inputs, targets, width=width, seeds=max(16, 4096 // width), backward=backward)
        final = found.outputs[:, -1]
        row = {"network": kind, "width": width, "seeds": len(final)}
        for coupling, prediction in wanted.items():
            row[f"mean_from_{coupling}"] = distance(final.mean(0), prediction)
            row[f"one_from_{coupling}"] = sum(distance(one, prediction) for one in final) / len(final)
        rows.append(row)
        print(row, flush=True)
    return rows


def gaps(depths: Sequence[int]) -> Rows:
    """For each rule and depth: the function's mean change in training, and how much less it is when decoupled."""
    inputs, targets = data()
    rows: Rows = []
    for rule, depth in ((rule, depth) for rule in RULES for depth in depths):
        gap = gia_gap(replace(SETTING, depth=depth, rule=rule), inputs, targets, width=4000, seeds=8)
        outputs = gap.reused.outputs
        moved = (outputs[:, -1] - outputs[:, 0]).mean(0)
        mean, error = (value[-1] for value in gap.function())
        share, spread = (float(v.square().mean().sqrt() / moved.square().mean().sqrt()) for v in (mean, error))
        rows.append({"rule": rule, "depth": depth, "share": share, "error": spread})
        print(rows[-1], flush=True)
    return rows


def doublings(depths: Sequence[int], seeds: int) -> Rows:
    """For each rule and depth: the mean outputs' change to twice the depth, predicted and in dense networks."""
    inputs, targets = data()
    rows: Rows = []
    for rule in RULES:
        dense = {
            depth: measure(replace(SETTING, depth=depth, rule=rule), inputs, targets, width=256, seeds=seeds)
            for depth in (*depths, 2 * depths[-1])
        }
        for depth in depths:
            here, twice = dense[depth], dense[2 * depth]
            noise = here.error("outputs")[-1].square() + twice.error("outputs")[-1].square()
            change = (here.mean("outputs")[-1] - twice.mean("outputs")[-1]).square() - noise
            told = returns(replace(SETTING, depth=depth, rule=rule), inputs, targets, width=256, seeds=4 * seeds)
            rows.append({
                "rule": rule, "depth": depth, "predicted": told.next_depth[0], "predicted_error": told.next_depth[1],
                "measured": math.sqrt(max(0.0, float(change.mean()))), "measured_error": float(noise.mean().sqrt()),
                "growth": told.measured_growth[0], "growth_error": told.measured_growth[1], "theory": told.growth,
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def written(name: str, rows: Rows) -> None:
    """The rows as a CSV file, numbers to four digits."""
    with (HERE / f"nfd_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def committed(name: str) -> Rows:
    """The rows of such a file."""

    def number(text: str) -> Any:
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            return text

    with (HERE / f"nfd_{name}.csv").open() as file:
        return [{key: number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def drawn(found: dict[str, Rows]) -> Figure:
    """A panel for each question."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    of_tied = [row for row in found["networks"] if row["network"] == "reused"]
    widths = [row["width"] for row in of_tied]
    for key, label, style in (
        ("one_from_reused", "a single network", "o-"),
        ("mean_from_reused", "mean over seeds", "s-"),
        ("mean_from_decoupled", "mean, from the decoupled prediction", "^--"),
    ):
        left.loglog(widths, [row[key] for row in of_tied], style, label=label, markersize=4)
    left.set(title="distance of networks from the prediction", xlabel="width")
    for i, rule in enumerate(RULES):
        rows = [row for row in found["gap"] if row["rule"] == rule]
        _bars(middle, rows, "share", "error", f"C{i}", "o-", rule)
        rows = [row for row in found["returns"] if row["rule"] == rule]
        _bars(right, rows, "predicted", "predicted_error", f"C{i}", "o-", f"{rule}, predicted")
        _bars(right, rows, "measured", "measured_error", f"C{i}", "s:", "networks")
    middle.set(title="GIA gap over the function's change", xlabel="depth", ylim=(0, None))
    right.set(title="change of the outputs to twice the depth", xlabel="depth", ylim=(0, None))
    for panel, key in ((left, ""), (middle, "gap"), (right, "returns")):
        panel.set_xscale("log", base=2)
        ticks = sorted({row["depth"] for row in found[key]}) if key else widths
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.legend(fontsize="x-small", frameon=False, loc="lower left" if panel is middle else "upper right")
    left.get_legend().set_bbox_to_anchor((1, 0.93))  # below the line at the top
    return figure


def _bars(panel: Axes, rows: Rows, key: str, error: str, color: str, style: str, label: str) -> None:
    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    panel.errorbar(column("depth"), column(key), column(error), fmt=style, color=color, markersize=4, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 32, 128], help="of the gap")
    parser.add_argument("--doubled", type=int, nargs="+", default=[8, 16], help="each twice the one before it")
    parser.add_argument("--seeds", type=int, default=24, help="of the networks whose depth is doubled")
    parser.add_argument("--only", choices=("networks", "gap", "returns"), help="one question; the other CSVs are read")
    options = parser.parse_args()
    start = time.perf_counter()
    parts: dict[str, Callable[[], Rows]] = {
        "networks": lambda: networks(options.widths),
        "gap": lambda: gaps(options.depths),
        "returns": lambda: doublings(options.doubled, options.seeds),
    }
    for name in [options.only] if options.only else parts:
        written(name, parts[name]())
    drawn({name: committed(name) for name in parts}).savefig(HERE.parent / "figures" / "nfd.png", dpi=130)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
