"""What the user chooses of a network: patterns over modules, declared branches; and the sums that they must decide."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import nn

from torch_depthmup.errors import AmbiguousBranchError, TracingError
from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.operations import Kind

__all__ = [
    "Pattern",
    "above",
    "declared_nodes",
    "is_matched",
    "linear_way",
    "matching",
    "owners_of",
    "owners_of_sum",
    "refuse_doubtful",
]

Pattern = str | type[nn.Module]
"""A name pattern (``fnmatch``, over module names) or a module class."""


def matching(model: nn.Module, patterns: Sequence[Pattern] | Pattern | None) -> set[str] | None:
    """Names of the modules that match, with everything below them."""
    if patterns is None:
        return None
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str | type) else patterns:
        hits = _hits(model, pattern)
        if not hits:
            raise TracingError(f"no module of {type(model).__name__} matches {pattern!r}. See model.named_modules()")
        matched |= hits
    return matched


def is_matched(model: nn.Module, pattern: Pattern) -> bool:
    """Whether any module matches."""
    return bool(_hits(model, pattern))


def _hits(model: nn.Module, pattern: Pattern) -> set[str]:
    if isinstance(pattern, type):
        return {name for name, module in model.named_modules() if isinstance(module, pattern)}
    return {name for name, _ in model.named_modules() if fnmatch.fnmatchcase(name, pattern)}


def owners_of(graph: Graph, name: str, node: int) -> set[str]:
    """The branch's name, the modules that were running at its addition, and all modules above them."""
    running = graph.additions[node].modules[1:] if node in graph.additions else ()
    path = re.sub(r"#\d+$", "", name)
    parts = path.split(".") if path else []
    return {".".join(parts[: i + 1]) for i in range(len(parts))} | set(running)


def declared_nodes(graph: Graph, declared: set[str]) -> dict[int, str]:
    nodes: dict[int, str] = {}
    for name in declared:
        for outputs in graph.outputs_of.get(name, ()):
            nodes.update({node: name for node in outputs[:1] if node >= 0})
    return nodes


def above(name: str) -> list[str]:
    """The modules that hold a parameter or a module, from the outermost on."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts) - 1)]


def owners_of_sum(graph: Graph, node: int) -> set[str]:
    """The modules that were running at a sum and, where only the model itself was, those that its operands come from.

    So ``exclude=`` can name one of two heads whose values the model's own forward adds.
    """
    running = owners_of(graph, "", node)
    return running or {module for operand in graph.nodes[node].inputs for module in _last_modules(graph, operand)}


def _last_modules(graph: Graph, node: int) -> list[str]:
    """The modules that hold the last weights before a value, the innermost last; empty where there are none."""
    while node >= 0 and not graph.nodes[node].is_weight_operation:
        data = graph.data_inputs(node)
        if len(data) != 1:
            return []
        node = data[0]
    names = [name for j in graph.weight_inputs(node) for name in sorted(graph.nodes[j].weights)] if node >= 0 else []
    return above(names[0]) if names else []


def refuse_doubtful(graph: Graph, doubtful: Iterable[int]) -> None:
    """Refuses a sum that may or may not be residual, with what can be written about it."""
    for node in doubtful:
        addition = graph.additions.get(node)
        where = next((name for name in reversed(addition.modules) if name), "") if addition else ""
        if custom := _custom(graph, node):
            raise AmbiguousBranchError(
                f"{where or 'the model'}: the sum of two nonlinear paths has no skip that could be told from the "
                f"branch, and {custom}, an autograd Function, may hide other sums. Write its sum with + while "
                "branches are looked for"
            )
        operands = [_last_modules(graph, operand) for operand in graph.nodes[node].inputs if operand >= 0]
        ends = [modules[-1] for modules in operands if modules]
        named = declarable(graph, node)
        advice = [f"Name the branch: branches=['{named[-1]}']"] if named else []
        if where or ends:
            advice.append(f"{'or l' if advice else 'L'}eave the sum alone: exclude=['{where or ends[-1]}']")
        else:
            advice.append("Write the block with dm.Residual, or let the branch be what a module returns")
        raise AmbiguousBranchError(
            f"{where or 'the model'}: the sum of two nonlinear paths has no skip that could be told from the branch. "
            f"{', '.join(advice)}"
        )


def _custom(graph: Graph, node: int) -> str:
    """The class of an autograd Function of the user's that a sum is computed from."""
    found = (i for i, n in enumerate(graph.nodes) if n.kind is Kind.CUSTOM and graph.reaches(node, i))
    return next((graph.nodes[i].function for i in found), "")


def declarable(graph: Graph, node: int) -> list[str]:
    """The modules that may be declared as a sum's branch: what they return is added, but for linear steps."""
    ends = {i for operand in graph.nodes[node].inputs for i in linear_way(graph, operand)}
    calls = graph.outputs_of.items()
    return [
        name for name, outputs in calls if name and any(returned[:1] and returned[0] in ends for returned in outputs)
    ]


def linear_way(graph: Graph, node: int) -> list[int]:
    """A value and those that it is computed from by linear steps alone, each from one value."""
    steps = [node] if node >= 0 else []
    while steps and graph.nodes[steps[-1]].is_linear and len(graph.data_inputs(steps[-1])) == 1:
        steps.append(graph.data_inputs(steps[-1])[0])
    return steps
