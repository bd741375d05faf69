"""Which additions of a graph are residual, and where their branches start.

An addition is residual when one operand is computed from the other (identity skip), or when both are computed from
the same data and one of them takes a short linear way (projection skip).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch_depthmup.errors import TracingError
from torch_depthmup.tracing.choosing import linear_way
from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.operations import Kind
from torch_depthmup.tracing.parameters import Parts

__all__ = ["Reason", "ResidualAddition", "nearest_additions", "nested_in", "residual_additions", "trunk_of"]


class Reason(enum.Enum):
    """Why a sum is left alone."""

    NUMBERS = "adds single numbers, such as losses"
    PARAMETER = "adds a parameter: a bias, an offset, a position embedding"
    UNRELATED = "adds values that are not computed from the same data: embeddings, positions, masks"
    NO_WEIGHTS = "has no weights between its operands: part of an activation or a norm, or an earlier value once more"
    TAKEN_AWAY = "takes a stream away again, as in h + a (f(h) - h)"
    MODULATION = "shifts what is scaled, x s + t, with s and t from elsewhere"
    LINEAR = "adds linear paths, as LoRA does"
    PARALLEL = "adds parallel paths at the end of one branch"
    FROM_OUTSIDE = "adds to a branch what comes from outside of it, such as a bias that all layers share"
    LONG_SKIP = "adds an earlier value of a stream to it, as in a U-Net, or joins streams"
    COLLECTS = "collects outputs of layers, which nothing in the network reads"
    LONE = "is a lone sum inside a branch, such as the D-skip of a state-space model"
    RECURRENCE = "is a step of a recurrence inside a branch, which uses the same weights at each step"
    BESIDE = "joins two paths that are no skip and branch, inside or behind what was found"
    CHOSEN = "is left out by include or exclude"
    DOUBTFUL = "may or may not be residual"


@dataclass
class ResidualAddition:
    """A candidate: the addition's node, its operands, and the node that the branch starts from.

    Args:
        projection: the skip has weights, or the branch is not computed from the skip.
        fed: the branch is not computed from its own stream, but from another one.
        declared: the user says so.
        provisional: the skip has no weights, but is not linear: it counts if later additions go on from it.
    """

    node: int
    branch: int
    skip: int
    start: int  # what the branch is computed from; the skip itself, but for `(x + a) + f` and projections
    projection: bool = False
    fed: bool = False
    provisional: bool = False
    declared: bool = False
    parts: Parts = field(default_factory=Parts)


def residual_additions(graph: Graph, declared: dict[int, str]) -> tuple[list[ResidualAddition], dict[int, Reason]]:
    """The residual additions in forward order, and why all other sums are none; doubtful ones are among these."""
    masks = _Masks.of(graph)
    candidates: dict[int, ResidualAddition] = {}
    reasons: dict[int, Reason] = {}
    waiting = dict(declared)
    for i, node in enumerate(graph.nodes):
        operands = [j for j in node.inputs if j >= 0]
        if not node.kind.is_sum or len(set(operands)) != 2 or not node.is_data:
            continue
        found = _declared(graph, i, operands, waiting) or _candidate(graph, i, operands, candidates, masks)
        if isinstance(found, ResidualAddition):
            candidates[i] = found
        else:
            reasons[i] = found
    linked = _linked(graph, candidates)
    reasons |= {i: Reason.DOUBTFUL for i, found in candidates.items() if found.provisional and i not in linked}
    candidates = {i: candidate for i, candidate in candidates.items() if i not in reasons}
    if waiting:
        raise TracingError(
            f"{', '.join(sorted(set(waiting.values())))}: declared as a branch, but what it returns is not added to "
            "anything. Name the module whose output is an operand of the addition"
        )
    accepted = _accept(graph, candidates, reasons)
    for i in [i for i, reason in reasons.items() if reason is Reason.DOUBTFUL]:
        if any((i != r.start and _is_inside(graph, i, r)) or _is_beside(graph, i, r.node) for r in accepted):
            reasons[i] = Reason.BESIDE
    return accepted, reasons


@dataclass(frozen=True)
class _Masks:
    """Bit sets over the nodes of a graph."""

    weights: int
    branching: int  # weight operations, norms with a gain and Fourier transforms: what makes a path a branch
    nonlinear: int
    data: int

    @staticmethod
    def of(graph: Graph) -> _Masks:
        weights = branching = nonlinear = data = 0
        for i, node in enumerate(graph.nodes):
            if node.is_data:
                data |= 1 << i
                weights |= node.is_weight_operation << i
                gained = node.kind is Kind.NORM and bool(graph.weight_inputs(i))
                branching |= (node.is_weight_operation or gained or node.kind is Kind.FOURIER) << i
                nonlinear |= _is_nonlinear(graph, i) << i
        return _Masks(weights, branching, nonlinear, data)


def _is_nonlinear(graph: Graph, i: int) -> bool:
    node, data = graph.nodes[i], graph.data_inputs(i)
    if len(data) > 1 and (node.kind.is_product or node.kind.takes_one_factor_of_data):
        return True
    plain = node.is_weight_operation or node.is_linear or node.kind in (Kind.NORM, Kind.MAX_POOL)
    return bool(data) and not plain


def _candidate(
    graph: Graph, node: int, operands: list[int], candidates: dict[int, ResidualAddition], masks: _Masks
) -> ResidualAddition | Reason:
    if graph.nodes[node].is_scalar:
        return Reason.NUMBERS
    if _is_modulation(graph, operands):
        return Reason.MODULATION
    found = _by_ways(graph, node, operands, candidates, masks)
    taken_away = graph.nodes[node].kind is Kind.SUBTRACT and getattr(found, "skip", None) == operands[1]
    # f(h) - h takes the stream away; in h + a (f(h) - h) the residual addition is the outer one.
    return Reason.TAKEN_AWAY if taken_away else found


def _by_ways(
    graph: Graph, node: int, operands: list[int], candidates: dict[int, ResidualAddition], masks: _Masks
) -> ResidualAddition | Reason:
    """By what lies between the two operands and what both are computed from."""
    for skip, branch in (operands, operands[::-1]):
        if graph.reaches(branch, skip):
            between = graph.only(branch, skip)
            # A parameter that many additions use is an embedding or a bias; one that a single addition uses may be
            # the start of a stream, such as the latents of a Perceiver.
            sums = [i for i in graph.consumers[skip] if graph.nodes[i].kind is Kind.ADD]
            used = graph.nodes[skip].is_data or len(sums) == 1
            if not used:
                return Reason.PARAMETER
            return ResidualAddition(node, branch, skip, skip) if between & masks.branching else Reason.NO_WEIGHTS
    if not all(graph.nodes[i].is_data for i in operands):
        return Reason.PARAMETER
    return (
        _carried_skip(graph, node, operands, candidates, masks)
        or _fed_by_another_stream(graph, node, operands, candidates, masks)
        or _short_way(graph, node, operands, masks)
    )


def _is_modulation(graph: Graph, operands: list[int]) -> bool:
    """``x * s + t``: s and t come from one place, and x from another. In ``x * f(t) + t`` t is a skip, and x a gate."""
    for product, shift in (operands, operands[::-1]):
        factors = graph.data_inputs(product)
        if graph.nodes[product].kind is not Kind.MULTIPLY or len(set(factors)) != 2:
            continue
        ways = [_single_way(graph, i) for i in (*factors, shift)]
        for one, other in (ways[:2], ways[1::-1]):
            apart = not graph.reaches(one[0], other[0]) and not graph.reaches(other[0], one[0])
            apart = apart and not set(_whole_way(graph, shift)) & set(other)
            if apart and not graph.reaches(shift, one[0]) and set(other) & set(ways[2]) - set(one):
                return not set(one) & set(ways[2])
    return False


def _single_way(graph: Graph, node: int) -> list[int]:
    """A value and what it is computed from, as far back as that is one value at a time."""
    way = [node]
    while len(data := graph.data_inputs(way[-1])) == 1:
        way.append(data[0])
    return way


def _carried_skip(
    graph: Graph, node: int, operands: list[int], candidates: dict[int, ResidualAddition], masks: _Masks
) -> ResidualAddition | None:
    """The skip is a cast, a copy, a multiple or a pooled value of what the branch is computed from; or a sum with it.

    So is that of f in ``(x + a(x)) + f(x)``, whatever is done to x.
    """
    for skip, branch in (operands, operands[::-1]):
        start, across_weights = skip, False
        while not graph.reaches(branch, start):
            if start in candidates:
                across_weights |= candidates[start].projection
                start = candidates[start].start
            elif _carries(graph, start, across_weights):
                (start,) = graph.data_inputs(start)
            else:
                break
        if graph.reaches(branch, start) and graph.only(branch, start) & masks.branching:
            return ResidualAddition(node, branch, skip, start)
    return None


def _carries(graph: Graph, i: int, across_weights: bool) -> bool:
    """Whether a node only hands on its one data operand, rearranged, cast, multiplied or pooled."""
    node = graph.nodes[i]
    linear = node.is_linear or node.kind is Kind.MAX_POOL or across_weights and node.kind is Kind.NORM
    return len(graph.data_inputs(i)) == 1 and (across_weights if node.is_weight_operation else linear)


def _fed_by_another_stream(
    graph: Graph, node: int, operands: list[int], candidates: dict[int, ResidualAddition], masks: _Masks
) -> ResidualAddition | None:
    """``a = a + f(b)`` with b of another stream: the operand that comes from a residual addition is the skip."""
    streams = [_comes_from_addition(graph, operand, candidates) for operand in operands]
    if streams[0] == streams[1]:
        return None
    skip, branch = operands if streams[0] else operands[::-1]
    if not graph.only(branch, skip) & masks.weights:
        return None
    return ResidualAddition(node, branch, skip, skip, projection=True, fed=True)


def _comes_from_addition(graph: Graph, i: int, candidates: dict[int, ResidualAddition]) -> bool:
    """Whether nothing but norms, activations and the like lies between a candidate and this node."""
    while i not in candidates:
        data = graph.data_inputs(i)
        if len(data) != 1 or graph.nodes[i].is_weight_operation:
            return False
        i = data[0]
    return True


def _short_way(graph: Graph, node: int, operands: list[int], masks: _Masks) -> ResidualAddition | Reason:
    """Neither operand is computed from the other: one of them may be a cast, pooled or projected skip."""
    first, second = operands
    if not graph.nodes[first].ancestors & graph.nodes[second].ancestors & masks.data:
        return Reason.UNRELATED
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
    if all(nonlinear) and sorted(map(bool, weights)) == [False, True]:
        skip, branch = operands if weights[1] else operands[::-1]
        return ResidualAddition(node, branch, skip, skip, projection=True, fed=True, provisional=True)
    if any(nonlinear) and all(weights):
        return Reason.DOUBTFUL
    return Reason.LINEAR if any(weights) else Reason.NO_WEIGHTS


def _accept(
    graph: Graph, candidates: dict[int, ResidualAddition], reasons: dict[int, Reason]
) -> list[ResidualAddition]:
    """Candidates, outermost first, less those that only look residual, whose reasons are noted.

    An addition inside an accepted branch must have a skip that is computed from that branch's own start: a bias that
    all layers add to their attention scores reaches later scores through the stream, but comes from outside. (So does
    another stream that the branch reads, but its additions are linked to each other by their skips.) A branch that
    ends in the sum of a linear and a nonlinear path is one branch of two parallel paths.
    """
    accepted: list[ResidualAddition] = []
    linked = _linked(graph, candidates)
    for node in sorted(candidates, reverse=True):
        candidate = candidates[node]
        outside = [outer for outer in accepted if outer.start < node and not outer.projection]
        around = [outer for outer in outside if _is_inside(graph, node, outer)]
        if candidate.declared:
            accepted.append(candidate)
        elif any(not graph.reaches(candidate.start, outer.start) and node not in linked for outer in around):
            reasons[node] = Reason.FROM_OUTSIDE
        elif any(candidate.projection and not candidate.fed and _ends_in(graph, outer, node) for outer in around):
            reasons[node] = Reason.PARALLEL
        else:
            accepted.append(candidate)
    skips = {residual.node: residual.skip for residual in accepted}
    long = {r.node for r in accepted if not r.declared and _is_long_skip(graph, r, skips, linked)}
    kept = [r for r in accepted if r.node not in long]
    collecting = _collecting(graph, kept)
    kept = [r for r in kept if r.declared or r.node not in collecting]
    reasons |= dict.fromkeys(long, Reason.LONG_SKIP) | dict.fromkeys(collecting - long, Reason.COLLECTS)
    return sorted(kept, key=lambda r: graph.additions[r.node].ordinal if r.node in graph.additions else r.node)


def _linked(graph: Graph, candidates: dict[int, ResidualAddition]) -> set[int]:
    """The candidates whose skip comes from another one, or from which another one's skip comes.

    Where an early value is added to a stream, the stream is what looks like the branch.
    """
    linked: set[int] = set()
    for node, candidate in candidates.items():
        before = [
            i for end in (candidate.skip, candidate.branch) for i in nearest_additions(graph, end, set(candidates))
        ]
        linked.update(before, [node] if before else [])
    return linked


def _collecting(graph: Graph, residuals: Sequence[ResidualAddition]) -> set[int]:
    """Sums that only collect outputs of the layers, ``out = out + head(f)``: nothing in the network reads them."""
    collected = {r.node for r in residuals if not any(graph.reaches(r.branch, i) for i in _whole_way(graph, r.skip))}
    while True:
        before = len(collected)
        for residual in residuals:
            read = {node for node in collected if graph.reaches(residual.branch, node)}
            if residual.node not in collected:
                read |= set(nearest_additions(graph, residual.skip, collected))
            collected -= read
        if len(collected) == before:
            break
    rest = [r.node for r in residuals if r.node not in collected]
    reading = [r for r in residuals if r.node in collected and _holds(graph.only(r.branch, r.start), rest)]
    # Else it is a last block, whose projected skip comes from where its branches do.
    one_by_one = any(
        _holds(graph.only(r.branch, r.skip), rest) and nearest_additions(graph, r.skip, collected) for r in reading
    )
    apart = any(
        not _holds(graph.nodes[end].ancestors, collected) and _holds(graph.nodes[end].ancestors, rest)
        for end in graph.outputs
    )
    return collected if reading and (one_by_one or apart) else set()


def _whole_way(graph: Graph, node: int) -> list[int]:
    """Linear steps back from a value, but not from a part of a layer's output to the whole, which others use too."""
    way = linear_way(graph, node)
    sizes = [math.prod(graph.nodes[i].shape) for i in way]
    parts = [k for k in range(1, len(way)) if sizes[k - 1] < sizes[k] and graph.nodes[way[k - 1]].kind is Kind.VIEW]
    return way[: parts[0]] if parts else way


