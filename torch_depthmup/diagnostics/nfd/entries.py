"""Matrices whose entries are computed, block of rows by block of rows, wherever a product or a norm needs them.

What Adam adds to a matrix has no low rank, but each of its entries is a function of the gradients' entries at the same
place, and gradients have low rank. So the optimizer's own operations are noted down, and carried out on blocks of rows
that are thrown away: exact, without room for a whole matrix, at the price of all steps so far in each product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Margins", "Node", "Outer", "Pointwise", "blocks", "from_left", "from_right", "pointwise"]

BLOCK = 2**18  # entries that are computed at once: few enough for a processor's cache


@dataclass(frozen=True, eq=False)
class Outer:
    """The sum of outer products of rows: entry (i, j) is the sum of left[:, i] right[:, j].

    Args:
        left: (seeds, rows, coordinates along the left queries).
        right: (seeds, rows, coordinates along the right queries).
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class Margins:
    """The product of a number for each row, (rows, 1), and one for each column, (1, columns)."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Pointwise:
    """An operation on the entries at one place of some matrices, and numbers."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


Node = Outer | Margins | Pointwise


def pointwise(func: Callable[..., Tensor], *args: Any, **options: Any) -> Pointwise:
    """An operation on entries."""
    return Pointwise(func, args, options)


def _in_order(root: Node) -> tuple[list[Node], dict[int, int]]:
    """All nodes below one, each after its operands, and how often each is an operand. They may be too deep to recurse.

    The node itself counts as used once.
    """
    order: list[Node] = []
    used, waiting = {id(root): 1}, [(root, False)]
    seen: set[int] = set()
    while waiting:
        node, ready = waiting.pop()
        if ready:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            waiting.append((node, True))
            for operand in _operands(node):
                used[id(operand)] = used.get(id(operand), 0) + 1
                waiting.append((operand, False))
    return order, used


def _operands(node: Node) -> list[Node]:
    return [a for a in node.args if isinstance(a, Node)] if isinstance(node, Pointwise) else []


def blocks(root: Node, left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows and their entries, (seeds, rows of the slice, columns).

    Args:
        root: what is computed.
        left: the left queries that coordinates are along, (seeds, queries, rows).
        right: the right ones, (seeds, queries, columns).
    """
    order, used = _in_order(root)
    factors = {
        id(node): tuple(
            torch.bmm(part, basis[:, : part.shape[2]]) for part, basis in ((node.left, left), (node.right, right))
        )
        for node in order
        if isinstance(node, Outer)
    }
    size = max(1, BLOCK // (right.shape[2] * len(right)))
    for start in range(0, left.shape[2], size):
        rows = slice(start, start + size)
        yield rows, _computed(order, dict(used), factors, rows)


def _computed(
    order: list[Node], left_over: dict[int, int], factors: dict[int, tuple[Tensor, ...]], rows: slice
) -> Tensor:
    """The last node's entries in some rows. Those of others are dropped when nothing needs them any more."""
    values: dict[int, Tensor] = {}
    for node in order:
        if isinstance(node, Outer):
            p, q = factors[id(node)]
            values[id(node)] = torch.bmm(p[:, :, rows].mT, q)
        elif isinstance(node, Margins):
            values[id(node)] = (node.rows[rows] * node.columns)[None]
        else:
            values[id(node)] = node.func(
                *(values[id(a)] if isinstance(a, Node) else a for a in node.args), **node.options
            )
        for operand in _operands(node):
            left_over[id(operand)] -= 1
            if not left_over[id(operand)]:
                del values[id(operand)]
    return values[id(order[-1])]


def from_right(root: Node, left: Tensor, right: Tensor, queries: Tensor) -> Tensor:
    """The product with rows from the right: (seeds, queries, columns) -> (seeds, queries, rows)."""
    out = queries.new_empty(*queries.shape[:2], left.shape[2])
    for rows, entries in blocks(root, left, right):
        out[:, :, rows] = torch.bmm(queries, entries.expand(len(queries), -1, -1).mT)
    return out


def from_left(root: Node, left: Tensor, right: Tensor, queries: Tensor) -> Tensor:
    """The transposed product: (seeds, queries, rows) -> (seeds, queries, columns)."""
    out = queries.new_zeros(*queries.shape[:2], right.shape[2])
    for rows, entries in blocks(root, left, right):
        out.baddbmm_(queries[:, :, rows], entries.expand(len(queries), -1, -1))
    return out
