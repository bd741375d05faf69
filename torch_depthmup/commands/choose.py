"""``depthmup choose``: which rule for this network, and which learning rate at a depth that was not trained."""

from __future__ import annotations

import argparse
import math

from torch_depthmup.commands import page, sources
from torch_depthmup.commands import sweep as sweeping
from torch_depthmup.diagnostics.plots import drift_figure, transfer_figure
from torch_depthmup.diagnostics.transfer.optimum import Estimate
from torch_depthmup.diagnostics.transfer.result import Sweep
from torch_depthmup.errors import MeasurementError
from torch_depthmup.tables import Table, columns

__all__ = ["add_arguments", "predictions", "recommendation", "run"]

DESCRIPTION = """\
Runs the sweep at small depths under several rules, fits how the best learning rate drifts that remains under each (a
power of depth, checked on the deepest depth, which is left out of the fit), and extrapolates to the depth that you want
to train. Says which rule to take there, and which learning rate, in units of the base's."""

EPILOG = "example: depthmup choose my_net:make my_net:data --depths 2 4 8 --lrs 2^-12..2^-4 --target 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``depthmup choose``."""
    sweeping.add_arguments(parser, "choose")
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("--target", type=sources.positive, required=True, metavar="L", help="the depth to train at")


def run(options: argparse.Namespace) -> int:
    """Runs what is missing of the sweep, prints the choice, writes the page. Returns the exit code."""
    sweep, _ = sweeping.swept(options)
    table, advice = predictions(sweep, options.target), recommendation(sweep, options.target)
    print(sweep)
    print("\n".join(["", *columns(*table), "", advice]))
    blocks = [
        page.paragraph(advice),
        page.heading(f"At depth {options.target}"),
        page.named_table(*table),
        page.figure(lambda: drift_figure(sweep), "How the best learning rate moves with depth, and what it costs."),
        page.figure(lambda: transfer_figure(sweep), "Loss after training against the learning rate."),
        page.heading("Optima"),
        page.named_table(*sweep.table()),
        page.following(
            "Parametrize the deep network with the shallowest as base= and this rule, and train it with this learning "
            "rate. Train once at half and at twice the learning rate if the error above is large.",
        ),
    ]
    sources.write(options.out, page.page(f"Rule for {options.model}", blocks, command=options.command_line))
    print(f"report {options.out}")
    return 0


def predictions(sweep: Sweep, target: int) -> Table:
    """For each rule the drift's exponent, the best learning rate at the target depth, and whether the fit held."""
    rows: list[tuple[str, tuple[str, ...]]] = []
    for rule in sweep.rules:
        try:
            law = sweep.power_law(rule)
        except MeasurementError:
            rows.append((rule, ("–", "–", "too few optima")))
            continue
        e, at = law.exponent, law.at(target)
        held = "predicted" if law.predicts_deepest else "missed"
        rows.append((rule, (f"{e.value:+.2f}±{e.error:.2f}", f"2^{at.value:.1f}±{at.error:.1f}", held)))
    return ("rule", "drift: depth^", f"best lr at {target}", f"depth {sweep.depths[-1]} left out"), rows


def recommendation(sweep: Sweep, target: int) -> str:
    """The rule with the lowest loss at the deepest depth among those whose drift is known, and its learning rate."""
    deepest = sweep.depths[-1]
    candidates: dict[str, tuple[float, Estimate]] = {}
    for rule in sweep.rules:
        try:
            law = sweep.power_law(rule)
        except MeasurementError:
            continue
        if law.predicts_deepest and math.isfinite(sweep.optimum(rule, deepest).loss):
            candidates[rule] = (sweep.optimum(rule, deepest).loss, law.at(target))
    if not candidates:
        return (
            "No rule can be recommended: under none is the best learning rate inside the grid at three depths and a "
            "power of depth. Use more --depths, a wider range of --lrs or more --seeds."
        )
    best = min(candidates, key=lambda rule: candidates[rule][0])
    at = candidates[best][1]
    text = (
        f"Take {best}: it has the lowest loss at depth {deepest}. At depth {target} train with a learning rate of "
        f"{2**at.value:.2g} (from {2 ** (at.value - at.error):.2g} to {2 ** (at.value + at.error):.2g})."
    )
    if at.error > 1:
        text += " That is known to no better than a factor of two: more seeds or depths would tell."
    return text
