"""One forward pass, recorded: the autograd graph as plain data, and the model left as it was.

This room knows tensors, modules and autograd nodes, and no residual branches: `additions.py` finds those in a `Graph`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_depthmup.errors import TracingError
from torch_depthmup.running import is_sharded, quiet, tensors_in, trial
from torch_depthmup.tracing.numbers import alpha_of, factor_of, power_of
from torch_depthmup.tracing.operations import Kind, Number, kind_of, kind_of_write
from torch_depthmup.tracing.recorder import Edge, Recorder, producer
from torch_depthmup.tracing.views import View, signed, view_of

__all__ = ["Addition", "Graph", "Node", "record"]


@dataclass(frozen=True)
class Addition:
    """An addition written in Python: which one in the order of the forward pass, and the nodes of its operands."""

    ordinal: int
    number: Number
    operands: tuple[int, int]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """A value of the forward pass: an output of a node of the autograd graph.

    Args:
        kind: what it does.
        inputs: the indices of its operands, ``-1`` for an operand without gradient.
        ancestors: a bit set over indices: what it is computed from, itself included.
        is_data: whether it depends on the network's inputs.
        weights: names of the parameters that it depends on, if it depends on nothing else.
        is_direct: whether its value is one parameter, at most viewed.
        is_linear: whether it is linear in its data, given that only one operand is data, or that it adds.
        is_linear_in_weights: whether it is made of parameters and constants, and linear in all parameters together: a
            masked weight, or one that a constant matrix is applied to.
        is_weight_operation: whether it multiplies data with a parameter of two or more dimensions.
        is_scalar: whether its value is a single number.
        shape: of its value.
        function: the name of the user's autograd Function, if it is one.
        factor: the number that it multiplies its operand with; 1 where there is none, NaN where that is a tensor on
            ``meta``.
        power: the power of a positive factor of its data that its value gets, 1 for what is linear and 2 for a square;
            NaN where there is none. Of a product or quotient of two data it is each one's.
        alpha: what a sum multiplies its second operand with.
        view: the view of its operand that it is, if it is one.
    """

    kind: Kind
    inputs: tuple[int, ...]
    ancestors: int
    is_data: bool
    weights: frozenset[str]
    is_direct: bool
    is_linear: bool
    is_linear_in_weights: bool
    is_weight_operation: bool
    is_scalar: bool
    shape: tuple[int, ...] = ()
    function: str = ""
    factor: float = 1.0
    power: float = math.nan
    alpha: float = 1.0
    view: View | None = None

    @property
    def keeps_positive_factors(self) -> bool:
        """Whether a positive multiple of its data gives the same multiple of its value."""
        return self.is_linear or self.kind in (Kind.HOMOGENEOUS, Kind.MAX_POOL)


@dataclass(frozen=True)
class Graph:
    """The autograd graph of one forward pass, in topological order: a node's inputs come before it.

    Args:
        nodes: all of them.
        consumers: for each node the indices of the nodes that it is an operand of.
        additions: the additions written in Python, by node.
        sums: the numbers of all sums whose value is in the graph.
        outputs_of: for each call of a module the nodes of what it returned, ``-1`` for what is not in the graph.
        outputs: the nodes of what the model returned.
    """

    nodes: tuple[Node, ...]
    consumers: tuple[tuple[int, ...], ...]
    additions: Mapping[int, Addition]
    sums: frozenset[Number]
    outputs_of: Mapping[str, list[list[int]]]
    outputs: frozenset[int]

    def reaches(self, node: int, ancestor: int) -> bool:
        """Whether ``ancestor`` is ``node`` or one of its ancestors."""
        return bool(self.nodes[node].ancestors >> ancestor & 1)

    def only(self, one: int, other: int) -> int:
        """What ``one`` is computed from and ``other`` is not, as a bit set."""
        return self.nodes[one].ancestors & ~self.nodes[other].ancestors

    def data_inputs(self, node: int) -> list[int]:
        """The operands of a node that depend on the network's inputs."""
        return [i for i in self.nodes[node].inputs if i >= 0 and self.nodes[i].is_data]

    def weight_inputs(self, node: int) -> list[int]:
        """The operands of a node that depend on parameters only."""
        return [i for i in self.nodes[node].inputs if i >= 0 and not self.nodes[i].is_data]


