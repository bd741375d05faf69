"""Which additions form a stream, and which branch and side a parameter belongs to."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch_depthmup.tracing.additions import ResidualAddition, nearest_additions
from torch_depthmup.tracing.choosing import above
from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.stacks import has_entries_for_each

__all__ = ["Numbers", "loose_matrices", "numbers_of", "sides_of", "streams_of"]


def streams_of(graph: Graph, found: list[ResidualAddition]) -> list[int]:
    """The stream of each addition: that of the additions its skip comes from, else a new one."""
    stream_of: dict[int, int] = {}
    nodes = {residual.node for residual in found}
    streams = []
    # A branch that contains residual additions holds a stream of its own.
    holder = {
        inner.node: min(
            (o for o in found if inner.node in o.parts.nodes), key=lambda o: len(o.parts.nodes), default=None
        )
        for inner in found
    }
    for residual in found:
        only = graph.only(residual.skip, residual.branch) if residual.projection else 0
        before = [
            node
            for node in nearest_additions(graph, residual.skip, nodes, within=only)
            if node in stream_of and holder[node] is holder[residual.node]
        ]
        stream_of[residual.node] = stream_of[max(before)] if before else len(set(stream_of.values()))
        streams.append(stream_of[residual.node])
    return streams


def numbers_of(graph: Graph, found: list[ResidualAddition]) -> list[Numbers]:
    """What numbers in the forward pass multiply each branch with, and the skip that it is added to.

    With ``h_l = a_l h_(l-1) + b_l f_l`` they are ``b_l`` and ``a_1 ... a_l``: what a stream is multiplied with stays on
    it, up to a norm.
    """
    skips: dict[int, float] = {}
    found_numbers = []
    for residual in found:
        addition = graph.nodes[residual.node]
        second = addition.inputs[1] if addition.alpha not in (0, 1) and len(addition.inputs) > 1 else -1
        alphas = [abs(addition.alpha) if operand == second else 1.0 for operand in (residual.branch, residual.skip)]
        skip, _, end = _numbers(graph, residual.skip, skips)
        skip *= skips.get(end, 1.0)
        skips[residual.node] = skip * alphas[1]
        branch, scalars, _ = _numbers(graph, residual.branch, skips)
        found_numbers.append(Numbers(branch, skip, scalars, alphas[0] / alphas[1]))
    return found_numbers


@dataclass(frozen=True)
class Numbers:
    """What numbers multiply a branch with.

    Args:
        branch: the product of those on the branch, without signs.
        skip: of those on the skip.
        scalars: names of the parameters that some of those on the branch are the values of.
        alpha: what the addition itself multiplies the branch with further, beside the skip.
    """

    branch: float = 1.0
    skip: float = 1.0
    scalars: frozenset[str] = frozenset()
    alpha: float = 1.0


def _numbers(graph: Graph, node: int, additions: Collection[int]) -> tuple[float, frozenset[str], int]:
    """The product of the numbers that a value was multiplied with last, its parameters, and where that starts."""
    product, scalars = 1.0, frozenset[str]()
    while node not in additions and graph.nodes[node].is_linear and not graph.nodes[node].is_weight_operation:
        data = graph.data_inputs(node)
        if len(data) != 1:
            break
        factor = abs(graph.nodes[node].factor)
        if graph.nodes[node].kind.is_product and 0 < factor < math.inf:
            product *= factor
            if factor != 1:  # also where there is no number: a gain is a vector
                scalars |= frozenset().union(*(graph.nodes[i].weights for i in graph.weight_inputs(node)))
        node = data[0]
    return product, scalars, node


def sides_of(
    graph: Graph, found: list[ResidualAddition], names: list[str], streams: list[int]
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[str, ...]]]:
    """For each parameter the branch it belongs to and its side there (0 inner, 1 outer); and the tied weights."""
    users: dict[str, dict[int, int]] = {}
    inside: set[int] = set()
    for i, residual in enumerate(found):
        inside |= residual.parts.nodes
        for name, side in residual.parts.sides.items():
            users.setdefault(name, {})[i] = side
    elsewhere: set[str] = set()
    places: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        if node.is_data:
            used = {name for j in graph.weight_inputs(i) for name in graph.nodes[j].weights}
            elsewhere |= set() if i in inside else used
            places |= {name: places.get(name, 0) + 1 for name in used}
    sides: dict[str, tuple[int, int]] = {}
    for name, at in users.items():
        innermost = min(at, key=lambda i: len(found[i].parts.nodes))
        nested = all(found[innermost].node in found[i].parts.nodes for i in at if i != innermost)
        if name not in elsewhere and (nested or _are_parallel(at, found, streams, is_once=places[name] == 1)):
            first = innermost if nested else max(at, key=lambda i: (streams.count(streams[i]), i == innermost))
            sides[name] = (first, at[first])
        elif name not in elsewhere and _is_stacked(graph, name, at, found, streams):
            sides[name] = (min(at), at[min(at)])
    shared = users.keys() - sides.keys()
    # A table that each layer reads through weights of its own is shared and not tied; a factor of which every
    # parameter is shared is one matrix at several depths.
    factors = set().union(*(residual.parts.factors for residual in found))
    tied = {name for factor in factors if factor <= shared for name in factor}
    return sides, {name: tuple(names[i] for i in at) for name, at in users.items() if name in tied}


def _is_stacked(
    graph: Graph, name: str, at: Mapping[int, int], found: list[ResidualAddition], streams: list[int]
) -> bool:
    """Whether branches of one stream take entries of their own, all on one side."""
    places = {(streams[i], side) for i, side in at.items()}
    return len(places) == 1 and has_entries_for_each(graph, name, [found[i].parts.nodes for i in at])


def _are_parallel(at: Mapping[int, int], found: list[ResidualAddition], streams: list[int], *, is_once: bool) -> bool:
    """Whether branches that use a weight on one side are one step of the network: the same place, or a stream each.

    Joint attention has queries, keys and values of two streams in the branches of both. Used once, they are not tied
    where one of the streams is shorter, as of text that the last block of a diffusion transformer only reads.
    """
    if len(set(at.values())) > 1:
        return False
    from_one_place = len({found[i].start for i in at}) == 1
    depths = {streams.count(streams[i]) for i in at}
    return from_one_place or (len({streams[i] for i in at}) == len(at) and (len(depths) == 1 or is_once))


def loose_matrices(graph: Graph, found: Sequence[ResidualAddition], excluded: set[str]) -> frozenset[str]:
    """Matrices that are used outside all residual branches, chosen by the user or not, and outside their shortcuts."""
    accounted: set[int] = set().union(*(residual.parts.nodes for residual in found))
    for residual in found:
        if residual.projection:
            accounted |= set(_indices(graph.only(residual.skip, residual.branch)))
    inside, outside = set[str](), set[str]()
    for i, node in enumerate(graph.nodes):
        if node.is_weight_operation:
            used = {name for j in graph.weight_inputs(i) for name in graph.nodes[j].weights}
            (inside if i in accounted else outside).update(used)
    return frozenset(name for name in outside - inside if not excluded & set(above(name)))


def _indices(bits: int) -> Iterator[int]:
    """The positions of the ones in a bit set."""
    while bits:
        yield (bits & -bits).bit_length() - 1
        bits &= bits - 1
