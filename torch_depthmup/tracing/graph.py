"""One forward pass, recorded: the autograd graph as plain data, and the model left as it was.

This room knows tensors, modules and autograd nodes, and no residual branches: `tracing.py` finds those in a `Graph`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from torch_depthmup.errors import TracingError
from torch_depthmup.running import call, fresh, is_sharded, quiet, tensors_in
from torch_depthmup.tracing.operations import addition_operands

__all__ = ["Addition", "Graph", "MATRIX", "record"]


MATRIX = re.compile(
    r"^_?(Mm|Addmm|Bmm|Baddbmm|Addbmm|Mv|Addmv|Linear|Matmul|GroupedMm|ScaledMm|ScaledGroupedMm|\w*Conv(olution)?\w*)"
    r"Backward\d*$"
)
RECURRENT = re.compile(r"(Rnn|Lstm|Gru)\w*Backward\d*$")
SOURCE = re.compile(r"^(Embedding|EmbeddingBag|Index|IndexSelect|Gather)\w*Backward\d*$")


@dataclass(frozen=True)
class Addition:
    """An addition written in Python: which one in the order of the forward pass, and the nodes of its operands."""

    ordinal: int
    operands: tuple[int, int]
    modules: tuple[str, ...]


@dataclass
class Graph:
    """The autograd graph of one forward pass, in topological order: a node's inputs come before it.

    ``inputs[i]`` holds the indices of node ``i``'s operands, ``-1`` for an operand without gradient. ``ancestors[i]``
    is a bit set that contains ``i`` itself. ``weights[i]`` names the parameters of a node that depends on nothing
    else; a node with ``data[i]`` depends on the network's inputs. ``direct[i]``: its value is one parameter, at most
    viewed. ``outputs_of[name]`` holds for each call of a module the nodes of what it returned, ``-1`` for what is not
    in the graph.
    """

    kind: list[str] = field(default_factory=list)
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    consumers: list[list[int]] = field(default_factory=list)
    data: list[bool] = field(default_factory=list)
    weights: list[frozenset[str]] = field(default_factory=list)
    direct: list[bool] = field(default_factory=list)
    is_weight_operation: list[bool] = field(default_factory=list)
    is_scalar: list[bool] = field(default_factory=list)
    ancestors: list[int] = field(default_factory=list)
    additions: dict[int, Addition] = field(default_factory=dict)
    outputs_of: dict[str, list[list[int]]] = field(default_factory=dict)

    def reaches(self, node: int, ancestor: int) -> bool:
        """Whether ``ancestor`` is ``node`` or one of its ancestors."""
        return bool(self.ancestors[node] >> ancestor & 1)

    def data_inputs(self, node: int) -> list[int]:
        """The operands of a node that depend on the network's inputs."""
        return [i for i in self.inputs[node] if i >= 0 and self.data[i]]

    def weight_inputs(self, node: int) -> list[int]:
        """The operands of a node that depend on parameters only."""
        return [i for i in self.inputs[node] if i >= 0 and not self.data[i]]


class _Recorder(TorchFunctionMode):
    """Notes additions with the nodes of their operands, and which module calls returned which nodes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.stack: list[str] = []
        self.additions: list[tuple[Any, tuple[Any, Any], tuple[str, ...]]] = []
        self.returned: list[tuple[str, list[Any]]] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True  # no data, no answer: libraries ask for shortcuts, such as "is the mask all ones?"
        operands = addition_operands(func, args, kwargs or {})
        if operands is None:
            return func(*args, **(kwargs or {}))
        before = (_producer(operands[0]), _producer(operands[1]))
        result = func(*args, **(kwargs or {}))
        # Every addition counts, also one without gradient: the ordinal must be the same in a later pass.
        self.additions.append((_producer(result), before, tuple(self.stack)))
        return result

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            self.stack.append(self.names.get(id(module), ""))

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            self.stack.pop()
            if id(module) in self.names:
                outputs = output if isinstance(output, tuple | list) else (output,)
                self.returned.append((self.names[id(module)], [_producer(value) for value in outputs]))

        handles = [
            module_hooks.register_module_forward_pre_hook(enter),
            module_hooks.register_module_forward_hook(leave),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def _producer(value: Any) -> Any:
    """The autograd node that produced a tensor; for a leaf, the node that would accumulate its gradient."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    if value.grad_fn is not None:
        return value.grad_fn
    return torch.autograd.graph.get_gradient_edge(value).node


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
    recorder = _Recorder(model)
    with quiet(model):
        try:
            with recorder.watching():
                output = call(model, fresh(example_inputs))
        except TracingError:
            raise
        except Exception as error:
            advice = "Pass inputs it accepts: a tensor, a tuple of positional or a dict of keyword arguments"
            if "meta tensors" in str(error):
                advice = "Its forward asks for a value, which meta has not: leave out inputs such as attention masks"
            raise TracingError(
                f"{type(model).__name__} failed on the example inputs: {type(error).__name__}: {error}. {advice}"
            ) from error
        roots = [node for tensor in tensors_in(output) if (node := _producer(tensor)) is not None]
        if not roots:
            raise TracingError(
                f"{type(model).__name__} returned no tensor that depends on its parameters with a gradient. Do not run "
                "it under torch.no_grad inside forward, and return the output tensors"
            )
        return _build(_topological(roots), model, recorder)


