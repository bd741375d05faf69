"""``depthmup branches``: the residual branches of a user's network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from torch_depthmup.commands import sources
from torch_depthmup.diagnostics import html
from torch_depthmup.diagnostics.feature_plots import initial_figure
from torch_depthmup.diagnostics.monitor import FeatureMonitor
from torch_depthmup.printing import columns, fold_names
from torch_depthmup.tracing import Branch

__all__ = ["add_arguments", "run"]

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
    with FeatureMonitor(make(options.depth), inputs) as monitor:
        monitor.record(0)
    header, rows = branch_table(monitor.branches)
    depths = {b.stream: b.depth for b in monitor.branches}
    summary = f"{len(monitor.branches)} residual branches in {len(depths)} stream{'s' if len(depths) > 1 else ''}"
    summary += f" of depth {', '.join(map(str, depths.values()))}"
    print("\n".join([summary, "", *columns(header, rows)]))
    blocks = [
        html.paragraph(f"{summary}, found on one forward pass of {sources.EXAMPLES} samples."),
        html.figure(
            lambda: initial_figure({f"depth {options.depth}": monitor}),
            "Root mean squares along the network at initialization, as the factory built it: the residual stream after "
            "each addition, and what each branch adds.",
        ),
        html.heading("Branches"),
        html.table(header, [(name, *cells) for name, cells in rows]),
        html.paragraph(
            "Inner parameters come before a branch's last weight operation, outer ones belong to it.", quiet=True
        ),
    ]
    sources.write(options.out, html.page(f"Residual branches of {options.model}", blocks, command=options.command_line))
    print(f"\nreport: {options.out}")
    return 0


def branch_table(branches: Sequence[Branch]) -> tuple[tuple[str, ...], list[tuple[str, tuple[str, ...]]]]:
    """Header and rows, repeated blocks folded; parameters by their names inside the branch's module."""
    cells: dict[str, tuple[str, ...]] = {
        b.name: (f"{b.stream}", b.skip, f"{b.levels}", _short(b, b.inner), _short(b, b.outer)) for b in branches
    }
    return ("branch", "stream", "skip", "levels", "inner", "outer"), fold_names(cells)


def _short(branch: Branch, names: tuple[str, ...]) -> str:
    prefix = f"{branch.name}."
    return ", ".join(name.removeprefix(prefix) for name in names) or "-"
