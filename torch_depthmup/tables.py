"""Tables of at most 80 columns for plans and reports: repeated blocks are folded into one line."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence

__all__ = ["COLUMNS", "Table", "columns", "fold_names", "number"]

COLUMNS = 80
LEAST = 18  # columns that a name gets whatever stands beside it
MANY = 4  # so many numbers behind one stem (block0, block1, ...) are a repetition, fewer (conv1, conv2) are names


Table = tuple[Sequence[str], list[tuple[str, tuple[str, ...]]]]
"""A header, and for each row its name and its other cells."""


def columns(header: Sequence[str], rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[str]:
    """Lines of aligned text, the name to the left."""
    cells = [tuple(header), *((name or "(root)", *values) for name, values in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    widths[0] = min(widths[0], max(LEAST, COLUMNS - sum(widths[1:]) - 2 * (len(header) - 1)))
    lines = []
    for row in cells:
        name = row[0]
        while len(name) > widths[0]:  # a long name takes lines of its own, nothing is cut off
            cut = name.rfind(".", 3, widths[0]) + 1 or widths[0]
            lines.append(name[:cut])
            name = "  " + name[cut:]
        rest = "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {rest}".rstrip())
    return [lines[0], "-" * min(COLUMNS, max(map(len, lines))), *lines[1:]]


def number(value: float, digits: int = 3) -> str:
    """A number as a reader wants it: few digits, an en dash for what is not known."""
    return "–" if math.isnan(value) else f"{value:.{digits}g}"


def fold_names(values: dict[str, tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    """Names with equal values and equal patterns as one name, ``layers.{0..31}.mlp.fc2``, in order of appearance."""
    stems: dict[str, set[str]] = {}
    for name in values:
        for part in name.split("."):
            stems.setdefault(part.rstrip("0123456789"), set()).add(part)

    def numbered(part: str) -> bool:
        return part.isdigit() or (part[-1:].isdigit() and len(stems[part.rstrip("0123456789")]) >= MANY)

    groups: dict[tuple[str, tuple[str, ...]], list[tuple[int, ...]]] = {}
    for name, value in values.items():
        pattern, numbers = [], []
        for part in name.split("."):
            if part and numbered(part):
                digits = re.search(r"\d+$", part)
                assert digits is not None
                pattern.append(part[: digits.start()] + "\0")
                numbers.append(int(digits.group()))
            else:
                pattern.append(part)
        groups.setdefault((".".join(pattern), value), []).append(tuple(numbers))
    rows = []
    for (pattern_, value), numbers_ in groups.items():
        for ranges in _products(sorted(set(numbers_))):
            name = pattern_
            for text in ranges:
                name = name.replace("\0", text, 1)
            rows.append((name, value))
    return rows


def _products(tuples: list[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """A set of number tuples as few products of ranges, each range as text."""
    if not tuples or not tuples[0]:
        return [()]
    axes = [sorted({t[i] for t in tuples}) for i in range(len(tuples[0]))]
    if set(itertools.product(*axes)) == set(tuples):
        return [tuple(map(_range, axes))]
    rows = []
    for first in axes[0]:
        rows += [(str(first), *rest) for rest in _products([t[1:] for t in tuples if t[0] == first])]
    return rows


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