def record(model: nn.Module, example_inputs: Any) -> Graph:
    """Runs the model once and returns its autograd graph. The model stays as it was.

    Args:
        model: any module, on a real device or on ``meta``.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        TracingError: the forward pass fails, gives nothing differentiable, or hides its graph (gradient checkpointing
            with re-entrant autograd, sharded parameters).
    """
    if name := next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None):
        raise TracingError(
            f"{name} is sharded, which hides where weights are used. Look at the whole model before it is sharded, or "
            "at a twin on one process that loads the full state dict"
        )
    recorder = Recorder(model)
    with quiet(model):
        try:
            with recorder.watching():
                output = trial(model, example_inputs)
        except TracingError:
            raise
        except Exception as error:
            advice = "Pass inputs it accepts: a tensor, a tuple of positional or a dict of keyword arguments"
            if "meta tensors" in str(error):
                advice = "Its forward asks for a value, which meta has not: leave out inputs such as attention masks"
            raise TracingError(
                f"{type(model).__name__} failed on the example inputs: {type(error).__name__}: {error}. {advice}"
            ) from error
        roots = [node for tensor in tensors_in(output) if (node := producer(tensor)) is not None]
        if not roots:
            raise TracingError(
                f"{type(model).__name__} returned no tensor that depends on its parameters with a gradient. Do not run "
                "it under torch.no_grad inside forward, and return the output tensors"
            )
        return _build(_topological(roots), roots, model, recorder)


