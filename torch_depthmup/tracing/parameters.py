"""Inside one residual branch: its nodes, its weight levels, the side of each parameter, and the carrier."""

from __future__ import annotations

import heapq
import os
from dataclasses import dataclass, field

from torch_depthmup.tracing.graph import Graph, Node
from torch_depthmup.tracing.operations import Kind

__all__ = ["Bounds", "Parts", "carrier_of", "describe"]

INNER, OUTER = 0, 1


@dataclass
class Parts:
    """What lies in a branch.

    ``nodes`` are the data nodes between skip and addition. ``level[i]`` counts the weight operations on the longest
    path from the skip to node ``i``, itself included. ``sides`` maps each parameter to inner (0) or outer (1);
    ``factors`` are what weight operations multiply data with, each by the names of its parameters. ``owner`` is the
    innermost module path around these.
    """

    nodes: frozenset[int] = frozenset()
    level: dict[int, int] = field(default_factory=dict)
    levels: int = 0
    sides: dict[str, int] = field(default_factory=dict)
    factors: frozenset[frozenset[str]] = frozenset()
    owner: str = ""


@dataclass(frozen=True)
class Bounds:
    """Where a branch is: from ``start`` to ``branch``, which is an operand of ``addition``.

    ``projection`` and ``fed`` as in `ResidualAddition`. ``others`` are nodes of other streams: a branch may read them,
    but ends there.
    """

    addition: int
    branch: int
    start: int
    projection: bool
    fed: bool
    others: frozenset[int]


def describe(graph: Graph, bounds: Bounds) -> Parts:
    """The parts of a branch."""
    nodes = _between(graph, bounds)
    branch, start, projection = bounds.branch, bounds.start, bounds.projection
    level: dict[int, int] = {}
    for i in sorted(nodes):
        below = max((level[j] for j in graph.data_inputs(i) if j in nodes), default=0)
        from_skip = projection or graph.reaches(i, start)  # another stream's keys, say, are no step from the skip
        level[i] = below + (graph.nodes[i].is_weight_operation and from_skip)
    later: dict[int, bool] = dict.fromkeys(nodes, False)  # does a weight operation follow?
    for i in sorted(nodes, reverse=True):
        for j in graph.data_inputs(i):
            if j in nodes:
                later[j] = later[j] or later[i] or graph.nodes[i].is_weight_operation
    sides: dict[str, int] = {}
    factors: set[frozenset[str]] = set()
    for i in sorted(nodes):
        for j in graph.weight_inputs(i):
            for name in sorted(graph.nodes[j].weights):
                sides[name] = min(sides.get(name, OUTER), INNER if later[i] else OUTER)
            if graph.nodes[i].is_weight_operation:
                factors.add(graph.nodes[j].weights)
    owner = _owner(set().union(*factors) or set(sides))
    return Parts(nodes, level, level[branch], sides, frozenset(factors), owner)


def _between(graph: Graph, bounds: Bounds) -> frozenset[int]:
    """Data nodes after the start up to the branch: those computed from the start, and those that nothing else uses."""
    nodes: set[int] = set()
    start = bounds.start
    pending, seen = [-bounds.branch], {bounds.branch}
    while pending:
        # Consumers come after a node, so in descending order they are decided before it.
        i = -heapq.heappop(pending)
        used_here = all(j in nodes or j == bounds.addition and i == bounds.branch for j in graph.consumers[i])
        if i in bounds.others or i == start or not (_computed_inside(graph, i, bounds) or used_here):
            continue
        if graph.reaches(start, i):
            continue
        nodes.add(i)
        for j in graph.data_inputs(i):
            if j not in seen:
                seen.add(j)
                heapq.heappush(pending, -j)
    return frozenset(nodes)


def _computed_inside(graph: Graph, i: int, bounds: Bounds) -> bool:
    if bounds.fed:
        return False
    return not graph.reaches(bounds.start, i) if bounds.projection else graph.reaches(i, bounds.start)


