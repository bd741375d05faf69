"""Autograd graph -> residual streams and branches. Knows no rule: it says what is there, not what to do with it.

`additions.py` says which additions are residual. What lies between skip and addition is the branch
(`parameters.py`). Additions that are linked through their skips form a stream.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from torch import nn

from torch_depthmup.modules import Residual
from torch_depthmup.running import unwrap, without_numbers
from torch_depthmup.tables import COLUMNS, Table, columns, fold_names
from torch_depthmup.tracing.additions import Reason, ResidualAddition, residual_additions
from torch_depthmup.tracing.attention import Attention, attentions_of
from torch_depthmup.tracing.choosing import (
    Pattern,
    declared_nodes,
    matching,
    owners_of,
    owners_of_sum,
    refuse_doubtful,
)
from torch_depthmup.tracing.conditioning import serving_one_block
from torch_depthmup.tracing.graph import Graph, record
from torch_depthmup.tracing.inside import describe_all, has_weights, inner_steps, is_tapped, owner_of
from torch_depthmup.tracing.operations import Number
from torch_depthmup.tracing.parameters import carrier_of
from torch_depthmup.tracing.producers import Producer, returned_by, summands_of
from torch_depthmup.tracing.streams import Numbers, loose_matrices, numbers_of, sides_of, streams_of
from torch_depthmup.tracing.uses import Use, skip_parameters, trunk_parameters, uses_of

__all__ = [
    "Branch",
    "Found",
    "LeftAlone",
    "Pattern",
    "Site",
    "left_alone_lines",
    "left_alone_rows",
    "Trace",
    "TracedBranch",
    "find_branches",
    "roles",
    "trace",
]


Side = Literal["inner", "outer"]
SIDES: tuple[Side, Side] = ("inner", "outer")


@dataclass(frozen=True)
class Branch:
    """A residual branch: what is added to the skip in one residual addition.

    Args:
        name: path of the innermost module that owns the branch's weight operations.
        stream: index of the residual stream, in forward order.
        position: index of the addition in its stream, from 0.
        additions: number of residual additions in the stream.
        skip: ``"identity"``, or ``"projection"`` where the shortcut has weights of its own.
        levels: number of weight operations on the longest path from the skip to the addition.
        inner: names of the parameters before the branch's outer weight operation.
        outer: names of the parameters from the outer weight operation on.
        carrier: names of the parameters of the last parametrised operation, in which the branch's value is linear;
            empty where there is none, for example behind a gate.
    """

    name: str
    stream: int
    position: int
    additions: int
    skip: Literal["identity", "projection"]
    levels: int
    inner: tuple[str, ...]
    outer: tuple[str, ...]
    carrier: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """Where a residual addition is written: its number among the additions of the pass, and its branch operand."""

    number: Number
    operand: int


@dataclass(frozen=True)
class TracedBranch:
    """A branch with what carrying a plan out needs to know of the forward pass.

    Args:
        branch: what the user sees of it.
        site: where its addition is, or ``None`` where Python does not see the addition.
        summands: the values that it is the sum of - one, unless no module returns their sum - and for each of them the
            modules that return it, up to linear operations after them.
        nested: the indices of the branches inside it.
        is_tapped: whether what its carrier gives is used for something else besides the addition.
        sides: the side of each parameter in it, with those of the branches inside it.
        numbers: what numbers in the forward pass multiply it with, and the skip.
    """

    branch: Branch
    site: Site | None
    summands: tuple[tuple[Producer, ...], ...]
    nested: tuple[int, ...]
    is_tapped: bool
    sides: Mapping[str, Side]
    numbers: Numbers = Numbers()


@dataclass(frozen=True)
class LeftAlone:
    """Sums that are no residual additions.

    Args:
        place: the module that was running, with ``*`` for the numbers of blocks; empty for the model itself.
        count: how many of them there are.
        reason: why they are left alone.
    """

    place: str
    count: int
    reason: Reason


@dataclass(frozen=True)
class Found:
    """What `find_branches` finds with ``explain=True``. ``print`` gives a table.

    Args:
        branches: the branches, in forward order.
        left_alone: all other sums, with the reason for each kind.
    """

    branches: tuple[Branch, ...]
    left_alone: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        cells: dict[str, tuple[str, ...]] = {b.name: (f"{b.stream}", b.skip, f"{b.levels}") for b in self.branches}
        branches = columns(("branch", "stream", "skip", "levels"), fold_names(cells))
        return "\n".join([*branches, "", *left_alone_lines(self.left_alone)])


def left_alone_lines(left_alone: Sequence[LeftAlone]) -> list[str]:
    """The sums that are no residual additions, for a terminal."""
    lines = []
    for left in left_alone:
        text = (
            f"{left.count} sum{'s' * (left.count > 1)} left alone in {left.place or 'the model'}: {left.reason.value}"
        )
        lines += textwrap.wrap(text, COLUMNS, subsequent_indent="  ")
    return lines


def left_alone_rows(left_alone: Sequence[LeftAlone]) -> Table:
    """The same, for a page."""
    rows: list[tuple[str, tuple[str, ...]]] = [
        (left.place or "the model", (f"{left.count}", left.reason.value)) for left in left_alone
    ]
    return ("sums in", "number", "why they are left alone"), rows


@dataclass(frozen=True)
class Trace:
    """What one forward pass shows of a model.

    Args:
        traced: its branches, in forward order.
        calls: how often each module was called.
        shared: parameters that several branches, or a branch and the rest of the network, use in weight operations,
            with the names of those branches.
        reached: names of the parameters that the example inputs reached.
        loose: matrices that weight operations outside all branches and shortcuts use, but for modules that the user has
            excluded.
        uses: what the network does with each parameter.
        attentions: of the network, in forward order.
        stacked: parameters of which several branches of a stream use entries; they stand in the first of these.
        trunk: the parameters of norms on a residual stream itself, with the stream.
        functions: names of the user's autograd Functions, which may hide sums.
        left_alone: all other sums, with the reason for each kind.
        sums: the numbers of all sums that the outputs' gradients reach. Others run without gradient, or are detached.
    """

    traced: tuple[TracedBranch, ...] = ()
    calls: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    loose: frozenset[str] = frozenset()
    uses: Mapping[str, tuple[Use, ...]] = field(default_factory=dict)
    attentions: tuple[Attention, ...] = ()
    stacked: frozenset[str] = frozenset()
    trunk: Mapping[str, int] = field(default_factory=dict)
    functions: tuple[str, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()
    sums: frozenset[Number] = frozenset()

    @functools.cached_property
    def branches(self) -> tuple[Branch, ...]:
        """The branches as the user sees them."""
        return tuple(traced.branch for traced in self.traced)


def roles(branches: Sequence[Branch]) -> dict[str, tuple[int, Side]]:
    """Each parameter's branch, by its index in ``branches``, and its side there. Parameters outside are not in it."""
    found: dict[str, tuple[int, Side]] = {}
    for i, branch in enumerate(branches):
        found |= dict.fromkeys(branch.inner, (i, "inner"))
        found |= dict.fromkeys(branch.outer, (i, "outer"))
    return found


