"""Norms that are written out: does all that a value does go through quotients of it and its own size?

``x * rsqrt(x.pow(2).mean(-1) + eps)`` is of degree 1 in x, times degree -1: a positive factor of x is gone.
"""

from __future__ import annotations

import heapq
import math

from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.operations import Kind

__all__ = ["is_divided_by_its_size"]

FAR = 40  # nodes that a norm may have


def is_divided_by_its_size(graph: Graph, node: int) -> bool:
    """Whether a positive factor of a node's value changes nothing but for the small numbers that keep norms finite."""
    if node in graph.outputs:
        return False
    degrees, pending, found = {node: 1.0}, list(graph.consumers[node]), False
    heapq.heapify(pending)
    while pending:
        i = heapq.heappop(pending)
        if i in degrees:
            continue
        degree = _degree(graph, i, degrees)
        if math.isnan(degree) or len(degrees) > FAR:
            return False
        if degree == 0:
            found = True
            continue
        if i in graph.outputs:
            return False
        degrees[i] = degree
        for j in graph.consumers[i]:
            heapq.heappush(pending, j)
    return found


def _degree(graph: Graph, i: int, degrees: dict[int, float]) -> float:
    """The power of a factor of the value in question that a node's value gets; NaN where it gets none."""
    node, data = graph.nodes[i], graph.data_inputs(i)
    if node.kind is Kind.NORM:
        return 0.0
    if not all(j in degrees for j in data) or math.isnan(node.power):
        return math.nan
    ours = [degrees[j] for j in data]
    if node.kind is Kind.DIVIDE:
        return -ours[0] if node.inputs[0] != data[0] else ours[0] - sum(ours[1:])
    if node.kind is Kind.MULTIPLY or node.kind.takes_one_factor_of_data:
        return sum(ours)
    return ours[0] * node.power if len(set(ours)) == 1 else math.nan
