"""Does what was found account for the model? Weights that grow with depth and lie in no branch are refused by name.

A branch that the finder misses trains to a plausible, worse number. It leaves traces: matrices outside every branch
that are more numerous in the model than in its base, and weights of one place that play one part in one block and
another part in the next.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from torch_depthmup.errors import AmbiguousBranchError
from torch_depthmup.running import without_numbers
from torch_depthmup.tracing.additions import Reason
from torch_depthmup.tracing.branches import Branch, Trace, roles
from torch_depthmup.tracing.choosing import above

__all__ = ["check_census", "check_parts"]

MANY = 3  # weights of one kind that repeat, where there is no base to compare with


def check_census(trace: Trace, base: Trace | None = None) -> None:
    """Refuses a trace that leaves weights unaccounted for.

    Args:
        trace: of the model.
        base: of the model that one tunes on; without it, what repeats as often as the blocks do is taken to grow.

    Raises:
        AmbiguousBranchError: it names a weight, what is odd about it, and what to write.
    """
    layers = _layer_numbers(trace.branches)
    outside = _counted(trace.loose, layers)
    if base is None:
        _check_repeated(trace, outside, layers)
        return
    there = _counted(base.loose, _layer_numbers(base.branches))
    grown = _grown(trace, base, layers)
    known = {_kind(name, layers) for name in base.reached}
    for kind, names in outside.items():
        # A layer's bias may be missing in the base: then its matrix has not become more numerous.
        layer = {_kind(name, layers) for name in trace.loose if _module(name) == _module(names[0])} - {kind}
        is_lacking = kind in grown and bool(layer) and not layer & grown
        beside = there.get(kind, [])
        if kind not in known:  # perhaps the number is a part of the word: layer1, layer2
            word = without_numbers(names[0])
            names, beside = ([n for n in sorted(t.loose) if without_numbers(n) == word] for t in (trace, base))
        if kind not in known and not beside or is_lacking and len(names) > len(beside):
            _refuse_family(names[0])
        if kind in grown and len(names) > len(beside):
            _refuse(trace, names, f"{len(names)} of its kind lie outside, and {len(beside)} in the base")


def _check_repeated(trace: Trace, outside: Mapping[str, list[str]], layers: frozenset[str]) -> None:
    """Without a base: kinds outside that occur inside too, or as often as the blocks."""
    parts = _parts(trace, layers)
    repeated = {len(members) for members in parts.values() if len(members) >= MANY}
    for kind, names in outside.items():
        if kind in parts:
            other = next(iter(parts[kind]))
            _refuse(trace, names, f"{other}, of the same kind, lies in one; pass base=small_model if both are meant")
        per_stage = any(_holds_blocks(names[0], kind) for kind in parts)
        if not per_stage and any(len(names) % count == 0 for count in repeated):
            _refuse(trace, names, f"there are {len(names)} of its kind, as many as there are blocks or a multiple")


def _grown(trace: Trace, base: Trace, layers: frozenset[str]) -> set[str]:
    """The kinds of which the model has more than its base, inside of branches or not."""
    theirs = _counted(base.reached, _layer_numbers(base.branches))
    return {kind for kind, names in _counted(trace.reached, layers).items() if len(names) > len(theirs.get(kind, ()))}


def check_parts(trace: Trace) -> None:
    """Refuses a trace in which weights of one place play one part in one block and another part in the next.

    Raises:
        AmbiguousBranchError: it names two of them.
    """
    layers = _layer_numbers(trace.branches)
    for members in _parts(trace, layers).values():
        if len(set(members.values())) == 1:
            continue
        # Blocks of two classes may call different things alike: conv.1 of one is not conv.1 of the other.
        alike: dict[frozenset[str], dict[str, str]] = {}
        for name, side in members.items():
            alike.setdefault(_siblings(trace, name, layers), {})[name] = side
        for group in alike.values():
            _refuse_unlike(group)


def _siblings(trace: Trace, name: str, layers: frozenset[str]) -> frozenset[str]:
    """What a weight's block holds: the names, within the block, of all its parameters."""
    block = _block(name, layers)
    return frozenset(other[len(block) :] for other in trace.reached if other.startswith(block))


