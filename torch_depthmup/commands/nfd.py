"""``depthmup nfd``: the prediction beside real networks, on a few scanned digits."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from torch_depthmup.commands.sources import figure, positive, rate
from torch_depthmup.diagnostics.nfd.activations import ACTIVATIONS
from torch_depthmup.diagnostics.nfd.comparison import compare, measure
from torch_depthmup.diagnostics.nfd.figures import comparison_figure
from torch_depthmup.diagnostics.nfd.result import SIZES
from torch_depthmup.diagnostics.nfd.setting import Setting
from torch_depthmup.diagnostics.nfd.simulate import memory_estimate, simulate
from torch_depthmup.diagnostics.shared.digits import digits
from torch_depthmup.rules import RULES
from torch_depthmup.tables import columns

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Simulates the training of an infinitely wide residual network by Neural Feature Dynamics, trains real networks of the
same architecture beside it with this package's SGD, on a few of scikit-learn's scanned digits (odd against even), and
prints how far they are apart in standard errors over seeds. Writes a figure with both. Under a minute on two cores.
For a network of your own write nfd.predict(make, ...) in Python: torch_depthmup.diagnostics.nfd."""

COUPLING = "decoupled: gradient independence, beside networks with independent backward matrices (default reused)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``depthmup nfd``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--depth", type=positive, default=16, help="number of blocks (default 16)")
    parser.add_argument(
        "--base-depth", type=positive, default=4, help="depth of the base that the rule scales from (default 4)"
    )
    parser.add_argument("--block-layers", type=int, choices=(1, 2), default=2, help="layers of a block (default 2)")
    parser.add_argument(
        "--rule", choices=sorted(RULES), default="depth-mup-corrected", help="default: depth-mup-corrected"
    )
    parser.add_argument("--activation", choices=sorted(ACTIVATIONS), default="tanh", help="default: tanh")
    parser.add_argument(
        "--lr", type=rate, default=1.0, help="learning rate of the base, in units of the width (default 1)"
    )
    parser.add_argument("--steps", type=int, default=4, help="SGD steps (default 4)")
    parser.add_argument("--samples", type=positive, default=4, help="digits to train on (default 4)")
    parser.add_argument("--width", type=positive, default=4096, help="width of the simulation (default 4096)")
    parser.add_argument("--network-width", type=positive, default=512, help="width of the networks (default 512)")
    parser.add_argument("--seeds", type=positive, default=8, help="of each (default 8)")
    parser.add_argument("--coupling", choices=("reused", "decoupled"), default="reused", help=COUPLING)
    parser.add_argument("--out", type=figure, default=Path("nfd.png"), metavar="FILE", help="default: nfd.png")
    parser.add_argument("--verbose", action="store_true", help="also print the memory that the simulation will take")


def run(options: argparse.Namespace) -> int:
    """Simulates, trains, compares, prints, draws. Returns the exit code."""
    setting = Setting(
        depth=options.depth, steps=options.steps, lr=options.lr, base_depth=options.base_depth,
        block_layers=options.block_layers, activation=options.activation, rule=options.rule,
    )  # fmt: skip
    images, labels = digits()
    inputs = images[: options.samples] / images[: options.samples].square().mean(1, keepdim=True).sqrt()
    targets = 1.0 - 2.0 * (labels[: options.samples] % 2)
    if options.verbose:
        memory = memory_estimate(setting, len(inputs), 0, options.width, options.seeds)
        print(f"the simulation takes about {memory / 1e6:.0f} MB")
    start = time.perf_counter()
    predicted = simulate(
        setting, inputs, targets, width=options.width, seeds=options.seeds, coupling=options.coupling, progress=True
    )
    simulated = time.perf_counter()
    measured = measure(
        setting, inputs, targets, width=options.network_width, seeds=options.seeds,
        backward="tied" if options.coupling == "reused" else "independent",
    )  # fmt: skip
    trained = time.perf_counter()
    comparison = compare(predicted, measured)
    rows = []
    for name in ("losses", *SIZES):
        step = -1 if name != "gradient_moment" or options.steps == 0 else -2
        values = [float(result.mean(name)[step].mean()) for result in (predicted, measured)]
        z = comparison.z(name)
        largest = float(z[torch.isfinite(z)].abs().max())
        rows.append((name.replace("_", " "), (*(f"{value:.4f}" for value in values), f"{largest:.1f}")))
    header = ("quantity", f"predicted, n={options.width}", f"measured, n={options.network_width}", "largest |z|")
    print("\n".join([f"after {options.steps} steps, mean over layers", *columns(header, rows)]))
    print(f"Neural Feature Dynamics {comparison.verdict}")
    comparison_figure(comparison).savefig(options.out, dpi=130)
    print(
        f"simulation {simulated - start:.1f} s, {options.seeds} networks {trained - simulated:.1f} s; "
        f"figure {options.out}"
    )
    return 0