@overload
def find_branches(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern | None = None,
    branches: Sequence[Pattern] | Pattern | None = None,
    explain: Literal[False] = False,
) -> tuple[Branch, ...]: ...
@overload
def find_branches(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern | None = None,
    branches: Sequence[Pattern] | Pattern | None = None,
    explain: Literal[True],
) -> Found: ...
def find_branches(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern | None = None,
    branches: Sequence[Pattern] | Pattern | None = None,
    explain: bool = False,
) -> tuple[Branch, ...] | Found:
    """The residual branches of a model, in forward order, read off one forward pass. The model stays as it was.

    Args:
        model: any module, on a real device or on ``meta``; compiled and DDP wrappers are looked through.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        include: name patterns or module classes; only branches of modules that match are returned.
        exclude: name patterns or module classes; branches of modules that match are left out.
        branches: name patterns or module classes that are declared to be branches: what such a module returns is
            added to a skip, whatever the addition looks like.
        explain: say of every other sum why it is left alone, too.

    Returns:
        The branches; an empty tuple where the network has none. With ``explain``, a `Found`.

    Raises:
        TracingError: the forward pass fails or hides its graph, a pattern matches nothing, or a declared branch is
            not added to anything.
        AmbiguousBranchError: a sum of two nonlinear paths has no recognisable skip.

    Source: the residual streams of arXiv 2310.02244, section 3; the definition of inner and outer operations of
    arXiv 2512.21075.

    >>> import torch, torch_depthmup as dm
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
    ...
    ...     def forward(self, x):
    ...         return x + self.down(torch.relu(self.up(x)))
    >>> branches = dm.find_branches(torch.nn.Sequential(Block(), Block()), torch.ones(1, 8))
    >>> [(branch.name, branch.levels, branch.carrier) for branch in branches]
    [('0', 2, ('0.down.weight', '0.down.bias')), ('1', 2, ('1.down.weight', '1.down.bias'))]
    """
    found = trace(model, example_inputs, include=include, exclude=exclude, branches=branches)
    return Found(found.branches, found.left_alone) if explain else found.branches


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern | None = None,
    branches: Sequence[Pattern] | Pattern | None = None,
    like: Trace | None = None,
) -> Trace:
    """`find_branches` with what carrying a plan out needs besides; same arguments, same errors.

    A stream inside a branch that ``like`` has is one here too, even if it has a single addition, and weights that are
    outside of its branches are outside here.
    """
    model = unwrap(model)
    included, excluded, declared = (matching(model, patterns) for patterns in (include, exclude, branches))
    graph = record(model, example_inputs)
    declared = (declared or set()) | {
        f"{name}.branch".lstrip(".") for name, module in model.named_modules() if isinstance(module, Residual)
    }
    found, reasons = residual_additions(graph, declared_nodes(graph, declared))
    outside = _outside(graph, like)
    reasons |= {residual.node: Reason.BESIDE for residual in found if residual.branch in outside}
    found = [residual for residual in found if residual.branch not in outside]
    describe_all(graph, found, outside)
    steps = inner_steps(graph, found, _nested_kinds(like))
    found = [residual for residual in found if residual.node not in steps]
    describe_all(graph, found, outside)
    names = _unique([owner_of(graph, residual) for residual in found])
    loose = loose_matrices(graph, found, excluded or set())

    def kept(owners: set[str]) -> bool:
        return (included is None or bool(owners & included)) and not owners & (excluded or set())

    reasons |= steps
    keep = [i for i, residual in enumerate(found) if kept(owners_of(graph, names[i], residual.node))]
    reasons |= {found[i].node: Reason.CHOSEN for i in range(len(found)) if i not in keep}
    found, names = [found[i] for i in keep], [names[i] for i in keep]
    doubtful = [node for node, reason in reasons.items() if reason is Reason.DOUBTFUL]
    refuse_doubtful(graph, [node for node in doubtful if kept(owners_of_sum(graph, node))])
    reasons |= dict.fromkeys(doubtful, Reason.CHOSEN)
    made = _assemble(graph, found, names)
    loose -= {name for branch in (traced.branch for traced in made.traced) for name in branch.inner}
    return dataclasses.replace(made, loose=loose, left_alone=_left_alone(graph, reasons))


