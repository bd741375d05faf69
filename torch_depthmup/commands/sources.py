"""``module:function`` on the command line: the user's factory and data, and one clear line where they are wrong."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.shared.arguments import checked_samples
from torch_depthmup.diagnostics.shared.content import source_digest
from torch_depthmup.diagnostics.shared.training import take
from torch_depthmup.errors import DepthMuPError

__all__ = [
    "EXAMPLES", "Factory", "add_sources", "batches", "data", "examples", "factory", "figure", "positive", "rate",
    "report", "write",
]  # fmt: skip

EXAMPLES = 16  # samples that branches are found with
FIGURES = (".png", ".pdf", ".svg")


def add_sources(parser: argparse.ArgumentParser, command: str) -> None:
    """The arguments that the commands on a user's network share."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", metavar="MODEL", help="module:function, a factory depth -> model, or depth, width -> model"
    )
    parser.add_argument(
        "data", metavar="DATA", help="module:function that returns (inputs, targets), or the name of such a pair"
    )
    parser.add_argument("--width", type=positive, metavar="N", help="the factory's second argument")
    out = Path(f"depthmup-{command}.html")
    parser.add_argument("--out", type=report, default=out, metavar="FILE", help=f"the report (default {out})")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        several = ", one after the other with spaces" if "," in text else ""
        raise argparse.ArgumentTypeError(f"must be a positive whole number{several}, not {text!r}")
    return int(text)


def rate(text: str) -> float:
    """A learning rate: a positive, finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number such as 0.001, not {text!r}")
    return value


def report(text: str) -> Path:
    """A page's path, where there is nothing yet or a page: nobody's own file is written over."""
    path = _no_folder(text)
    if path.is_file() and path.stat().st_size and not path.read_bytes()[:9].lower().startswith(b"<!doctype"):
        raise argparse.ArgumentTypeError(f"{text} is no page that could be replaced. Give another name")
    return path


def figure(text: str) -> Path:
    """A figure's path."""
    path = _no_folder(text)
    if path.suffix not in FIGURES:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(FIGURES)}, not {text!r}")
    return path


def _no_folder(text: str) -> Path:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder. Give the name of a file")
    return Path(text)


@dataclass(frozen=True)
class Factory:
    """A user's factory by name, which workers can import.

    ``code`` changes with the text of the module and of what it imports.
    """

    source: str
    width: int | None = None
    code: str = field(default="", repr=False)

    def __call__(self, depth: int, width: int | None = None) -> nn.Module:
        function, width = _resolve(self.source, "the factory"), width or self.width
        model = function(depth) if width is None else function(depth, width)
        if not isinstance(model, nn.Module):
            raise DepthMuPError(f"{self.source} returned {type(model).__name__}, not an nn.Module")
        return model


def factory(source: str, width: int | None, widths: Sequence[int] | None = None) -> Factory:
    """A factory that can be called with a depth and, where one is given, a width.

    Raises:
        DepthMuPError: there is no such function, or it takes other arguments; the message says what to write.
    """
    function = _resolve(source, "the factory")
    if not callable(function):
        raise DepthMuPError(f"{source} is a {type(function).__name__}, not a function from depth to model")
    width = width or (widths[0] if widths else None)
    _check_signature(source, function, width)
    return Factory(source, width, source_digest(sys.modules[source.partition(":")[0]]))


def _check_signature(source: str, function: Any, width: int | None) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: it will say itself
        return
    given = (1,) if width is None else (1, width)
    words = "a depth" if width is None else "a depth and a width"
    try:
        signature.bind(*given)
    except TypeError as error:
        needed = sum(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            for p in signature.parameters.values()
        )
        fix = (
            "Give --width" if width is None and needed == 2 else "It must take a depth, and a width where one is given"
        )
        if width is not None and needed < 2:
            fix = "Leave the width out, or let it take one"
        raise DepthMuPError(f"{source}{signature} cannot be called with {words}. {fix}") from error


def data(source: str) -> tuple[Any, Tensor]:
    """Inputs and targets.

    Raises:
        DepthMuPError: there is no such function or pair, or it is something else.
    """
    found = _resolve(source, "the data")
    found = found() if callable(found) else found
    return checked_samples(found, source)


def examples(inputs: Any, count: int = EXAMPLES) -> Any:
    """The first samples."""
    return take(inputs, slice(count))


def batches(inputs: Any, targets: Tensor, size: int, count: int) -> list[tuple[Any, Tensor]]:
    """At most ``count`` batches of whole size, or the one that there is; drawn without replacement, always the same."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    parts = [part for part in order.split(size)[:count] if len(part) == min(size, len(targets))]
    return [(take(inputs, part), targets[part]) for part in parts]


def write(path: Path, text: str) -> None:
    """Writes a report, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _resolve(source: str, what: str) -> Any:
    module_name, colon, name = source.partition(":")
    if module_name.endswith(".py") or os.sep in module_name:
        stem = Path(module_name).stem
        raise DepthMuPError(
            f"{what} {source!r} is a file: write {stem}:{name or 'function'}, in the folder that holds {stem}.py"
        )
    if not (module_name and colon and name):
        raise DepthMuPError(f"{what} must be written module:function, not {source!r}")
    if os.getcwd() not in sys.path:  # an installed command does not look where it is run
        sys.path.insert(0, os.getcwd())
    module = _imported(module_name)
    value = module
    for part in name.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, [n for n in dir(value) if not n.startswith("_")], 1)
            raise DepthMuPError(f"{module_name} has no {name!r}{f'. Is it {near[0]!r}?' if near else ''}")
        value = getattr(value, part)
    return value


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise DepthMuPError(
                f"no module is called {name}, neither installed nor in this folder. Run the command where {name}.py is"
            ) from error
        raise DepthMuPError(f"{name} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise DepthMuPError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
