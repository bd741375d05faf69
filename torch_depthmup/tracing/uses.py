"""What a network does with each of its parameters: the operations that take it, their shapes, and the trunk's norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch_depthmup.tracing.factors import Factors
from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.norms import is_divided_by_its_size
from torch_depthmup.tracing.operations import Kind
from torch_depthmup.tracing.parts import Part, unnormalised_part

__all__ = ["Use", "skip_parameters", "trunk_parameters", "uses_of"]


@dataclass(frozen=True)
class Use:
    """One operation on data that takes a parameter.

    Args:
        kind: what the operation does.
        taken: shape of the data that it takes; empty where that is a constant or a lookup.
        given: shape of its value.
        operands: how many data it takes: 2 for a bilinear layer.
        is_weight_operation: whether it is a matrix product, a convolution or the like, and the parameter no bias of it.
        is_direct: whether it takes the parameter itself, at most viewed, or something computed from it.
        is_last: whether no weight operation follows.
        unnormalised: the rows of the parameter of which no norm, fused or written out, follows the product before
            anything that is not linear; none where one follows all of it.
        factor: the product of the numbers that the parameter, the data or the value are multiplied with around it, as
            far as no other operation has a share in them.
        scores_factor: what of ``factor`` stands behind it on the way to attention scores.
        modules: the modules that return its value, up to linear operations, as (name, which of its outputs).
        partners: the other parameters that are added to the value on its way out of these modules.
    """

    kind: Kind
    taken: tuple[int, ...]
    given: tuple[int, ...]
    operands: int
    is_weight_operation: bool
    is_direct: bool
    is_last: bool
    unnormalised: Part
    factor: float
    scores_factor: float
    modules: tuple[tuple[str, int], ...]
    partners: tuple[str, ...]


def uses_of(graph: Graph) -> dict[str, tuple[Use, ...]]:
    """The uses of each parameter, in forward order."""
    returned: dict[int, list[tuple[str, int]]] = {}
    for module, calls in graph.outputs_of.items():
        for outputs in calls:
            for output, at in enumerate(outputs):
                returned.setdefault(at, []).append((module, output))
    uses: dict[str, list[Use]] = {}
    last, factors = _without_followers(graph), Factors(graph)
    for i, node in enumerate(graph.nodes):
        weights = graph.weight_inputs(i) if node.is_data else []
        if not weights:
            continue
        data = graph.data_inputs(i)
        modules, partners, is_normalised = _afterwards(graph, i, returned)
        is_normalised = is_normalised or node.is_weight_operation and is_divided_by_its_size(graph, i)
        after, is_scored = factors.after(i)
        names = {j: graph.nodes[j].weights for j in weights}
        for j in weights:
            for name in names[j]:
                others = [other for k in weights if k != j for other in names[k]]
                use = Use(
                    kind=node.kind,
                    taken=graph.nodes[data[0]].shape if data else (),
                    given=node.shape,
                    operands=len(data),
                    is_weight_operation=node.is_weight_operation and not factors.is_bias(i, j),
                    is_direct=graph.nodes[j].is_direct,
                    is_last=i in last,
                    unnormalised=Part(()) if is_normalised else unnormalised_part(factors, i, j),
                    factor=factors.of_use(i, j, name),
                    scores_factor=after if is_scored else 1.0,
                    modules=modules,
                    partners=(*others, *partners),
                )
                uses.setdefault(name, []).append(use)
    return {name: tuple(found) for name, found in uses.items()}


def _without_followers(graph: Graph) -> frozenset[int]:
    """The nodes after which no weight operation comes."""
    found: set[int] = set()
    for i in range(len(graph.nodes) - 1, -1, -1):
        if all(j in found and not graph.nodes[j].is_weight_operation for j in graph.consumers[i]):
            found.add(i)
    return frozenset(found)


def _afterwards(
    graph: Graph, node: int, returned: Mapping[int, list[tuple[str, int]]]
) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...], bool]:
    """The modules that return a node's value, what is added on the way, and whether a fused norm comes next."""
    modules = list(returned.get(node, ()))
    partners: list[str] = []
    while len(graph.consumers[node]) == 1:
        node = graph.consumers[node][0]
        if graph.nodes[node].kind is Kind.NORM:
            return tuple(modules), tuple(partners), True
        if not graph.nodes[node].keeps_positive_factors or len(graph.data_inputs(node)) != 1:
            break
        if not modules:
            partners += [name for j in graph.weight_inputs(node) for name in sorted(graph.nodes[j].weights)]
            modules += returned.get(node, ())
    return tuple(modules), tuple(partners), False


def trunk_parameters(graph: Graph, additions: Mapping[int, int], starts: Iterable[int]) -> dict[str, int]:
    """The parameters of norms that stand on a residual stream itself, between two additions, with their stream.

    So do the norms of a post-norm network, ``norm(x + f(x))``. A way between two additions on which there is a weight
    operation too, such as the downsampling between two stages, does not count.

    Args:
        graph: the forward pass.
        additions: the nodes of the residual additions with their streams.
        starts: the nodes from which branches start.
    """
    found: dict[str, int] = {}
    ends = set(starts)
    for addition, stream in additions.items():
        node, names = addition, []
        while node not in ends or node == addition:
            following = [i for i in graph.consumers[node] if graph.nodes[i].is_data]
            if len(following) != 1 or following[0] in additions or graph.nodes[following[0]].is_weight_operation:
                break
            node = following[0]
            names += [name for j in graph.weight_inputs(node) for name in sorted(graph.nodes[j].weights)]
        else:
            found.update(dict.fromkeys(names, stream))
    return found


def skip_parameters(graph: Graph, skips: Iterable[tuple[int, int, int]]) -> dict[str, int]:
    """The parameters that scale a skip, as in ``lambdas[i] * x + f(x)``, with their stream.

    Args:
        graph: the forward pass.
        skips: for each addition without a projection the node that branch and skip start from, the skip, the stream.
    """
    found: dict[str, int] = {}
    for start, node, stream in skips:
        while node != start and len(data := graph.data_inputs(node)) == 1:
            found |= {name: stream for j in graph.weight_inputs(node) for name in graph.nodes[j].weights}
            node = data[0]
    return found