def _holds(bits: int, nodes: Iterable[int]) -> bool:
    """Whether a bit set has any of these nodes."""
    return any(bits >> node & 1 for node in nodes)


def nested_in(graph: Graph, outer: ResidualAddition, residuals: Sequence[ResidualAddition]) -> set[int]:
    """The additions that lie in a branch as a stream of its own; not those of another stream that the branch reads."""
    nodes = {residual.node for residual in residuals}
    nested: set[int] = set()
    for residual in sorted(residuals, key=lambda r: r.node):
        if residual.node == outer.node or not _is_inside(graph, residual.node, outer):
            continue
        before = [
            i
            for i in nearest_additions(graph, residual.skip, nodes)
            if i != outer.start and _is_inside(graph, i, outer)
        ]
        from_start = outer.projection or graph.reaches(residual.start, outer.start)
        if from_start and not outer.fed and nested.issuperset({*before} - {outer.start}):
            nested.add(residual.node)
    return nested


def _is_inside(graph: Graph, node: int, outer: ResidualAddition) -> bool:
    """Whether a node lies in the branch of a residual addition."""
    beyond = graph.reaches(outer.skip, node) if outer.projection else not graph.reaches(node, outer.start)
    return graph.reaches(outer.branch, node) and not beyond


def _ends_in(graph: Graph, outer: ResidualAddition, node: int) -> bool:
    """Whether no weight operation stands between a node and the end of a branch."""
    return bool(nearest_additions(graph, outer.branch, {node}, stop=outer.start))


