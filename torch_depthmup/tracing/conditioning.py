"""Weights beside the streams that serve one block: what adaptive norms and gates make of a time step or of a class.

A diffusion transformer computes shifts, scales and gates for both branches of a block in one layer that never reads the
stream. There are as many of these layers as blocks, and all that they do goes through the block's branches: they stand
before the outer weight operations as other inner layers do. One layer for all blocks stays outside, as a stem does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_depthmup.running import without_numbers
from torch_depthmup.tracing.additions import ResidualAddition
from torch_depthmup.tracing.graph import Graph

__all__ = ["serving_one_block"]


def serving_one_block(
    graph: Graph, found: Sequence[ResidualAddition], names: Sequence[str], streams: Sequence[int]
) -> dict[str, int]:
    """The parameters beside the streams that only branches of one block depend on, with the first of these branches.

    Args:
        graph: the forward pass.
        found: the residual additions.
        names: of their branches.
        streams: of their branches.
    """
    served = _served(graph, found)
    places: dict[str, set[frozenset[int]]] = {}
    elsewhere: set[str] = set()
    for i, node in enumerate(graph.nodes):
        weights = {name for j in graph.weight_inputs(i) for name in graph.nodes[j].weights} if node.is_data else set()
        if i in served and _is_one_block(served[i], names, streams):
            for name in weights:
                places.setdefault(name, set()).add(served[i])
        else:
            elsewhere |= weights
    return {name: min(*at) for name, (at, *others) in places.items() if not others and name not in elsewhere}


def _served(graph: Graph, found: Sequence[ResidualAddition]) -> dict[int, frozenset[int]]:
    """The nodes in no branch from which all ways lead into branches, with these: not those on a stream itself.

    Joint attention of two streams lies in no branch, and leads into two.
    """
    additions = {residual.node for residual in found}
    holder: dict[int, int] = {}
    for i in sorted(range(len(found)), key=lambda i: -len(found[i].parts.nodes)):
        holder |= dict.fromkeys(found[i].parts.nodes, i)
    served: dict[int, frozenset[int]] = {}
    for i in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[i]
        if not node.is_data or i in holder or i in graph.outputs or i in additions:
            continue
        following = graph.consumers[i]
        if following and all(j in holder or j in served for j in following):
            served[i] = frozenset().union(*({holder[j]} if j in holder else served[j] for j in following))
    return served


def _is_one_block(branches: frozenset[int], names: Sequence[str], streams: Sequence[int]) -> bool:
    """Whether branches are different parts of one block: none comes twice, and their streams have others."""
    kinds = {(without_numbers(names[i]), streams[i]) for i in branches}
    among = {streams[i] for i in branches}
    return 1 < len(branches) == len(kinds) < sum(stream in among for stream in streams)
