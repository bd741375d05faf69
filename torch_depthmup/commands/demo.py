"""``depthmup demo``: does a learning rate tuned at depth 4 work at depth 64, under which rule? On pictures."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from torch_depthmup.commands.sources import positive
from torch_depthmup.commands.sweep import COMPARED
from torch_depthmup.diagnostics.plots import drift_figure, transfer_figure
from torch_depthmup.diagnostics.shared.digits import DigitsResNet
from torch_depthmup.diagnostics.shared.pictures import OnlineTraining, cifar10, distorted_digits
from torch_depthmup.diagnostics.shared.training import OPTIMIZERS, own_random_state
from torch_depthmup.diagnostics.transfer.result import Sweep
from torch_depthmup.diagnostics.transfer.sweep import transfer_sweep
from torch_depthmup.rules import RULES
from torch_depthmup.scaling.apply import parametrize
from torch_depthmup.tables import Table, columns, number

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Trains residual networks of two-layer blocks at several depths, over a grid of learning rates, under several rules, on
scikit-learn's scanned digits, which are rotated, scaled, sheared, shifted and made noisy anew in every batch, so that
they cannot be memorised. Reports for each rule where the best learning rate is at each depth, by how many factors of
two it moves, what the learning rate tuned at the shallowest depth gives at the deepest (the online loss: the mean over
the last fifth of the steps, on samples that are new), and the loss on held-out pictures. Writes two figures (PNG) and
all runs (JSON). Under two minutes on two cores; --quick under thirty seconds."""

GRIDS = {"adam": (-12, -5), "adamw": (-12, -5), "sgd": (-9, 0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``depthmup demo``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="fewer learning rates, steps and seeds; depths 4 and 16")
    parser.add_argument(
        "--depths", type=positive, nargs="+", metavar="L", help="default: 4 16 64; the least is the base"
    )
    parser.add_argument("--rules", nargs="+", choices=sorted(RULES), metavar="RULE", help=f"of {', '.join(RULES)}")
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits", help="default: digits")
    parser.add_argument(
        "--path", type=Path, metavar="PATH", help="CIFAR-10 as a .npz file or a folder (default: torchvision loads it)"
    )
    parser.add_argument("--seeds", type=positive, metavar="N", help="runs for each point of the grid (default 2)")
    parser.add_argument("--steps", type=positive, metavar="N", help="optimizer steps of a run (default 80)")
    parser.add_argument("--width", type=positive, default=64, metavar="N", help="width of the network (default 64)")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam", help="default: adam")
    parser.add_argument("--out", type=Path, default=Path("depthmup-demo"), metavar="DIR", help="default: depthmup-demo")


def run(options: argparse.Namespace) -> int:
    """Runs the sweep, prints its table, writes figure and JSON. Returns the exit code."""
    quick = options.quick
    depths = sorted(set(options.depths or ((4, 16) if quick else (4, 16, 64))))
    steps, seeds = options.steps or (40 if quick else 80), options.seeds or 2
    low, high = GRIDS[options.optimizer]
    lrs = [2.0**i for i in range(low, high + 1, 2 if quick else 1)]
    rules = list(dict.fromkeys(options.rules or COMPARED))
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = cifar10(options.path) if options.data == "cifar10" else distorted_digits()
    train = OnlineTraining(pictures, optimizer=options.optimizer, steps=steps)
    make = _Network(options.width, pictures.images.shape[1])
    start = time.perf_counter()
    sweep = transfer_sweep(
        make, train, depths=depths, lrs=lrs, rules=rules, seeds=seeds, example_inputs=pictures.images[:16],
    )  # fmt: skip
    print(sweep)
    print("\n".join(["", *columns(*_held_out(sweep, make, train))]))
    seconds = time.perf_counter() - start
    what = f"{options.data}, width {options.width}, {options.optimizer}, {steps} steps, {seeds} seeds"
    for name, figure in (("transfer", transfer_figure), ("drift", drift_figure)):
        figure(sweep, title=what).savefig(options.out / f"{name}.png", dpi=130)
    (options.out / "transfer.json").write_text(json.dumps(_summary(sweep, vars(options)), indent=1, allow_nan=False))
    print(
        f"{len(sweep.runs)} runs in {seconds:.0f} s on {os.cpu_count()} cores; "
        f"figures {options.out / 'transfer.png'} and drift.png, runs transfer.json"
    )
    return 0


class _Network:
    """depth -> network, as a value that workers can unpickle."""

    def __init__(self, width: int, pixels: int):
        self.width, self.pixels = width, pixels

    def __call__(self, depth: int) -> DigitsResNet:
        return DigitsResNet(depth, self.width, self.pixels)


def _held_out(sweep: Sweep, make: _Network, train: OnlineTraining) -> Table:
    """Loss and accuracy on held-out pictures at the deepest depth, with the learning rate tuned at the shallowest."""
    base, deepest = sweep.depths[0], sweep.depths[-1]
    rows: list[tuple[str, tuple[str, ...]]] = []
    for rule in sweep.rules:
        lr = sweep.optimum(rule, base).lr
        cells = ("–", "–")
        if math.isfinite(lr) and all(map(math.isfinite, sweep.transferred(rule, deepest))):
            with own_random_state():
                torch.manual_seed(0)
                model, shallow = make(deepest), make(base)
                parametrize(model, base=shallow, example_inputs=train.pictures.images[:16], rule=rule)
                train(model, lr, seed=0)
                loss, right = train.held_out(model)
            cells = (number(loss), f"{right:.1%}")
        rows.append((rule, cells))
    return (f"held out, depth {deepest} with lr of {base}", "loss", "accuracy"), rows


def _summary(sweep: Sweep, options: dict[str, Any]) -> dict[str, Any]:
    rules = {
        rule: {
            "best_lr": {depth: sweep.optimum(rule, depth).lr for depth in sweep.depths},
            "drift_factors_of_two": {depth: str(sweep.drift(rule, depth)) for depth in sweep.depths},
            "transferred_loss": {depth: sweep.transferred(rule, depth) for depth in sweep.depths},
            "regret": {depth: sweep.regret(rule, depth).value for depth in sweep.depths},
        }
        for rule in sweep.rules
    }
    told = {key: value for key, value in options.items() if not key.startswith("command")}
    settings = {key: value for key, value in told.items() if isinstance(value, int | str | list)}
    return {"settings": settings, "rules": _finite(rules), "runs": [json.loads(run.to_json()) for run in sweep.runs]}


def _finite(value: Any) -> Any:
    """JSON has no infinity: what diverged is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