def _is_long_skip(graph: Graph, residual: ResidualAddition, skips: Mapping[int, int], linked: set[int]) -> bool:
    """Whether the "branch" is itself a stream: U-Net, feature pyramid, or a skip around a whole body."""
    nodes = set(skips)
    nearest = nearest_additions(graph, residual.branch, nodes, stop=residual.start)
    if residual.projection:
        only = graph.only(residual.branch, residual.skip)
        inside = {node for node in nodes if only >> node & 1}
        return bool(inside & set(nearest)) or (residual.node not in linked and bool(inside & linked or nearest))
    later = [node for node in nearest if graph.reaches(node, residual.start) and node != residual.start]
    return any(not _begins_inside(graph, node, residual.start, skips) for node in later)


def _begins_inside(graph: Graph, node: int, start: int, skips: Mapping[int, int]) -> bool:
    """Whether the stream of an addition begins with weights after ``start``, as in ``x + stream(stem(x))``."""
    pending, seen = [node], {node}
    while pending:
        skip = skips[pending.pop()]
        if not graph.reaches(skip, start) or nearest_additions(graph, skip, {start}):
            return False
        before = set(nearest_additions(graph, skip, set(skips), stop=start)) - seen
        pending.extend(before)
        seen |= before
    return True


def nearest_additions(graph: Graph, node: int, nodes: set[int], *, stop: int = -1, within: int = 0) -> list[int]:
    """The residual additions that a value comes from by other than weight operations (these only where ``within``)."""
    return [i for i in trunk_of(graph, node, nodes, stop=stop, within=within) if i in nodes]


def trunk_of(graph: Graph, node: int, nodes: set[int], *, stop: int = -1, within: int = 0) -> list[int]:
    """What a value comes from by other than weight operations, up to residual additions and with these."""
    pending, seen, found = [node], {node}, []
    while pending:
        i = pending.pop()
        found.append(i)
        if i not in nodes and i != stop and (not graph.nodes[i].is_weight_operation or within >> i & 1):
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
        i = next((step for step in linear_way(graph, branch) if step in waiting), -1)
        if i in waiting and graph.reaches(skip, branch):
            raise TracingError(
                f"{waiting[i]}: declared as a branch, but what it is added to is computed from what it returns: it is "
                "the skip. Declare the module that returns the other operand"
            )
        if i in waiting:
            del waiting[i]
            start = next((step for step in linear_way(graph, skip) if graph.reaches(branch, step)), None)
            return ResidualAddition(
                node, branch, skip, skip if start is None else start, projection=start is None, declared=True
            )
    return None
