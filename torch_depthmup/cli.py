"""``depthmup``: the command line. Each command's arguments and work live beside what it runs."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from torch_depthmup.errors import DepthMuPError

__all__ = ["main"]

COMMANDS = {
    "branches": ("torch_depthmup.commands.branches", "find the residual branches of your network"),
    "plan": ("torch_depthmup.commands.plan", "what a rule does to each branch and parameter of your network"),
    "check": (
        "torch_depthmup.commands.check",
        "train briefly over depths, and hold what moved against the rule",
    ),
    "sweep": ("torch_depthmup.commands.sweep", "does the learning rate transfer over depths of your network?"),
    "choose": ("torch_depthmup.commands.choose", "which rule and learning rate for a depth that is not trained yet?"),
    "demo": ("torch_depthmup.commands.demo", "the same on digits, at three depths"),
    "nfd": ("torch_depthmup.commands.nfd", "predict the training of a wide network, and train one beside it"),
}
"""Command -> the module with its ``add_arguments(parser)`` and ``run(options) -> exit code``, and a line of help."""


class _Parser(argparse.ArgumentParser):
    """Bad arguments take one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit code: its own verdict, 2 for what the user can mend, 130 for Ctrl-C."""
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
    except (DepthMuPError, OSError, ImportError) as error:
        return _refused(options.command, str(error))
    except SystemExit as error:  # not ours: its code must not look like a verdict
        return _refused(options.command, f"the code that was run called sys.exit({error.code!r})")
    except KeyboardInterrupt:
        print(f"depthmup {options.command}: interrupted", file=sys.stderr)
        return 130
    except BaseException as error:  # of the user's network, data or training, which may raise anything
        said = "".join(traceback.format_exception_only(error))  # also where the error itself cannot say what it is
        return _refused(options.command, f"{_place(error)}{said}")


def _refused(command: str, message: str) -> int:
    print(f"depthmup {command}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _place(error: BaseException) -> str:
    """File and line of the innermost code that is neither installed nor of this package."""
    own, installed = str(Path(__file__).parent), tuple(sysconfig.get_paths().values())
    frames = traceback.extract_tb(error.__traceback__)
    frames += _of_the_worker(error)
    theirs = [frame for frame in frames if not frame.filename.startswith((own, *installed, "<"))]
    return f"{Path(theirs[-1].filename).name}, line {theirs[-1].lineno}: " if theirs else ""


def _of_the_worker(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames that a worker process sent as text."""
    places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', str(error.__cause__ or ""))
    return [traceback.FrameSummary(file, int(line), name) for file, line, name in places]


def _one_line(command: str, message: Warning | str, *_: object, **__: object) -> None:
    print(f"depthmup {command}: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
