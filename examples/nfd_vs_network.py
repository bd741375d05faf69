"""Finite networks closing in on the prediction of Neural Feature Dynamics, and collapse with its repair. A minute.

    python examples/nfd_vs_network.py [--out examples/figures/nfd.png]

Left: a trained output of networks of width 64 to 2048 beside the prediction. Middle: the error of their mean and of a
single network. Right: inner layers' own update against depth, uncorrected, corrected and under CompleteP.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

from torch_depthmup.diagnostics.nfd import simulate
from torch_depthmup.diagnostics.nfd.comparison import measure
from torch_depthmup.diagnostics.nfd.setting import Setting
from torch_depthmup.diagnostics.shared.digits import digits
from torch_depthmup.rules import get_family, get_rule, predicted_slopes

WIDTHS = {64: 64, 128: 48, 256: 32, 512: 16, 1024: 8, 2048: 3}  # width: seeds
DEPTHS = (4, 8, 16, 32, 64, 128)
RULES = ("depth-mup", "depth-mup-corrected", "complete-p")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("nfd_vs_network.png"))
    options = parser.parse_args()
    images, labels = digits()
    inputs = images[:4] / images[:4].square().mean(1, keepdim=True).sqrt()
    targets = 1.0 - 2.0 * (labels[:4] % 2)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    setting = Setting(depth=8, steps=4, lr=1.0, base_depth=4, block_layers=2)
    predicted = simulate(setting, inputs, targets, width=30000, seeds=8)
    wanted = predicted.mean("outputs")[-1]
    of_mean, of_one = [], []
    for i, (width, seeds) in enumerate(WIDTHS.items()):
        network = measure(setting, inputs, targets, width=width, seeds=seeds)
        shade = str(0.8 - 0.7 * i / (len(WIDTHS) - 1))
        mean, error = network.mean("outputs")[:, 0, 0], network.error("outputs")[:, 0, 0]
        left.errorbar(range(5), mean, error, fmt="o-", color=shade, markersize=3, linewidth=0.8, label=f"n = {width}")
        final = network.outputs[:, -1]
        of_mean.append(float((final.mean(0) - wanted).norm()))
        of_one.append(float((final - wanted).flatten(1).norm(dim=1).mean()))
        print(
            f"width {width}: mean of {seeds} off by {of_mean[-1]:.3f}, a single network by {of_one[-1]:.3f}", flush=True
        )
    left.plot(range(5), predicted.mean("outputs")[:, 0, 0], color="C3", linewidth=2, label="prediction")
    left.set(title="output of the first sample", xlabel="step")
    left.legend(fontsize="x-small", frameon=False)

    widths = list(WIDTHS)
    middle.loglog(widths, of_one, "o-", label="a single network")
    middle.loglog(widths, of_mean, "s-", label="mean over seeds")
    middle.loglog(
        widths, [of_one[0] * math.sqrt(widths[0] / w) for w in widths], ":", color="0.6", label="width ^ -1/2"
    )
    middle.set(title="distance from the prediction", xlabel="width n")
    middle.legend(fontsize="x-small", frameon=False)

    for i, rule in enumerate(RULES):
        sizes = []
        for depth in DEPTHS:
            setting = Setting(depth=depth, base_depth=4, steps=1, lr=0.1, block_layers=2, rule=rule)
            result = simulate(setting, inputs, targets, width=2000, seeds=4)
            sizes.append(float(result.mean("inner_own")[-1].mean()))
        slope = predicted_slopes(get_rule(rule), get_family("sgd"))["inner"]
        fitted = torch.tensor(sizes).log2().diff().mean() / torch.tensor(DEPTHS).log2().diff().mean()
        print(f"{rule}: inner own update against depth, slope {float(fitted):+.2f}, predicted {slope:+.2f}", flush=True)
        right.loglog(DEPTHS, sizes, "o-", color=f"C{i}", label=f"{rule} ({float(fitted):+.2f})")
        right.loglog(DEPTHS, [sizes[0] * (d / DEPTHS[0]) ** slope for d in DEPTHS], ":", color=f"C{i}", linewidth=1)
    right.set(title="inner layers' own update", xlabel="depth L")
    right.legend(fontsize="x-small", frameon=False, title="rule (slope)")
    figure.savefig(options.out, dpi=130)
    print(f"figure {options.out}")


if __name__ == "__main__":
    main()
