"""Inside one residual branch: its nodes, its weight levels, the side of each parameter, and the carrier."""

from __future__ import annotations

import heapq
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch_depthmup.tracing.graph import MATRIX, Graph
from torch_depthmup.tracing.operations import HOMOGENEOUS, LINEAR, NORM

__all__ = ["Parts", "carrier_of", "describe"]

INNER, OUTER = 0, 1


class _Addition(Protocol):
    node: int


@dataclass
class Parts:
    """What lies in a branch.

    ``nodes`` are the data nodes between skip and addition. ``level[i]`` counts the weight operations on the longest
    path from the skip to node ``i``, itself included. ``sides`` maps each parameter to inner (0) or outer (1);
    ``matrices`` are those that weight operations use. ``owner`` is the innermost module path around these.
    """

    nodes: frozenset[int] = frozenset()
    level: dict[int, int] = field(default_factory=dict)
    levels: int = 0
    sides: dict[str, int] = field(default_factory=dict)
    matrices: frozenset[str] = frozenset()
    owner: str = ""


def describe(
    graph: Graph, addition: int, branch: int, start: int, projection: bool, residuals: Sequence[_Addition]
) -> Parts:
    """The parts of a branch that ends in node ``branch`` and starts from node ``start``."""
    others = {residual.node for residual in residuals} - {addition}
    nodes = _between(graph, addition, branch, start, projection, others)
    level: dict[int, int] = {}
    for i in sorted(nodes):
        below = max((level[j] for j in graph.data_inputs(i) if j in nodes), default=0)
        from_skip = projection or graph.reaches(i, start)  # another stream's keys, say, are no step from the skip
        level[i] = below + (graph.is_weight_operation[i] and from_skip)
    later: dict[int, bool] = dict.fromkeys(nodes, False)  # does a weight operation follow?
    for i in sorted(nodes, reverse=True):
        for j in graph.data_inputs(i):
            if j in nodes:
                later[j] = later[j] or later[i] or graph.is_weight_operation[i]
    sides: dict[str, int] = {}
    matrices: set[str] = set()
    for i in sorted(nodes):
        for j in graph.weight_inputs(i):
            for name in sorted(graph.weights[j]):
                sides[name] = min(sides.get(name, OUTER), INNER if later[i] else OUTER)
                if graph.is_weight_operation[i]:
                    matrices.add(name)
    return Parts(nodes, level, level[branch], sides, frozenset(matrices), _owner(matrices))


def _between(
    graph: Graph, addition: int, branch: int, start: int, projection: bool, others: set[int]
) -> frozenset[int]:
    """Data nodes after ``start`` up to ``branch``: those computed from the start, and those that nothing else uses."""
    nodes: set[int] = set()
    pending, seen = [-branch], {branch}
    while pending:
        # Consumers come after a node, so in descending order they are decided before it.
        i = -heapq.heappop(pending)
        inside = not graph.reaches(start, i) if projection else i != start and graph.reaches(i, start)
        foreign = i in others and not inside
        used_here = all(j in nodes or j == addition and i == branch for j in graph.consumers[i])
        if not inside and (foreign or i == start or graph.reaches(start, i) or not used_here):
            continue
        nodes.add(i)
        for j in graph.data_inputs(i):
            if j not in seen:
                seen.add(j)
                heapq.heappush(pending, -j)
    return frozenset(nodes)


def _owner(matrices: set[str]) -> str:
    """The longest module path that all these parameters share."""
    paths = [name.split(".")[:-1] for name in matrices]
    # A parametrized weight hangs below the module that uses it.
    paths = [path[: path.index("parametrizations")] if "parametrizations" in path else path for path in paths]
    return ".".join(os.path.commonprefix(paths)) if paths else ""


def carrier_of(graph: Graph, branch: int, parts: Parts) -> tuple[str, ...]:
    """The parameters of the last parametrised operations before the addition, in which the branch is linear."""
    found = _carrier(graph, branch, parts)
    return tuple(dict.fromkeys(found)) if found else ()


def _carrier(graph: Graph, node: int, parts: Parts) -> list[str] | None:
    collected: list[str] = []
    while True:
        if node not in parts.nodes:
            return None
        kind, data, weights = graph.kind[node], graph.data_inputs(node), graph.weight_inputs(node)
        if (graph.is_weight_operation[node] and MATRIX.match(kind)) or (NORM.match(kind) and weights):
            # The weight first, then the bias, in whatever order the operation takes them.
            weights = sorted(weights, key=lambda j: "bias" in "".join(graph.weights[j]).rpartition(".")[2])
            return _extended(_names(graph, weights), collected)
        operation = kind.removesuffix("0").removesuffix("Backward")
        if operation in ("Mul", "Div") and weights and len(data) == 1:
            return _extended(_names(graph, weights), collected) if operation == "Mul" else None
        if operation == "Mul" and len(data) == 2:
            return _extended(_gated(graph, data, parts), collected)
        if operation in ("Add", "Sub") and weights:
            names = _names(graph, weights)
            if names is None:
                return None
            collected = names + collected
        elif not (LINEAR.match(kind) or HOMOGENEOUS.match(kind)) or weights:
            return None
        elif operation in ("Add", "Sub") and len(graph.inputs[node]) > 1 and -1 in graph.inputs[node]:
            return None  # a constant added to the branch is not multiplied with it
        if len(data) != 1:
            sides = [_carrier(graph, j, parts) for j in data]
            if not sides or any(side is None for side in sides):
                return None
            return [name for side in sides for name in side or ()] + collected
        node = data[0]


def _extended(names: list[str] | None, collected: list[str]) -> list[str] | None:
    return names + collected if names else None


def _gated(graph: Graph, operands: list[int], parts: Parts) -> list[str] | None:
    """A product of two data paths is linear in each: the one with more levels carries, if the other does not see it."""
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
    return {name for j in graph.weight_inputs(node) for name in graph.weights[j]}


def _names(graph: Graph, nodes: list[int]) -> list[str] | None:
    """The parameters behind these operands, or ``None`` where one is more than a view of a single parameter."""
    if not all(graph.direct[j] for j in nodes):
        return None
    return [name for j in nodes for name in graph.weights[j]]
