"""The parameters of a model beside those of its base, by the structure of their names.

The base may be shallower: a block that it does not have is compared with its last block of the same structure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch_depthmup.running import normalise_name

__all__ = ["Counterpart", "are_as_wide", "counterparts"]


@dataclass(frozen=True)
class Counterpart:
    """The parameter of the base that a parameter is compared with.

    Args:
        name: its name in the base.
        kind: its name with ``#`` for every number that counts blocks: parameters of one kind are compared together.
        is_exact: whether every number in the name has the same structure behind it in model and base. A first block may
            have a shortcut that the later ones do not have.
    """

    name: str
    kind: str
    is_exact: bool


def counterparts(names: Iterable[str], base: Iterable[str]) -> dict[str, Counterpart | None]:
    """The counterpart of each parameter of a model, ``None`` where the base has none."""
    ours = {name: normalise_name(name) for name in names}
    structures = _Structure(ours.values()), _Structure(map(normalise_name, base))
    return {name: _counterpart(normalised, *structures) for name, normalised in ours.items()}


def are_as_wide(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether every kind of parameter comes in some shape in both: blocks of one stage, beside those of another."""
    kinds: list[dict[str, set[tuple[int, ...]]]] = [{}, {}]
    for known, shapes in zip(kinds, (ours, theirs), strict=True):
        for name, shape in shapes.items():
            known.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "#", normalise_name(name)), set()).add(shape)
    return all(kinds[0][kind] & kinds[1][kind] for kind in kinds[0].keys() & kinds[1].keys())


class _Structure:
    """Parameter names by what stands before a number: which numbers there are, and what follows each of them."""

    def __init__(self, names: Iterable[str]):
        self.after: dict[str, dict[int, set[str]]] = {}
        for name in names:
            for number in re.finditer(r"\d+", name):
                followers = self.after.setdefault(name[: number.start()], {})
                followers.setdefault(int(number.group()), set()).add(re.sub(r"\d+", "#", name[number.end() :]))


def _counterpart(name: str, ours: _Structure, theirs: _Structure) -> Counterpart | None:
    """The counterpart of one parameter: number by number, by what follows the number.

    Where as many numbers have the same structure behind them in both, they are matched in order (the layers around the
    blocks of a ``Sequential``, whose numbers the depth shifts); else it is the same number, or the last that is alike.
    """
    here = there = kind = ""
    is_exact = True
    for text, number in re.findall(r"(\D*)(\d*)", name):
        here, there, kind = here + text, there + text, kind + text
        if number:
            mine, offered = ours.after[here], theirs.after.get(there, {})
            wanted = mine[int(number)]
            same = sorted(i for i, followers in offered.items() if followers == wanted)
            alike = sorted(i for i, followers in mine.items() if followers == wanted)
            larger = [i for i, followers in offered.items() if followers > wanted]
            if not same and not larger:
                return None
            is_exact = is_exact and bool(same)
            match = int(number) if int(number) in same else max(same or larger)
            in_order = len(same) == len(alike)
            if in_order:
                match = same[alike.index(int(number))]
            here, there, kind = here + number, there + str(match), kind + (str(match) if in_order else "#")
    return Counterpart(there, kind, is_exact)