def _topological(roots: list[Any]) -> list[Any]:
    """All nodes behind the roots, inputs first. Written without recursion, since deep networks are the point."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((next_, False) for next_, _ in node.next_functions if next_ is not None and next_ not in seen)
    return order


def _build(order: list[Any], model: nn.Module, recorder: _Recorder) -> Graph:
    index = {node: i for i, node in enumerate(order)}
    names: dict[int, str] = {}
    ndims: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)], ndims[name] = name, parameter.ndim
    graph = Graph()
    for i, node in enumerate(order):
        kind = type(node).__name__
        if kind == "CheckpointFunctionBackward":
            raise TracingError(
                "gradient checkpointing (use_reentrant=True) hides the graph. Switch it off while tracing, for example "
                "model.gradient_checkpointing_disable(), or write use_reentrant=False"
            )
        inputs = tuple(-1 if next_ is None else index[next_] for next_, _ in node.next_functions)
        _append(graph, i, kind, inputs, node, names, ndims)
    for ordinal, (result, operands, modules) in enumerate(recorder.additions):
        if result in index and all(operand in index for operand in operands):
            first, second = operands
            graph.additions[index[result]] = Addition(ordinal, (index[first], index[second]), modules)
    for name, nodes in recorder.returned:
        graph.outputs_of.setdefault(name, []).append([index.get(node, -1) for node in nodes])
    return graph


def _append(
    graph: Graph, i: int, kind: str, inputs: tuple[int, ...], node: Any, names: dict[int, str], ndims: dict[str, int]
) -> None:
    present = [j for j in inputs if j >= 0]
    variable = getattr(node, "variable", None) if kind == "AccumulateGrad" else None
    name = None if variable is None else names.get(id(variable))
    weights = frozenset[str]().union(*(graph.weights[j] for j in present if not graph.data[j]))
    # A matrix product whose other operand needs no gradient multiplies data that was made inside forward.
    custom = issubclass(type(node), torch.autograd.function.BackwardCFunction)
    matrix = bool(MATRIX.match(kind) or RECURRENT.search(kind)) or custom
    matrices = [j for j in present if not graph.data[j] and any(ndims[w] >= 2 for w in graph.weights[j])]
    constant = matrix and not custom and -1 in (inputs[:1] if "Conv" in kind or "Linear" in kind else inputs[-2:])
    leaf_data = kind == "AccumulateGrad" and name is None
    data = leaf_data or any(graph.data[j] for j in present) or bool(SOURCE.match(kind)) or constant
    graph.kind.append(kind)
    graph.inputs.append(inputs)
    graph.consumers.append([])
    graph.data.append(data)
    graph.weights.append(frozenset() if data else weights | ({name} if name else frozenset()))
    viewed = len(present) == 1 and len(inputs) == 1 and VIEW.match(kind) is not None and graph.direct[present[0]]
    graph.direct.append(not data and (name is not None or viewed))
    graph.is_weight_operation.append(data and matrix and bool(matrices))
    graph.is_scalar.append(_is_scalar(node))
    ancestors = 1 << i
    for j in present:
        ancestors |= graph.ancestors[j]
        graph.consumers[j].append(i)
    graph.ancestors.append(ancestors)


def _is_scalar(node: Any) -> bool:
    metadata = getattr(node, "_input_metadata", None) or ()
    return len(metadata) > 0 and all(len(m.shape) == 0 for m in metadata if m is not None)


VIEW = re.compile(
    r"^(View|UnsafeView|ReshapeAlias|AsStrided|T|Transpose|Permute|Expand|Squeeze|Unsqueeze|Slice|Select|Split|"
    r"SplitWithSizes|Unbind|Clone|ToCopy|Alias|MovedimInt|Narrow|Unflatten|Repeat|Chunk)(WithSizes)?Backward\d*$"
)
"""Kinds of nodes that rearrange one tensor, or copy it."""