def _left_alone(graph: Graph, reasons: Mapping[int, Reason]) -> tuple[LeftAlone, ...]:
    """The sums by their places, with numbers of blocks left out, and by their reasons."""
    places = (graph.additions[node].modules[-1] if node in graph.additions else "" for node in sorted(reasons))
    kinds = [(without_numbers(at).replace("#", "*"), reasons[i]) for at, i in zip(places, sorted(reasons), strict=True)]
    return tuple(LeftAlone(place, count, reason) for (place, reason), count in Counter(kinds).items())


def _outside(graph: Graph, like: Trace | None) -> set[int]:
    """The nodes of weights that are outside of all branches in ``like``: with one layer only they look like a part."""
    inside = set() if like is None else {name for traced in like.traced for name in traced.sides}
    # Of numbered weights the same name may mean another layer in a network of another depth.
    names = {n for n in (like.reached if like else ()) if n not in inside and n == without_numbers(n)}

    def is_outside(i: int) -> bool:
        weights = graph.weight_inputs(i)
        return graph.nodes[i].is_weight_operation and all(graph.nodes[j].weights <= names for j in weights)

    return {i for i in range(len(graph.nodes)) if names and is_outside(i)}


def _nested_kinds(like: Trace | None) -> set[str]:
    """The names without numbers of branches inside of branches."""
    traced = () if like is None else like.traced
    return {without_numbers(traced[i].branch.name) for outer in traced for i in outer.nested}


