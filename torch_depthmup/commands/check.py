"""``depthmup check``: the coordinate check of a user's network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch_depthmup.commands import page, sources
from torch_depthmup.diagnostics.coordinates.check import CoordinateCheck, coordinate_check
from torch_depthmup.diagnostics.coordinates.slopes import QUANTITIES
from torch_depthmup.diagnostics.plots import coordinate_figure
from torch_depthmup.diagnostics.shared.training import OPTIMIZERS
from torch_depthmup.rules import RULES
from torch_depthmup.tables import number

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Trains the network for a few steps at each depth (and width), and holds the slopes of what moved, in log-log, against
the exponents that the rule predicts. Prints the verdicts, says what is wrong where something is, and writes a page.
Adds seeds by itself where the first cannot tell. Exit code 0: all holds; 1: something is broken; 3: cannot tell."""

EPILOG = "example: depthmup check my_net:make my_net:data --depths 4 8 16 32"
EXIT = {"holds": 0, "broken": 1, "cannot tell": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``depthmup check``."""
    sources.add_sources(parser, "check")
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "--depths",
        type=sources.positive,
        nargs="+",
        required=True,
        metavar="L",
        help="at least two; the least is the base",
    )
    parser.add_argument("--widths", type=sources.positive, nargs="+", metavar="N", help="to check the width as well")
    parser.add_argument(
        "--rule", choices=sorted(RULES), default="depth-mup-corrected", help="default: depth-mup-corrected"
    )
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam", help="default: adam")
    parser.add_argument("--lr", type=sources.rate, default=1e-3, help="learning rate of the base (default 0.001)")
    parser.add_argument("--steps", type=sources.positive, default=3, metavar="N", help="training steps (default 3)")
    parser.add_argument("--seeds", type=sources.positive, default=3, metavar="N", help="default: 3")
    parser.add_argument("--batch-size", type=sources.positive, default=128, metavar="N", help="default: 128")


def run(options: argparse.Namespace) -> int:
    """Runs the check, prints it, writes the page. Returns the exit code."""
    make = sources.factory(options.model, options.width, options.widths)
    inputs, targets = sources.data(options.data)
    check = coordinate_check(
        make, sources.batches(inputs, targets, options.batch_size, options.steps), depths=options.depths,
        widths=options.widths, rule=options.rule, optimizer=options.optimizer, lr=options.lr, steps=options.steps,
        seeds=options.seeds, progress=True,
    )  # fmt: skip
    print(check)
    text = page.page(f"Coordinate check of {options.model}", _blocks(check, options), command=options.command_line)
    sources.write(options.out, text)
    print(f"\nreport: {options.out}")
    return EXIT[check.verdict]


def _blocks(check: CoordinateCheck, options: argparse.Namespace) -> list[str]:
    rows = [
        (
            s.words, s.verdict, s.axis, f"{s.measured:+.2f}", f"{s.low:+.2f} to {s.high:+.2f}",
            s.prediction,
        )
        for s in check.slopes
    ]  # fmt: skip
    measured = {s.quantity for s in check.slopes}
    sizes = {quantity: check.sizes(quantity) for quantity in QUANTITIES if quantity in measured}
    points = sorted(next(iter(sizes.values())), key=lambda point: (point[0], point[1] or 0, point[2]))
    grid = f"depths {_listed(options.depths)}{f', widths {_listed(options.widths)}' if options.widths else ''}"
    return [
        page.paragraph(
            f"Rule {check.rule.name} with {options.optimizer} at learning rate {options.lr:g}, {options.steps} steps, "
            f"{check.slopes[0].seeds} seeds, {grid}. Verdict: {check.verdict}. {check.advice}"
        ),
        page.listing(check.mistakes),
        page.table(("quantity", "verdict", "axis", "slope", "95 % interval", "rule"), rows),
        page.figure(
            lambda: coordinate_figure(check),
            f"Sizes against depth{' and width' if options.widths else ''}: marks are seeds, lines their means, dashed "
            "lines the rule's slopes. Last row: along the network. Depth is colour.",
        ),
        page.heading("Sizes"),
        page.table(
            ("depth", "width", "seed", *sizes),
            [
                (f"{d}", f"{w or options.width or '–'}", f"{s}", *(number(of[d, w, s]) for of in sizes.values()))
                for d, w, s in points
            ],
        ),
        page.paragraph(
            "Root mean squares over layers. " + "; ".join(f"{name}: {QUANTITIES[name]}" for name in sizes) + ". "
            "Checked are the branches: their multiplier and the learning rates of what is in them. Stem, head, norms "
            "outside the branches, eps and weight decay are not.",
            quiet=True,
        ),
        page.following(*_next(check, options)),
    ]


def _next(check: CoordinateCheck, options: argparse.Namespace) -> list[str]:
    base = f"{options.model} {options.data}"
    depths = " ".join(map(str, sorted(set(options.depths))))
    if check.verdict == "holds":
        return [f"See whether the learning rate transfers: depthmup sweep {base} --depths {depths} --lrs 2^-12..2^-4"]
    if check.verdict == "broken":
        return [
            "Compare your multipliers with those of the plan: "
            f"depthmup plan {base} --depth {max(options.depths)} --base-depth {min(options.depths)}",
            "A smaller --lr tells early training from a step that is too large.",
        ]
    needed = max(slope.needed for slope in check.slopes) or 3
    return [f"More seeds would tell: depthmup check {base} --depths {depths} --seeds {needed}"]


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(set(values))))
