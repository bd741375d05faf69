"""Attention in a forward pass: head sizes, the factor on scores, and the parameters in which queries are linear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch_depthmup.tracing.graph import Graph, Node
from torch_depthmup.tracing.operations import Kind

__all__ = ["Attention", "attentions_of"]


@dataclass(frozen=True)
class Attention:
    """Scores that a softmax makes weights of.

    Args:
        size: of a head, over which queries and keys are multiplied.
        factor: the number that multiplies the scores, wherever it stands between the last weights and the softmax.
        query: names of the parameters in which the queries are linear.
        key: likewise of the keys.
        is_own: whether the query's parameters make nothing but queries.
        is_unit: whether the queries are divided by something computed from them, as in cosine attention.
    """

    size: int
    factor: float
    query: tuple[str, ...]
    key: tuple[str, ...]
    is_own: bool
    is_unit: bool


@dataclass
class _Side:
    """What lies between the last weights and a product: parameters, the factor, and the nodes on the way."""

    names: list[str]
    factor: float
    nodes: set[int]
    is_unit: bool = False
    is_linear: bool = True


def attentions_of(graph: Graph) -> tuple[Attention, ...]:
    """Every attention of a forward pass, in its order."""
    found = []
    for i, node in enumerate(graph.nodes):
        if node.kind is Kind.ATTENTION and min(node.inputs[:2]) >= 0:
            found.append(_attention(graph, i, node.inputs[0], node.inputs[1], node.factor))
        elif node.kind is Kind.SOFTMAX:
            for product, factor in _products(graph, node.inputs[0]):
                query, key = graph.data_inputs(product)
                found.append(_attention(graph, product, query, key, factor * graph.nodes[product].factor))
    return tuple(attention for attention in found if attention is not None)


def _products(graph: Graph, node: int) -> Iterator[tuple[int, float]]:
    """The products of two paths of data that a softmax's operand is linear in, with the factors on the way."""
    pending, seen = [(node, 1.0)], {node}
    while pending:
        at, factor = pending.pop()
        current = graph.nodes[at]
        data = graph.data_inputs(at)
        if current.kind is Kind.MATRIX_PRODUCT and len(data) == 2 and not current.is_weight_operation:
            yield at, factor
        elif current.kind.is_sum or len(data) == 1 and _is_passed(current):
            following = [(j, factor * current.factor) for j in data if j not in seen]
            seen |= {j for j, _ in following}
            pending += following


def _is_passed(node: Node) -> bool:
    """Whether scores may go through a node on their way to the softmax: a number, a mask, a soft cap."""
    return not node.is_weight_operation and (node.kind.is_linear or node.kind is Kind.OTHER)


def _attention(graph: Graph, product: int, query: int, key: int, factor: float) -> Attention | None:
    shape = graph.nodes[query].shape
    if not shape:
        return None
    sides = [_side(graph, start) for start in (query, key)]
    inside = sides[0].nodes | {product}
    is_own = all(set(graph.consumers[i]) <= inside for i in sides[0].nodes)
    return Attention(
        size=shape[-1],
        factor=factor * sides[0].factor * sides[1].factor,
        query=tuple(dict.fromkeys(sides[0].names)),
        key=tuple(dict.fromkeys(sides[1].names)),
        is_own=is_own and sides[0].is_linear and bool(sides[0].names) and not set(sides[0].names) & set(sides[1].names),
        is_unit=sides[0].is_unit,
    )


def _side(graph: Graph, start: int) -> _Side:
    """Back from an operand of the product to the last weights in which it is linear."""
    side = _Side([], 1.0, set())
    pending = [start]
    while pending:
        at = pending.pop()
        if at in side.nodes:
            continue
        node, data, weights = graph.nodes[at], graph.data_inputs(at), graph.weight_inputs(at)
        side.nodes.add(at)
        side.names += [name for j in weights for name in sorted(graph.nodes[j].weights)]
        side.is_linear = side.is_linear and all(graph.nodes[j].is_direct for j in weights)
        if node.is_weight_operation or weights and (node.kind is Kind.NORM or node.kind is Kind.MULTIPLY):
            continue
        if node.kind.is_product and len(data) == 2 or not node.kind.is_linear or not data:
            side.is_unit = side.is_unit or node.kind is Kind.DIVIDE
            side.is_linear = False
            continue
        side.factor *= node.factor
        pending += data
    return side
