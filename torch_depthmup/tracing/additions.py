"""Which additions of a graph are residual, and where their branches start.

An addition is residual when one operand is computed from the other (identity skip), or when both are computed from
the same data and one of them takes a short linear way (projection skip).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from torch_depthmup.errors import TracingError
from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.operations import Kind
from torch_depthmup.tracing.parameters import Parts

__all__ = ["ResidualAddition", "nearest_additions", "residual_additions"]


class Verdict(enum.Enum):
    """What is said of a sum that is no residual addition."""

    OTHER = "a sum of another kind"
    DOUBTFUL = "it may or may not be residual"


@dataclass
class ResidualAddition:
    """A candidate: the addition's node, its operands, and the node that the branch starts from."""

    node: int
    branch: int
    skip: int
    start: int  # what the branch is computed from; the skip itself, but for `(x + a) + f` and projections
    projection: bool = False
    parts: Parts = field(default_factory=Parts)


def residual_additions(graph: Graph, declared: dict[int, str]) -> tuple[list[ResidualAddition], list[int]]:
    """The residual additions in forward order, and the sums that may or may not be."""
    masks = _Masks.of(graph)
    candidates: dict[int, ResidualAddition] = {}
    doubtful: list[int] = []
    waiting = dict(declared)
    for i, node in enumerate(graph.nodes):
        operands = [j for j in node.inputs if j >= 0]
        if not node.kind.is_sum or len(set(operands)) != 2 or not node.is_data:
            continue
        found = _declared(graph, i, operands, waiting) or _candidate(graph, i, operands, candidates, masks)
        if isinstance(found, ResidualAddition):
            candidates[i] = found
        elif found is Verdict.DOUBTFUL:
            doubtful.append(i)
    if waiting:
        raise TracingError(
            f"{', '.join(sorted(set(waiting.values())))}: declared as a branch, but what it returns is not added to "
            "anything. Name the module whose output is an operand of the addition"
        )
    accepted = _accept(graph, candidates, set(declared))
    doubtful = [
        node
        for node in doubtful
        if not any(_is_inside(graph, node, r) and node != r.start or _is_beside(graph, node, r.node) for r in accepted)
    ]
    return accepted, doubtful


@dataclass(frozen=True)
class _Masks:
    """Bit sets over the nodes of a graph."""

    weights: int
    parametrised: int  # weight operations, and norms with a gain: what makes a path a branch
    nonlinear: int
    data: int

    @staticmethod
    def of(graph: Graph) -> _Masks:
        weights = parametrised = nonlinear = data = 0
        for i, node in enumerate(graph.nodes):
            if node.is_data:
                data |= 1 << i
                weights |= node.is_weight_operation << i
                gained = node.kind is Kind.NORM and bool(graph.weight_inputs(i))
                parametrised |= (node.is_weight_operation or gained) << i
                nonlinear |= _is_nonlinear(graph, i) << i
        return _Masks(weights, parametrised, nonlinear, data)


def _is_nonlinear(graph: Graph, i: int) -> bool:
    node, data = graph.nodes[i], graph.data_inputs(i)
    if node.kind.is_product and len(data) > 1:
        return True
    plain = node.is_weight_operation or node.kind.is_linear or node.kind in (Kind.NORM, Kind.MAX_POOL)
    return bool(data) and not plain


def _candidate(
    graph: Graph, node: int, operands: list[int], candidates: dict[int, ResidualAddition], masks: _Masks
) -> ResidualAddition | Verdict:
    if graph.nodes[node].is_scalar:
        return Verdict.OTHER
    found = _by_ways(graph, node, operands, candidates, masks)
    taken_away = graph.nodes[node].kind is Kind.SUBTRACT and getattr(found, "skip", None) == operands[1]
    # f(h) - h takes the stream away; in h + a (f(h) - h) the residual addition is the outer one.
    return Verdict.OTHER if taken_away else found


