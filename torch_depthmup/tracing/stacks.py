"""Parameters that hold a layer's entries for every block: ``weights[i]``, ``lambdas[i]``, an unbound stack.

Every block takes entries of its own, so nothing is tied, and as the branches of a stream all have one multiplier and
one learning rate, so has the stack.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.operations import Kind

__all__ = ["has_entries_for_each"]


def has_entries_for_each(graph: Graph, name: str, branches: Collection[frozenset[int]]) -> bool:
    """Whether each of several branches takes entries of a parameter that no other takes.

    Args:
        graph: the forward pass.
        name: the parameter.
        branches: the nodes of the branches that use it.
    """
    leaves = [i for i, node in enumerate(graph.nodes) if node.kind is Kind.LEAF and node.weights == {name}]
    if len(leaves) != 1 or not graph.nodes[leaves[0]].shape:
        return False
    taken = set[int]()
    for nodes in branches:
        operands = {j for i in nodes for j in graph.weight_inputs(i) if name in graph.nodes[j].weights}
        parts = _parts(graph, operands, name)
        if not parts or parts & taken:
            return False
        taken |= parts
    # Views of the whole, one for each branch, are more than there is: that is a tied weight.
    return sum(math.prod(graph.nodes[i].shape) for i in taken) <= math.prod(graph.nodes[leaves[0]].shape)


def _parts(graph: Graph, operands: Collection[int], name: str) -> set[int]:
    """The smallest views of a parameter that operands are made of."""
    found, pending = set[int](), list(operands)
    for i in pending:
        if graph.nodes[i].is_direct:
            found.add(i)
        else:
            pending += [j for j in graph.nodes[i].inputs if j >= 0 and name in graph.nodes[j].weights]
    return found