def _topological(roots: list[Edge]) -> list[Edge]:
    """All values behind the roots, inputs first. Written without recursion, since deep networks are the point."""
    order: list[Edge] = []
    seen: set[Edge] = set()
    stack: list[tuple[Edge, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((next_, False) for next_ in _operands(node) if next_ not in seen)
    return order


def _operands(edge: Edge) -> list[Edge]:
    return [next_ for next_ in edge[0].next_functions if next_[0] is not None]


def _build(order: list[Edge], roots: list[Edge], model: nn.Module, recorder: Recorder) -> Graph:
    nodes, index = _nodes(order, model, recorder.writes)
    outputs = frozenset(index[root] for root in roots)
    consumers = _consumers(nodes, outputs)
    additions = {}
    for ordinal, (number, result, operands, modules) in enumerate(recorder.additions):
        if result is None or result not in index or not nodes[index[result]].kind.is_sum:
            continue
        first, second = (
            nodes[index[result]].inputs[:2]
            if operands is None
            else (index.get(edge) if edge else None for edge in operands)
        )
        if first is not None and second is not None:
            additions[index[result]] = Addition(ordinal, number, (first, second), modules)
    outputs_of: dict[str, list[list[int]]] = {}
    for name, returned in recorder.returned:
        outputs_of.setdefault(name, []).append([_index(index, edge, base) for edge, base in returned])
    sums = frozenset(number for number, result, _, _ in recorder.additions if result in index)
    return Graph(tuple(nodes), tuple(map(tuple, consumers)), additions, sums, outputs_of, outputs)


def _nodes(order: list[Edge], model: nn.Module, writes: Mapping[Edge, str]) -> tuple[list[Node], dict[Edge, int]]:
    """The nodes of all values, and the index of each.

    A weight that multiplies a constant is a layer on data that was made inside forward (positions), or it is still a
    weight (a spectral norm, a constant basis). What becomes of the product tells.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ndims = {name: parameter.ndim for name, parameter in model.named_parameters()}
    constant: set[Edge] = set()
    while True:
        index: dict[Edge, int] = {}
        nodes: list[Node] = []
        products: dict[int, Edge] = {}
        for edge in order:
            for kind, inputs in _steps(edge, nodes, index, writes):
                nodes.append(_node(kind, inputs, edge, nodes, names, ndims, edge in constant))
                if not nodes[-1].is_data and nodes[-1].weights and _multiplies_constant(kind, inputs):
                    products[len(nodes) - 1] = edge
            index[edge] = len(nodes) - 1
        found = _not_weights(nodes, products)
        if not found:
            return nodes, index
        constant |= {products[i] for i in found}


def _not_weights(nodes: Sequence[Node], products: Iterable[int]) -> list[int]:
    """The products of weights and constants that data are not multiplied with; of those that meet none, the last."""
    made_of: dict[int, set[int]] = {i: {i} for i in products}
    met, otherwise = set[int](), set[int]()
    for i, node in enumerate(nodes):
        for j in node.inputs:
            if j not in made_of:
                continue
            if not node.is_data:
                made_of.setdefault(i, set()).update(made_of[j])
                continue
            met |= made_of[j]
            is_matrix = node.kind is Kind.CONVOLUTION or node.kind is Kind.MATRIX_PRODUCT and len(nodes[j].shape) <= 2
            # An operation's weights come before its data, so the last one starts the way; others may be weights on it.
            otherwise |= set() if is_matrix else {max(made_of[j])}
    return sorted(otherwise) or [i for i in products if i not in met][-1:]


def _consumers(nodes: list[Node], outputs: frozenset[int]) -> list[list[int]]:
    """For each node those that take it, but for what nothing takes in turn: a stack that is read as a sum."""
    consumers: list[list[int]] = [[] for _ in nodes]
    for i in range(len(nodes) - 1, -1, -1):
        if consumers[i] or i in outputs:
            for j in nodes[i].inputs:
                if j >= 0:
                    consumers[j].append(i)
    return [taking[::-1] for taking in consumers]


def _steps(
    edge: Edge, nodes: list[Node], index: Mapping[Edge, int], writes: Mapping[Edge, str]
) -> list[tuple[Kind, tuple[int, ...]]]:
    """What a node does, each step with its operands: a fused one multiplies first and adds then."""
    autograd_node = edge[0]
    name = type(autograd_node).__name__
    custom = issubclass(type(autograd_node), torch.autograd.function.BackwardCFunction)
    kind = kind_of(name, custom) if name != "CopySlices" else kind_of_write(writes.get(edge, ""))
    if kind is Kind.CHECKPOINT:
        raise TracingError(
            "gradient checkpointing (use_reentrant=True) hides the graph. Switch it off while tracing, for example "
            "model.gradient_checkpointing_disable(), or write use_reentrant=False"
        )
    inputs = _indices(autograd_node, index)
    operation, following = name.partition("Backward")[0], len(nodes)
    if operation in ("Addcmul", "Addcdiv"):
        product = Kind.MULTIPLY if operation == "Addcmul" else Kind.DIVIDE
        return [(product, inputs[1:]), (Kind.ADD, (inputs[0], following))]
    if operation in ("Addmm", "Baddbmm", "Addmv", "SparseAddmm") and inputs[0] >= 0 and nodes[inputs[0]].is_data:
        return [(kind, inputs[1:]), (Kind.ADD, (inputs[0], following))]
    if operation == "Linear":
        return [(kind, (*inputs[2:], *inputs[:2]))]  # the bias first, as everywhere else
    if operation == "Lerp":
        weight = inputs[2] if len(inputs) > 2 else -1
        difference, step = (Kind.SUBTRACT, (inputs[1], inputs[0])), (Kind.MULTIPLY, (following, weight))
        return [difference, step, (Kind.ADD, (inputs[0], following + 1))]
    if operation in ("IndexAdd", "ScatterAdd") and min(inputs) >= 0:
        return [(Kind.ADD, inputs)]
    if operation in ("Sum", "Mean") and (stacked := _stacked(autograd_node)) is not None:
        return [(Kind.ADD, _indices(stacked, index))]
    return [(kind, inputs)]


def _indices(autograd_node: Any, index: Mapping[Edge, int]) -> tuple[int, ...]:
    return tuple(-1 if next_[0] is None else index[next_] for next_ in autograd_node.next_functions)


def _index(index: Mapping[Edge, int], edge: Edge | None, base: Edge | None) -> int:
    """Where a returned value is in the graph: itself, or what it was a view of; else -1."""
    return next((index[found] for found in (edge, base) if found is not None and found in index), -1)


def _stacked(autograd_node: Any) -> Any:
    """The stack of two tensors that a sum over its new dimension undoes, at most with its dimensions in other order."""
    before = autograd_node.next_functions[0][0]
    dims: tuple[int, ...] = getattr(autograd_node, "_saved_dim", None) or ()
    if len(dims) != 1 or autograd_node._saved_keepdim:
        return None
    ndim = len(autograd_node._input_metadata[0].shape) + 1
    dim = signed(dims[0]) % ndim
    if type(before).__name__ == "PermuteBackward0":
        dim, before = signed(before._saved_dims[dim]) % ndim, before.next_functions[0][0]
    if type(before).__name__ != "StackBackward0" or len(before.next_functions) != 2:
        return None
    return before if dim == signed(before._saved_dim) % ndim else None


def _node(
    kind: Kind,
    inputs: tuple[int, ...],
    edge: Edge,
    nodes: list[Node],
    names: Mapping[int, str],
    ndims: Mapping[str, int],
    starts_data: bool,
) -> Node:
    autograd_node, shapes = edge[0], _shapes(edge[0])
    present = [nodes[j] for j in inputs if j >= 0]
    weights = frozenset[str]().union(*(operand.weights for operand in present))
    ancestors = 1 << len(nodes)
    for operand in present:
        ancestors |= operand.ancestors
    name = names.get(id(autograd_node.variable), "") if kind is Kind.LEAF else ""
    starts_data |= kind is Kind.LOOKUP or (kind is Kind.LEAF and not name)
    is_data = starts_data or any(operand.is_data for operand in present)
    views_one = kind is Kind.VIEW and len(inputs) == len(present) == 1 and present[0].is_direct
    return Node(
        kind=kind,
        inputs=inputs,
        ancestors=ancestors,
        is_data=is_data,
        weights=frozenset() if is_data else weights | ({name} if name else frozenset()),
        is_direct=not is_data and (bool(name) or views_one),
        is_linear=kind.is_linear or kind.takes_one_factor_of_data and len(present) == 1,
        is_linear_in_weights=not is_data and (bool(name) or _is_linear_in_weights(kind, inputs, present)),
        is_weight_operation=is_data and kind.can_hold_weights and any(ndims[weight] >= 2 for weight in weights),
        is_scalar=bool(shapes) and not any(shapes),
        shape=_shape_of(edge),
        function=_function(type(autograd_node).__name__) if kind is Kind.CUSTOM else "",
        factor=factor_of(kind, autograd_node),
        alpha=alpha_of(autograd_node),
        power=power_of(kind, autograd_node),
        view=view_of(autograd_node, edge[1]) if kind is Kind.VIEW else None,
    )


def _function(name: str) -> str:
    """What the user calls the Function, or the operator of ``torch.library``, that this node belongs to."""
    return name.removeprefix("GeneratedBackwardFor_").removesuffix("_default").removesuffix("Backward")


def _multiplies_constant(kind: Kind, inputs: tuple[int, ...]) -> bool:
    """Whether it is a product with a value that needs no gradient."""
    if kind is Kind.CONVOLUTION:
        return -1 in inputs[:1]
    return kind in (Kind.MATRIX_PRODUCT, Kind.RECURRENT) and -1 in inputs[-2:]


def _is_linear_in_weights(kind: Kind, inputs: tuple[int, ...], operands: Sequence[Node]) -> bool:
    """Whether it is linear in its operands, all of which are so in the weights that they are made of."""
    if not operands or not all(operand.is_linear_in_weights for operand in operands):
        return False
    if kind.is_sum:
        return len(operands) > 1  # else it adds a constant
    if kind.is_product or kind.takes_one_factor_of_data:
        return len(operands) == 1 and (kind is not Kind.DIVIDE or inputs[0] >= 0)
    return kind.is_linear


def _shapes(autograd_node: Any) -> list[tuple[int, ...]]:
    """The shapes of what a node gives, as far as they are known."""
    return [_shape(m) for m in getattr(autograd_node, "_input_metadata", None) or () if m is not None]


def _shape_of(edge: Edge) -> tuple[int, ...]:
    """The shape of one of the values that a node gives, or of the first that is known."""
    given = getattr(edge[0], "_input_metadata", None) or ()
    own = given[edge[1]] if edge[1] < len(given) else None
    return _shape(own) if own is not None else next(iter(_shapes(edge[0])), ())


def _shape(metadata: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(metadata.shape)
    except RuntimeError:  # of a nested tensor
        return (-1,)
    # A size that differs from sample to sample (torch.jagged) is no number.
    return tuple(int(size) if str(size).isdigit() else -1 for size in sizes)