def _by_ways(
    graph: Graph, node: int, operands: list[int], candidates: dict[int, ResidualAddition], masks: _Masks
) -> ResidualAddition | Verdict:
    """By what lies between the two operands and what both are computed from."""
    for skip, branch in (operands, operands[::-1]):
        if graph.reaches(branch, skip):
            between = graph.only(branch, skip)
            # A parameter that many additions use is an embedding or a bias; one that a single addition uses may be
            # the start of a stream, such as the latents of a Perceiver.
            sums = [i for i in graph.consumers[skip] if graph.nodes[i].kind is Kind.ADD]
            used = graph.nodes[skip].is_data or len(sums) == 1
            return (
                ResidualAddition(node, branch, skip, skip) if between & masks.parametrised and used else Verdict.OTHER
            )
    if not all(graph.nodes[i].is_data for i in operands):
        return Verdict.OTHER
    climbed = _sum_of_branches(graph, node, operands, candidates, masks)
    return climbed or _short_way(graph, node, operands, masks)


def _sum_of_branches(
    graph: Graph, node: int, operands: list[int], candidates: dict[int, ResidualAddition], masks: _Masks
) -> ResidualAddition | None:
    """``(x + a(x)) + f(x)``: the branch f is not computed from the first sum, but from what that sum's skip is.

    Or from what a scaled, cast or projected skip is made of, as in ``(0.9 x + a(x)) + f(x)``.
    """
    for skip, branch in (operands, operands[::-1]):
        start, climbed = skip, False
        while not graph.reaches(branch, start):
            if start in candidates:
                start, climbed = candidates[start].start, True
            elif climbed and len(graph.data_inputs(start)) == 1:
                start = graph.data_inputs(start)[0]
            else:
                break
        if climbed and graph.reaches(branch, start) and graph.only(branch, start) & masks.weights:
            return ResidualAddition(node, branch, skip, start)
    return None


def _short_way(graph: Graph, node: int, operands: list[int], masks: _Masks) -> ResidualAddition | Verdict:
    """Neither operand is computed from the other: one of them may be a cast, pooled or projected skip."""
    first, second = operands
    if not graph.nodes[first].ancestors & graph.nodes[second].ancestors & masks.data:
        return Verdict.OTHER
    only = [graph.only(first, second), graph.only(second, first)]
    weights = [(side & masks.weights).bit_count() for side in only]
    nonlinear = [bool(side & masks.nonlinear) for side in only]
    for i, (skip, branch) in enumerate((operands, operands[::-1])):
        if nonlinear[i] or weights[1 - i] == 0:
            continue
        if weights[i] == 0:
            return ResidualAddition(node, branch, skip, skip, projection=True)
        if nonlinear[1 - i] and weights[i] < weights[1 - i]:
            return ResidualAddition(node, branch, skip, skip, projection=True)
    unsure = any(nonlinear) and all(weights) or all(nonlinear) and any(weights)
    return Verdict.DOUBTFUL if unsure else Verdict.OTHER


def _accept(graph: Graph, candidates: dict[int, ResidualAddition], declared: set[int]) -> list[ResidualAddition]:
    """Candidates, outermost first, less those that only look residual.

    An addition inside an accepted branch must have a skip that is computed from that branch's own start: a bias that
    all layers add to their attention scores reaches later scores through the stream, but comes from outside. Unless it
    is one of a chain of additions, each the skip of the next: a stream beside the branch's own, as in
    ``a = a + f(b); b = b + g(a)``. A branch that ends in the sum of a linear and a nonlinear path is one branch of two
    parallel paths.
    """
    chained = _chained(graph, candidates)
    accepted: list[ResidualAddition] = []
    for node in sorted(candidates, reverse=True):
        candidate = candidates[node]
        outside = [outer for outer in accepted if outer.start < node and not outer.projection]
        around = [outer for outer in outside if _is_inside(graph, node, outer)]
        if not any(
            node not in chained
            and not graph.reaches(candidate.start, outer.start)
            or candidate.projection
            and _ends_in(graph, outer, node)
            for outer in around
        ):
            accepted.append(candidate)
    nodes = {residual.node for residual in accepted}
    kept = [r for r in accepted if r.branch in declared or not _is_long_skip(graph, r, nodes, chained)]
    return sorted(kept, key=lambda r: graph.additions[r.node].ordinal if r.node in graph.additions else r.node)


