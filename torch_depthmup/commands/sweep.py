"""``depthmup sweep``: does the learning rate of a user's network transfer over depth?"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from torch_depthmup.commands import page, sources
from torch_depthmup.diagnostics.plots import drift_figure, transfer_figure
from torch_depthmup.diagnostics.shared.training import OPTIMIZERS, Training
from torch_depthmup.diagnostics.transfer.result import Sweep
from torch_depthmup.diagnostics.transfer.sweep import transfer_sweep
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.rules import RULES

__all__ = ["COMPARED", "add_arguments", "learning_rates", "run", "swept"]

DESCRIPTION = """\
Trains the network at several depths over a grid of learning rates, under several rules and seeds, in a process for
each core. Prints where the best learning rate is at each depth, how far it moves, and what tuning shallow costs, and
writes a page. Each finished run is kept at once: the same command takes up a sweep that was stopped."""

EPILOG = "example: depthmup sweep my_net:make my_net:data --depths 4 16 --lrs 2^-12..2^-4"
COMPARED = ("mup", "depth-mup", "depth-mup-corrected", "complete-p")
MOST = 1000  # learning rates in one range: beyond it is a slip


def add_arguments(parser: argparse.ArgumentParser, command: str = "sweep") -> None:
    """The arguments of ``depthmup sweep``, and of ``depthmup choose``."""
    sources.add_sources(parser, command)
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "--depths", type=sources.positive, nargs="+", required=True, metavar="L", help="the least is the base"
    )
    parser.add_argument(
        "--lrs", type=learning_rates, nargs="+", required=True, metavar="LR",
        help="numbers, powers such as 2^-8, or ranges of doublings such as 2^-12..2^-4",
    )  # fmt: skip
    parser.add_argument(
        "--rules", nargs="+", choices=sorted(RULES), default=COMPARED, metavar="RULE", help=", ".join(RULES)
    )
    parser.add_argument(
        "--seeds", type=sources.positive, default=3, metavar="N", help="runs for each point (default 3)"
    )
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam", help="default: adam")
    parser.add_argument("--steps", type=sources.positive, default=60, metavar="N", help="optimizer steps (default 60)")
    parser.add_argument("--batch-size", type=sources.positive, default=128, metavar="N", help="default: 128")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="finished runs (default: the report's name, .jsonl)")


def learning_rates(text: str) -> list[float]:
    """``0.01``, ``2^-8``, or all doublings from ``2^-12..2^-4``."""
    low, dots, high = text.partition("..")
    if high.startswith("."):
        raise argparse.ArgumentTypeError(f"a range must have two dots, as in 2^-12..2^-4, not three: {text!r}")
    ends = [_number(text, part) for part in ((low, high) if dots else (low,))]
    if dots and not (ends[0] < ends[1] and math.log2(ends[1] / ends[0]) < MOST):
        raise argparse.ArgumentTypeError(f"must go from a smaller to a larger number, not {text!r}")
    count = math.floor(math.log2(ends[-1] / ends[0]) + 1e-9) + 1
    return [ends[0] * 2.0**i for i in range(count)]


def _number(text: str, part: str) -> float:
    base, power, exponent = part.partition("^")
    try:
        value = float(base) ** float(exponent) if power else float(base)
    except (ValueError, OverflowError, ZeroDivisionError):
        value = math.nan
    if isinstance(value, complex) or not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive numbers such as 0.01, 2^-8 or 2^-12..2^-4, not {text!r}")
    return value


def swept(options: argparse.Namespace) -> tuple[Sweep, Path]:
    """Runs what is missing of the sweep. Returns it and the file of its runs.

    Raises:
        DepthMuPError: the report would overwrite the runs.
    """
    make = sources.factory(options.model, options.width)
    train = Training(
        *sources.data(options.data), optimizer=options.optimizer, steps=options.steps, batch_size=options.batch_size
    )
    runs = options.runs or options.out.with_suffix(".jsonl")
    if runs.absolute() == options.out.absolute():
        raise DepthMuPError(f"the report and the finished runs cannot be one file, {runs}. Give --out another name")
    runs.parent.mkdir(parents=True, exist_ok=True)
    lrs = sorted({lr for part in options.lrs for lr in part})
    sweep = transfer_sweep(
        make, train, depths=sorted(set(options.depths)), lrs=lrs, rules=list(dict.fromkeys(options.rules)),
        seeds=options.seeds, path=runs,
    )  # fmt: skip
    return sweep, runs


def run(options: argparse.Namespace) -> int:
    """Runs what is missing of the sweep, prints its table, writes the page. Returns the exit code."""
    sweep, runs = swept(options)
    print(sweep)
    text = page.page(f"Learning-rate transfer of {options.model}", _blocks(sweep), command=options.command_line)
    sources.write(options.out, text)
    print(f"report {options.out}, runs {runs}")
    return 0


def _next(sweep: Sweep) -> list[str]:
    steps = []
    if any(row["at_grid_end"] for row in sweep.summary()):
        steps.append("Some optima lie at an end of the grid: run the same command with more --lrs; finished runs stay.")
    if "do not tell it" in sweep.reading:
        steps.append("Some rules are not told apart: run the same command with more --seeds; finished runs stay.")
    steps.append("Tune at the shallowest depth, parametrize the deep network with that as base=, and train it.")
    return steps


def _blocks(sweep: Sweep) -> list[str]:
    base = sweep.depths[0]
    diverged = sum(run.diverged for run in sweep.runs)
    seconds = sum(run.seconds for run in sweep.runs)
    return [
        page.paragraph(sweep.reading),
        page.figure(
            lambda: transfer_figure(sweep),
            "Loss after training against the learning rate. The line is the median over seeds, dots are seeds; it "
            "ends where the median run diverged. A ring marks each depth's best learning rate, the dotted line the one "
            f"tuned at depth {base}.",
        ),
        page.figure(
            lambda: drift_figure(sweep),
            f"Left, how the fitted optimum moves, with standard errors. Right, the loss with the learning rate of "
            f"depth {base} (solid) and with the best one (dashed): the gap is the regret.",
        ),
        page.heading("Optima"),
        page.named_table(*sweep.table()),
        page.paragraph(
            "* at an end of the grid: the optimum may lie beyond it, and what follows from it is a bound (< or >). "
            "log2 lr is where a curve through all runs is smallest. Losses are medians over seeds; ± is a standard "
            "error. Diverges from: the smallest learning rate at which a run diverged.",
            quiet=True,
        ),
        page.following(*_next(sweep)),
        page.paragraph(f"{len(sweep.runs)} runs, {diverged} of them diverged; {seconds:.0f} s of work.", quiet=True),
    ]
