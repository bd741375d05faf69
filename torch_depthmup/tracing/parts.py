"""Products that are taken apart: which rows of their weight make values that no norm follows.

In latent attention one weight makes a value that goes through a norm and an up projection, and keys that do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_depthmup.tracing.factors import Factors
from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.norms import is_divided_by_its_size
from torch_depthmup.tracing.operations import Kind

__all__ = ["Part", "Ranges", "ranges_of", "unnormalised_part"]

Ranges = tuple[tuple[int, int], ...]
"""Where rows start and end."""


@dataclass(frozen=True)
class Part:
    """The rows of a weight (its columns, in ``x @ W``) of which a product goes on without a norm.

    Args:
        rows: ranges in the whole weight; ``None`` where it cannot be seen which rows make what.
        factors: the numbers that they are multiplied with once the product has been taken apart, each once.
    """

    rows: Ranges | None
    factors: tuple[float, ...] = ()


def unnormalised_part(factors: Factors, node: int, operand: int) -> Part:
    """What of a product goes on without a norm.

    Args:
        factors: the forward pass, and the numbers in it.
        node: the product.
        operand: the weight, or a view of it.
    """
    graph, numbers = factors.graph, _numbered(factors.graph, node, operand)
    if numbers is None:
        return Part(None)
    plain, multiplied = set[int](), set[float]()
    pending = [(node, numbers, 1.0)]
    for at, numbers, factor in pending:
        if is_divided_by_its_size(graph, at):
            continue
        following = [(i, _moved(graph, i, numbers)) for i in graph.consumers[at]]
        known = [(i, moved, factor * factors.number(i)) for i, moved in following if moved is not None]
        if at in graph.outputs or not known or len(known) < len(following):
            plain |= _values(numbers)
            multiplied.add(factor * factors.after(at)[0])
        else:
            pending += known
    return Part(ranges_of(plain), tuple(sorted(multiplied)))


def ranges_of(rows: Iterable[int]) -> Ranges:
    """Numbers as ranges, in order."""
    found: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return tuple(found)


def _numbered(graph: Graph, node: int, operand: int) -> Tensor | None:
    """For each entry of a product the row of the weight that made it, without memory of its own."""
    found, places = graph.nodes[node], _places(graph, operand)
    ndim = len(found.shape)
    if not places or len(places) < 2 or ndim < 2 or -1 in found.shape:
        return None
    if found.kind is Kind.CONVOLUTION:
        channels, at = (0, 1), 1
    elif found.kind is Kind.MATRIX_PRODUCT:
        # (n, summed) times (summed, m); torch.nn.Linear, where it is one operation, takes (m, summed).
        channels, at = ((-1, -2), ndim - 1) if found.inputs[-1] == operand else ((-2, -1), ndim - 2)
    else:
        return None
    shape = places[0].shape
    channel = next((c % len(shape) for c in channels if shape[c] == found.shape[at]), None)
    if channel is None:
        return None
    line = tuple(slice(None) if dim == channel else 0 for dim in range(len(shape)))
    changing = [place[line] for place in places if bool(place[line].ne(place[line][0]).any())]
    if len(changing) != 1:
        return None
    return changing[0].reshape([-1 if dim == at else 1 for dim in range(ndim)]).expand(found.shape)


def _places(graph: Graph, operand: int) -> list[Tensor] | None:
    """For each dimension of a parameter where in it the entries of a view of it stand."""
    path: list[int] = []
    while graph.nodes[operand].kind is not Kind.LEAF:
        path.append(operand)
        if not graph.nodes[operand].is_direct or graph.nodes[operand].view is None:
            return None
        operand = graph.nodes[operand].inputs[0]
    shape = graph.nodes[operand].shape
    places = [
        torch.arange(size).reshape([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape)
        for dim, size in enumerate(shape)
    ]
    for i in reversed(path):
        view = graph.nodes[i].view
        assert view is not None
        places = [view.of(place, graph.nodes[i].shape) for place in places]
    return places


def _moved(graph: Graph, node: int, numbers: Tensor) -> Tensor | None:
    """The numbers of a node's entries from those of its operand; ``None`` where it mixes them."""
    found = graph.nodes[node]
    if found.view is not None:
        return found.view.of(numbers, found.shape)
    keeps = found.kind.is_sum or found.kind.is_product or found.kind is Kind.HOMOGENEOUS
    is_alone = len(graph.data_inputs(node)) == 1 and found.shape == tuple(numbers.shape)
    return numbers if keeps and is_alone else None


def _values(numbers: Tensor) -> set[int]:
    """The different numbers; what is repeated without memory of its own is looked at once."""
    once = numbers[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in numbers.stride())]
    return set(once.unique().tolist())
