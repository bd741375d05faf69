"""``depthmup plan``: what a rule does to a user's network."""

from __future__ import annotations

import argparse

import torch

from torch_depthmup.commands import page, sources
from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.diagnostics.plots import initial_figure
from torch_depthmup.errors import DepthMuPError, ignores_depth
from torch_depthmup.rules import RULES
from torch_depthmup.scaling.apply import parametrize
from torch_depthmup.scaling.plan import branch_rows, parameter_rows
from torch_depthmup.tracing.branches import left_alone_rows

__all__ = ["add_arguments", "run"]

DESCRIPTION = """\
Builds the network and its base, parametrizes it, prints the multipliers of every branch and parameter, and writes a
page with the tables and the sizes along the network before and after."""

EPILOG = "example: depthmup plan my_net:make my_net:data --depth 32 --base-depth 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``depthmup plan``."""
    sources.add_sources(parser, "plan")
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "--depth", type=sources.positive, required=True, metavar="L", help="the factory's first argument"
    )
    parser.add_argument("--base-depth", type=sources.positive, required=True, metavar="L", help="that of the base")
    parser.add_argument("--base-width", type=sources.positive, metavar="N", help="the base's width (default: the same)")
    parser.add_argument(
        "--rule", choices=sorted(RULES), default="depth-mup-corrected", help="default: depth-mup-corrected"
    )
    parser.add_argument("--how", choices=("fold", "wrap"), default="fold", help="default: fold")


def run(options: argparse.Namespace) -> int:
    """Prints the plan, writes the page. Returns the exit code."""
    make = sources.factory(options.model, options.width)
    inputs = sources.examples(sources.data(options.data)[0])
    torch.manual_seed(0)
    base, model = make(options.base_depth, options.base_width), make(options.depth)
    seen = {}
    for label, network in (
        (f"base, depth {options.base_depth}", base),
        (f"depth {options.depth} as built", model),
    ):
        seen[label] = _recorded(network, inputs)
    plan = parametrize(model, base=base, example_inputs=inputs, rule=options.rule, how=options.how)
    if options.depth != options.base_depth and all(stream.depth_multiplier == 1 for stream in plan.streams):
        raise DepthMuPError(ignores_depth(len(plan.branches), options.base_depth, options.depth))
    seen[f"depth {options.depth}, {options.rule}"] = _recorded(model, inputs)
    print(plan)
    streams = [
        (
            f"{i}",
            f"{s.additions}",
            f"{s.base_additions}",
            f"{s.depth_multiplier:.4g}",
            f"{plan.rule.branch_multiplier(s.depth_multiplier):.4g}",
        )
        for i, s in enumerate(plan.streams)
    ]
    branches, parameters = branch_rows(plan), parameter_rows(plan)
    blocks = [
        page.paragraph(
            f"Rule {plan.rule.name}, how={plan.how!r}: {len(plan.branches)} branches, {len(plan.entries)} parameters. "
            "The multipliers were measured on the network after they were set."
        ),
        page.table(("stream", "additions", "in the base", "depth multiplier", "branch multiplier"), streams),
        page.figure(
            lambda: initial_figure(seen),
            "Root mean squares along the network at initialization: the residual stream after each addition, and what "
            "each branch adds, for the base, for the network as the factory built it, and under the rule.",
        ),
        page.heading("Branches"),
        page.named_table(*branches),
        page.heading("Parameters"),
        page.named_table(*parameters),
        page.paragraph("Each number multiplies what the optimizer is given: lr, weight decay, eps.", quiet=True),
        page.heading("Sums that are left alone"),
        page.named_table(*left_alone_rows(plan.left_alone)),
        page.following(
            "Train with it: dm.parametrize(model, base=base, example_inputs=inputs), then dm.AdamW(model, lr=...).",
            "See whether what moves follows the rule: "
            f"depthmup check {options.model} {options.data} --depths {options.base_depth} {2 * options.base_depth} "
            f"{4 * options.base_depth} {8 * options.base_depth}",
        ),
    ]
    sources.write(options.out, page.page(f"Plan for {options.model}", blocks, command=options.command_line))
    print(f"\nreport: {options.out}")
    return 0


def _recorded(model: torch.nn.Module, inputs: object) -> FeatureMonitor:
    with FeatureMonitor(model, inputs) as monitor:
        monitor.record(0)
    return monitor