def _chained(graph: Graph, candidates: dict[int, ResidualAddition]) -> frozenset[int]:
    """The additions that are the skip of another one, up to views, casts and constant factors, and those others."""
    chained: set[int] = set()
    for node, candidate in candidates.items():
        i = candidate.skip
        while i not in candidates and graph.nodes[i].kind.is_linear and len(graph.data_inputs(i)) == 1:
            i = graph.data_inputs(i)[0]
        if i in candidates:
            chained |= {i, node}
    return frozenset(chained)


def _is_inside(graph: Graph, node: int, outer: ResidualAddition) -> bool:
    """Whether a node lies in the branch of a residual addition."""
    beyond = graph.reaches(outer.skip, node) if outer.projection else not graph.reaches(node, outer.start)
    return graph.reaches(outer.branch, node) and not beyond


def _ends_in(graph: Graph, outer: ResidualAddition, node: int) -> bool:
    """Whether no weight operation stands between a node and the end of a branch."""
    return bool(nearest_additions(graph, outer.branch, {node}, stop=outer.start))


def _is_long_skip(graph: Graph, residual: ResidualAddition, nodes: set[int], chained: frozenset[int]) -> bool:
    """Whether the "branch" is itself a stream: U-Net, feature pyramid, or a skip around a whole body."""
    if residual.projection and residual.node not in chained:
        only = graph.only(residual.branch, residual.skip)
        return any(only >> node & 1 for node in nodes & chained) or bool(
            nearest_additions(graph, residual.branch, nodes, stop=residual.start)
        )
    if residual.projection:
        only = graph.only(residual.branch, residual.skip)
        inside = {node for node in nodes if only >> node & 1}
        return bool(inside & set(nearest_additions(graph, residual.branch, nodes, stop=residual.start)))
    return any(
        graph.reaches(node, residual.start) and node != residual.start
        for node in nearest_additions(graph, residual.branch, nodes, stop=residual.start)
    )


def nearest_additions(graph: Graph, node: int, nodes: set[int], *, stop: int = -1, within: int = 0) -> list[int]:
    """The residual additions that a value comes from by other than weight operations (these only where ``within``)."""
    pending, seen, found = [node], {node}, []
    while pending:
        i = pending.pop()
        if i in nodes:
            found.append(i)
        elif i != stop and (not graph.nodes[i].is_weight_operation or within >> i & 1):
            fresh = [j for j in graph.data_inputs(i) if j not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return found


def _is_beside(graph: Graph, node: int, residual: int) -> bool:
    """Whether a residual addition lies on one side only of a sum: then it joins streams, and is not doubtful."""
    first, second = (i for i in graph.nodes[node].inputs if i >= 0)
    return graph.reaches(first, residual) != graph.reaches(second, residual)


def _declared(graph: Graph, node: int, operands: list[int], waiting: dict[int, str]) -> ResidualAddition | None:
    """The addition as declared, if one operand is what a declared module returned, but for linear steps after it."""
    for skip, branch in (operands, operands[::-1]):
        i, steps = branch, [branch]
        while i not in waiting and graph.nodes[i].kind.is_linear and len(graph.data_inputs(i)) == 1:
            i = graph.data_inputs(i)[0]
            steps.append(i)
        if i in waiting:
            if graph.reaches(skip, branch):
                raise TracingError(
                    f"{waiting[i]}: declared as a branch, but what it returns is the skip: the other operand of the "
                    "addition is computed from it. Name the module that returns the other operand"
                )
            del waiting[i]
            return ResidualAddition(node, branch, skip, skip, projection=not graph.reaches(branch, skip))
    return None