def _owner(matrices: set[str]) -> str:
    """The longest module path that all these parameters share."""
    paths = [name.split(".")[:-1] for name in matrices]
    # A parametrized weight hangs below the module that uses it.
    paths = [path[: path.index("parametrizations")] if "parametrizations" in path else path for path in paths]
    return ".".join(os.path.commonprefix(paths)) if paths else ""


def carrier_of(graph: Graph, branch: int, parts: Parts) -> tuple[str, ...]:
    """The parameters of the last parametrised operations before the addition, in which the branch is linear."""
    return tuple(dict.fromkeys(_carrier(graph, branch, parts) or ()))


def _carrier(graph: Graph, i: int, parts: Parts) -> list[str] | None:
    """The carrier of one value of the branch, walking back over steps that keep positive factors; else ``None``."""
    added: list[str] = []  # biases on the way: they are multiplied with what they are added to
    while i in parts.nodes:
        node, data, weights = graph.nodes[i], graph.data_inputs(i), graph.weight_inputs(i)
        if weights and _is_parametrised(node):
            return _joined(_names(graph, _weight_first(graph, weights)), added)
        is_product = node.kind.is_product or node.kind.takes_one_factor_of_data and not weights
        if is_product and (weights or len(data) == 2):
            return _joined(_carrier_of_product(graph, node, data, weights, parts), added)
        biases = _names(graph, weights)
        if biases is None or not _keeps_factors(node, bool(weights)):
            return None
        added = biases + added
        if len(data) != 1:
            return _joined(_carrier_of_all(graph, data, parts), added)
        i = data[0]
    return None


def _is_parametrised(node: Node) -> bool:
    """Whether a node is linear in the weights that it has: a matrix product, a convolution or a norm."""
    return node.kind is Kind.NORM or node.is_weight_operation and node.kind.takes_one_factor_of_data


def _keeps_factors(node: Node, with_weights: bool) -> bool:
    """Whether a positive multiple of the operands, weights included, gives the same multiple of the value."""
    if node.kind.is_sum:
        return sum(i >= 0 for i in node.inputs) > 1  # else it adds a constant
    return node.keeps_positive_factors and not with_weights


def _weight_first(graph: Graph, weights: list[int]) -> list[int]:
    """The weight before the bias, in whatever order the operation takes them."""
    return sorted(weights, key=lambda j: "bias" in "".join(graph.nodes[j].weights).rpartition(".")[2])


def _joined(names: list[str] | None, added: list[str]) -> list[str] | None:
    return names + added if names else None


def _carrier_of_all(graph: Graph, data: list[int], parts: Parts) -> list[str] | None:
    """The carriers of all summands, or ``None`` where one of them has none."""
    found = [_carrier(graph, j, parts) for j in data]
    return None if not all(found) else [name for names in found for name in names or ()]


def _carrier_of_product(
    graph: Graph, node: Node, data: list[int], weights: list[int], parts: Parts
) -> list[str] | None:
    """A gain's product is linear in the gain, that of two data paths in each path; a quotient in neither."""
    if node.kind is Kind.DIVIDE:
        return None
    if weights:
        return _names(graph, weights) if len(data) == 1 else None
    return _carrier_of_gated(graph, data, parts)


def _carrier_of_gated(graph: Graph, operands: list[int], parts: Parts) -> list[str] | None:
    """Of a path and its gate the one with more levels carries, if the other does not see it."""
    if len(set(operands)) < 2:
        return None
    first, second = sorted(operands, key=lambda j: -parts.level.get(j, 0))
    for path, gate in ((first, second), (second, first)):
        carrier = _carrier(graph, path, parts)
        seen = {name for i in parts.nodes if graph.reaches(gate, i) for name in _all_names(graph, i)}
        if carrier and not seen & set(carrier):
            return carrier
    return None


def _all_names(graph: Graph, node: int) -> set[str]:
    return {name for j in graph.weight_inputs(node) for name in graph.nodes[j].weights}


def _names(graph: Graph, nodes: list[int]) -> list[str] | None:
    """The parameters behind these operands, or ``None`` where one of them is not linear in its parameters."""
    if not all(graph.nodes[j].is_linear_in_weights for j in nodes):
        return None
    return [name for j in nodes for name in graph.nodes[j].weights]