def _parts(trace: Trace, layers: frozenset[str]) -> dict[str, dict[str, str]]:
    """For each kind of weight in branches its members and their sides."""
    parts: dict[str, dict[str, str]] = {}
    for name, (_, side) in roles(trace.branches).items():
        parts.setdefault(_kind(name, layers), {})[name] = side
    return parts


def _refuse_family(name: str) -> NoReturn:
    """Refuses a base that lacks a parameter."""
    raise AmbiguousBranchError(
        f"{name} has no counterpart in the base, where no parameter is in its place. Build model and base with the "
        "same code"
    )


def _refuse(trace: Trace, names: Sequence[str], why: str) -> NoReturn:
    hidden = "its sum is written in a way that does not show (a fused operation, logaddexp, a product with a constant)"
    if trace.functions:
        hidden = f"{' or '.join(trace.functions[:3])}, an autograd Function, holds its sum"
    way = "Write it with +, or, if"
    if any(left.reason is Reason.COLLECTS for left in trace.left_alone):
        hidden, way = "it only feeds a sum that collects the layers' outputs, which is left alone", "If"
    pattern = re.sub(r"\d+", "*", _module(names[0]))
    inside = [name for name in roles(trace.branches) if any(fnmatch.fnmatchcase(m, pattern) for m in above(name))]
    aside = f"exclude=['{pattern}']"
    if inside or not pattern:
        aside = "hold them in a ModuleList of their own and exclude that"
    raise AmbiguousBranchError(
        f"{names[0]} is used outside every residual branch that was found, and seems to be part of one: {why}. Perhaps "
        f"{hidden}. {way} these weights are meant to stay as they are, {aside}"
    )


def _module(name: str) -> str:
    """The module that holds a parameter."""
    return name.rpartition(".")[0]


def _refuse_unlike(members: Mapping[str, str]) -> None:
    """Weights of one place must play one part in all blocks."""
    if len(set(members.values())) < 2:
        return
    inner, outer = (next(name for name, side in members.items() if side == s) for s in ("inner", "outer"))
    raise AmbiguousBranchError(
        f"{inner} comes before the last weights of its branch and {outer}, of the same kind, is among them: two "
        "branches were probably taken for one. Write each block with dm.Residual, or declare the modules that return "
        "the branches: branches=[...]"
    )


def _counted(names: Iterable[str], layers: frozenset[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (name.endswith("bias"), name)):
        kinds.setdefault(_kind(name, layers), []).append(name)
    return kinds


NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")


def _layer_numbers(branches: Sequence[Branch]) -> frozenset[str]:
    """What stands before numbers that count layers inside one branch, as in ``blocks.#.mlp.0`` and ``.2``."""
    found: set[str] = set()
    for branch in branches:
        numbers: dict[str, set[str]] = {}
        for name in (*branch.inner, *branch.outer):
            for match in NUMBER.finditer(name):
                numbers.setdefault(name[: match.start()], set()).add(match.group())
        found |= {_blank(before) for before, several in numbers.items() if len(several) > 1}
    return frozenset(found)


def _blank(text: str) -> str:
    return re.sub(r"(?:(?<=\.)|^)\d+(?=\.|$)", "#", text)


def _block(name: str, layers: frozenset[str]) -> str:
    """The block that a weight lies in: its name up to the last number before those of layers, with the dot."""
    counting = itertools.takewhile(lambda m: _blank(name[: m.start()]) not in layers, NUMBER.finditer(name))
    return name[: max((match.end() + 1 for match in counting), default=0)]


def _holds_blocks(name: str, kind: str) -> bool:
    """Whether a weight's block holds blocks of this kind: ``stages.1.downsample.0`` beside ``stages.#.blocks.#.fc``."""
    stages = [_blank(name[: match.end()]) + "." for match in NUMBER.finditer(name)]
    beneath = [kind.removeprefix(stage) for stage in stages if kind.startswith(stage)]
    return bool(beneath) and "#" in beneath[-1].split(".")


def _kind(name: str, layers: frozenset[str]) -> str:
    """A weight's place in its block: its name without the numbers of blocks."""

    def keep_layers(match: re.Match[str]) -> str:
        return match.group() if _blank(name[: match.start()]) in layers else "#"

    return NUMBER.sub(keep_layers, name)