def _assemble(graph: Graph, found: list[ResidualAddition], names: list[str]) -> Trace:
    streams, returned, numbers = streams_of(graph, found), returned_by(graph), numbers_of(graph, found)
    depths = [streams.count(stream) for stream in range(max(streams, default=-1) + 1)]
    sides, shared = sides_of(graph, found, names, streams)
    beside = serving_one_block(graph, found, names, streams)
    sides |= {name: (i, 0) for name, i in beside.items() if name not in sides and name not in shared}
    carriers = _carriers(graph, found, sides)
    users = Counter((name, stream) for r, stream in zip(found, streams, strict=True) for name in r.parts.sides)
    traced = []
    for i, residual in enumerate(found):
        inner, outer = ([name for name, (at, side) in sides.items() if at == i and side == s] for s in (0, 1))
        branch = Branch(
            name=names[i],
            stream=streams[i],
            position=streams[:i].count(streams[i]),
            additions=depths[streams[i]],
            skip="projection" if has_weights(graph, residual) else "identity",
            levels=residual.parts.levels,
            inner=tuple(inner),
            outer=tuple(outer),
            carrier=carriers[i],
        )
        nested = (j for j, other in enumerate(found) if j != i and other.node in residual.parts.nodes)
        summands = summands_of(graph, residual.branch, residual.parts.nodes, returned)
        tapped = is_tapped(graph, residual, frozenset(branch.carrier))
        whole = {name: SIDES[side] for name, side in residual.parts.sides.items() if name in sides}
        traced.append(TracedBranch(branch, _site(graph, residual), summands, tuple(nested), tapped, whole, numbers[i]))
    return Trace(
        traced=tuple(traced),
        calls={name: len(outputs) for name, outputs in graph.outputs_of.items()},
        shared=shared,
        reached=frozenset().union(*(node.weights for node in graph.nodes)),
        uses=uses_of(graph),
        attentions=attentions_of(graph),
        sums=graph.sums,
        stacked=frozenset(name for (name, _), count in users.items() if count > 1 and name in sides),
        functions=tuple(dict.fromkeys(node.function for node in graph.nodes if node.function)),
        trunk={
            **trunk_parameters(
                graph,
                {residual.node: stream for residual, stream in zip(found, streams, strict=True)},
                [residual.start for residual in found],
            ),
            **skip_parameters(
                graph, [(r.start, r.skip, stream) for r, stream in zip(found, streams, strict=True) if not r.projection]
            ),
        },
    )


def _carriers(
    graph: Graph, found: list[ResidualAddition], sides: Mapping[str, tuple[int, int]]
) -> list[tuple[str, ...]]:
    """The carrier of each branch: empty where it is used by something else, unless that is the same layer once more.

    A layer at several steps of a recurrence carries the same multiplier at each of them.
    """
    carriers = [carrier_of(graph, residual.branch, residual.parts) for residual in found]

    def is_own(i: int, name: str) -> bool:
        at = sides[name][0] if name in sides else -1
        return at >= 0 and carriers[at] == carriers[i] and found[at].node not in found[i].parts.nodes

    return [names if all(is_own(i, name) for name in names) else () for i, names in enumerate(carriers)]


def _unique(owners: list[str]) -> list[str]:
    """Owners as names: one that several branches share is numbered in forward order."""
    return [
        owner if owners.count(owner) == 1 else f"{owner}#{owners[:i].count(owner)}" for i, owner in enumerate(owners)
    ]


def _site(graph: Graph, residual: ResidualAddition) -> Site | None:
    addition = graph.additions.get(residual.node)
    if addition is None or residual.branch not in addition.operands:
        return None
    return Site(addition.number, addition.operands.index(residual.branch))
