"""What lies in each branch of a network, beside all the others, and which additions are only a part of a branch."""

from __future__ import annotations

from torch_depthmup.running import without_numbers
from torch_depthmup.tracing.additions import Reason, ResidualAddition, nested_in, trunk_of
from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.parameters import Bounds, describe
from torch_depthmup.tracing.producers import returned_by, summands_of
from torch_depthmup.tracing.streams import streams_of

__all__ = ["describe_all", "has_weights", "inner_steps", "is_tapped", "owner_of"]


def describe_all(graph: Graph, found: list[ResidualAddition], outside: set[int]) -> None:
    """Fills in the parts of each addition's branch.

    Args:
        graph: the forward pass.
        found: all residual additions.
        outside: nodes that belong to no branch.
    """
    nodes = {residual.node for residual in found}
    trunks = {r.node: _trunk(graph, r, nodes) for r in found}
    for residual in found:
        nested = nested_in(graph, residual, found)
        others = [other for other in found if other is not residual and other.node not in nested]
        bounds = Bounds(
            addition=residual.node,
            branch=residual.branch,
            start=residual.start,
            projection=residual.projection,
            fed=residual.fed,
            others=frozenset().union(*(trunks[other.node] for other in others)) - {residual.branch} | outside,
        )
        residual.parts = describe(graph, bounds)


def _trunk(graph: Graph, residual: ResidualAddition, nodes: set[int]) -> set[int]:
    """An addition, its skip, and what lies between it and its neighbours, such as a norm that several things read."""
    way = trunk_of(graph, residual.skip, nodes)
    before = [i for i in way if i in nodes]
    after = [residual.node]
    while len(following := graph.consumers[after[-1]]) == 1:
        (i,) = following
        if graph.nodes[i].is_weight_operation or len(graph.data_inputs(i)) != 1:
            break
        after.append(i)
    while len(graph.consumers[after[-1]]) < 2 and len(after) > 1:
        after.pop()
    return {residual.node, residual.skip, *after, *(i for i in way if any(graph.reaches(i, j) for j in before))}


def inner_steps(graph: Graph, found: list[ResidualAddition], kinds: set[str]) -> dict[int, Reason]:
    """Additions inside a branch that are a part of it: lone ones, and the steps of a recurrence, unrolled.

    A lone one whose kind is in ``kinds`` is all that is left of a stream.
    """
    streams = streams_of(graph, found)
    weights: dict[int, set[frozenset[frozenset[str]]]] = {}
    for residual, stream in zip(found, streams, strict=True):
        weights.setdefault(stream, set()).add(residual.parts.factors)
    steps = {}
    for residual, stream in zip(found, streams, strict=True):
        if not any(residual.node in outer.parts.nodes for outer in found):
            continue
        if streams.count(stream) == 1:
            if without_numbers(owner_of(graph, residual)) not in kinds:
                steps[residual.node] = Reason.LONE
        elif len(weights[stream]) == 1 and residual.parts.factors:
            steps[residual.node] = Reason.RECURRENCE
    return steps


def owner_of(graph: Graph, residual: ResidualAddition) -> str:
    """The module of a branch's parameters; of a branch without any the one that returns it, or that runs the sum."""
    if residual.parts.sides:
        return residual.parts.owner
    running = graph.additions[residual.node].modules[-1] if residual.node in graph.additions else ""
    groups = summands_of(graph, residual.branch, residual.parts.nodes, returned_by(graph))
    return min((at.module for at in groups[0]), key=len) if len(groups) == 1 else running


def has_weights(graph: Graph, residual: ResidualAddition) -> bool:
    """Whether the shortcut has weight operations of its own."""
    only = graph.only(residual.skip, residual.branch)
    return residual.projection and any(node.is_weight_operation and only >> i & 1 for i, node in enumerate(graph.nodes))


def is_tapped(graph: Graph, residual: ResidualAddition, carrier: frozenset[str]) -> bool:
    """Whether something outside a branch takes a value between its carrier and its addition."""
    nodes = residual.parts.nodes
    pending = [i for i in nodes if any(carrier & graph.nodes[j].weights for j in graph.weight_inputs(i))]
    seen = set(pending)
    while pending:
        i = pending.pop()
        following = {j for j in graph.consumers[i] if not (j == residual.node and i == residual.branch)}
        if i in graph.outputs or following - nodes:
            return True
        pending.extend(following - seen)
        seen |= following
    return False
