"""Which modules return a branch's value: what a multiplier can be hung on."""

from __future__ import annotations

from dataclasses import dataclass

from torch_depthmup.tracing.graph import Graph

__all__ = ["Producer", "returned_by", "summands_of"]


@dataclass(frozen=True)
class Producer:
    """A call of a module that returns a value: the module's name, which of its calls, and which tensor it returned."""

    module: str
    call: int
    output: int


def returned_by(graph: Graph) -> dict[int, list[Producer]]:
    """For each node the modules that return it."""
    returned: dict[int, list[Producer]] = {}
    for name, outputs in graph.outputs_of.items():
        for call, nodes in enumerate(outputs):
            for index, node in enumerate(nodes):
                if name and node >= 0:
                    returned.setdefault(node, []).append(Producer(name, call, index))
    return returned


def summands_of(
    graph: Graph, node: int, inside: frozenset[int], returned: dict[int, list[Producer]]
) -> tuple[tuple[Producer, ...], ...]:
    """What a multiplier can be hung on, walking back from the branch's value over linear operations."""
    found: list[Producer] = []
    while node in inside:
        if len(graph.consumers[node]) == 1 and node not in graph.outputs:
            found += returned.get(node, ())
        data = graph.data_inputs(node)
        if not _keeps_multiples(graph, node) or any(len(graph.consumers[i]) != 1 for i in data):
            break
        if len(data) > 1:
            sides = [] if found else [summands_of(graph, i, inside, returned) for i in data]
            return tuple(group for side in sides for group in side) if sides and all(sides) else _group(found)
        node = data[0]
    return _group(found)


def _group(found: list[Producer]) -> tuple[tuple[Producer, ...], ...]:
    return (tuple(found),) if found else ()


def _keeps_multiples(graph: Graph, node: int) -> bool:
    """Whether a multiple of a node's data operands gives the same multiple of its value."""
    data = graph.data_inputs(node)
    if not data or graph.nodes[node].is_weight_operation or not graph.nodes[node].is_linear:
        return False
    return len(data) == (2 if graph.nodes[node].kind.is_sum else 1)
