"""``depthmup``: the command line. Each command's arguments and work live beside what it runs."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from functools import partial
from typing import NoReturn

__all__ = ["main"]

COMMANDS = {
    "branches": ("torch_depthmup.commands.branches", "find the residual branches of your network"),
    "plan": ("torch_depthmup.commands.plan", "what a rule does to each branch and parameter of your network"),
    "check": (
        "torch_depthmup.commands.check",
        "train briefly over depths, and hold what moved against the rule",
    ),
    "sweep": ("torch_depthmup.commands.sweep", "does the learning rate transfer over depths of your network?"),
    "demo": ("torch_depthmup.commands.demo", "the same on digits, at three depths"),
    "nfd": ("torch_depthmup.commands.nfd", "predict the training of a wide network, and train one beside it"),
}
"""Command -> the module with its ``add_arguments(parser)`` and ``run(options) -> exit code``, and a line of help."""


class _Parser(argparse.ArgumentParser):
    """Bad arguments take one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit code: 0, or 2 for what the user can mend."""
    parser = _Parser(prog="depthmup", description="Learning rates that transfer in depth, for residual networks.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    chosen = next((a for a in (sys.argv[1:] if arguments is None else arguments) if a in COMMANDS), None)
    for name, (module, help_) in COMMANDS.items():
        command = commands.add_parser(name, help=help_)
        if name == chosen:  # a command's libraries are imported for that command only
            try:
                room = importlib.import_module(module)
            except ImportError as error:
                parser.exit(2, f"depthmup {name}: {error}\n")
            room.add_arguments(command)
            command.set_defaults(run=room.run)
    options = parser.parse_args(arguments)
    options.command_line = shlex.join(["depthmup", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_one_line, options.command)
            return int(options.run(options))
    except (ValueError, OSError, ImportError, BrokenExecutor) as error:  # DepthMuPError is a ValueError
        print(f"depthmup {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"depthmup {options.command}: interrupted", file=sys.stderr)
        return 130


def _one_line(command: str, message: Warning | str, *_: object, **__: object) -> None:
    print(f"depthmup {command}: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
