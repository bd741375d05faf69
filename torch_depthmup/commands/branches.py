"""``depthmup branches``: the residual branches of a user's network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from torch_depthmup.commands import page, sources
from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.diagnostics.plots import initial_figure
from torch_depthmup.running import normalise_name
from torch_depthmup.tables import Table, columns, fold_names
from torch_depthmup.tracing.branches import Branch, find_branches, left_alone_lines, left_alone_rows, roles

__all__ = ["add_arguments", "branch_rows", "parameter_rows", "run"]

DESCRIPTION = """\
Builds the network at one depth, finds its residual branches on one forward pass of the first samples, prints them, and
writes a page with the table and the sizes along the network at initialization."""

EPILOG = "example: depthmup branches my_net:make my_net:data --depth 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``depthmup branches``."""
    sources.add_sources(parser, "branches")
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "--depth", type=sources.positive, required=True, metavar="L", help="the factory's first argument"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the branches, writes the page. Returns the exit code."""
    make = sources.factory(options.model, options.width)
    inputs = sources.examples(sources.data(options.data)[0])
    torch.manual_seed(0)
    model = make(options.depth)
    with FeatureMonitor(model, inputs) as monitor:
        monitor.record(0)
    depths = {b.stream: b.additions for b in monitor.branches}
    summary = f"{len(monitor.branches)} residual branches in {len(depths)} stream{'s' if len(depths) > 1 else ''}"
    summary += f" of {', '.join(map(str, depths.values()))} additions"
    branches, parameters = branch_rows(monitor.branches), parameter_rows(monitor.branches, model)
    left_alone = find_branches(model, inputs, explain=True).left_alone
    print(
        "\n".join(
            [summary, "", *columns(*branches), "", *columns(*parameters), "", *left_alone_lines(left_alone)]
        ).rstrip()
    )
    blocks = [
        page.paragraph(f"{summary}, found on one forward pass of {sources.EXAMPLES} samples."),
        page.figure(
            lambda: initial_figure({f"depth {options.depth}": monitor}),
            "Root mean squares along the network at initialization, as the factory built it: the residual stream after "
            "each addition, and what each branch adds.",
        ),
        page.heading("Branches"),
        page.named_table(*branches),
        page.heading("Their parameters"),
        page.named_table(*parameters),
        page.paragraph(
            "Inner parameters come before a branch's last weight operation, outer ones belong to it. A branch is "
            "linear in its carrier, into which a multiplier can be folded.",
            quiet=True,
        ),
        page.heading("Sums that are left alone"),
        page.named_table(*left_alone_rows(left_alone)),
        page.following(
            "Is a branch missing, or one too many? Name it in code: dm.parametrize(..., branches=['<module>']) or "
            "exclude=['<module>'].",
            f"What a rule does to them: depthmup plan {options.model} {options.data} --depth {options.depth} "
            f"--base-depth {max(1, options.depth // 4)}",
        ),
    ]
    sources.write(options.out, page.page(f"Residual branches of {options.model}", blocks, command=options.command_line))
    print(f"\nreport: {options.out}")
    return 0


def branch_rows(branches: Sequence[Branch]) -> Table:
    """Streams, skips and levels of weight operations, repeated blocks folded."""
    cells: dict[str, tuple[str, ...]] = {b.name: (f"{b.stream}", b.skip, f"{b.levels}") for b in branches}
    return ("branch", "stream", "skip", "levels"), fold_names(cells)


def parameter_rows(branches: Sequence[Branch], model: nn.Module) -> Table:
    """The parameters in the branches and their sides, in the model's order, repeated blocks folded."""
    places = roles(branches)
    carriers = {name for branch in branches for name in branch.carrier}
    order = [normalise_name(name) for name, _ in model.named_parameters()]
    cells: dict[str, tuple[str, ...]] = {
        name: (places[name][1], "carrier" if name in carriers else "") for name in order if name in places
    }
    return ("parameter", "side", ""), fold_names(cells)
