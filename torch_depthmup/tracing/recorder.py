"""Watches a forward pass: which sums are written in it, and which module calls returned which values.

A value is told by its autograd edge. Knows no graph: `graph.py` makes one of what is noted here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from torch_depthmup.tracing.operations import Number, Sums, addition_operands

__all__ = ["Edge", "Recorder", "producer"]


Edge = tuple[Any, int]
"""An autograd node and the number of its output: the halves of a chunk are values of their own."""


class Recorder(TorchFunctionMode):
    """Notes additions with the nodes of their operands, and which module calls returned which nodes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.stack: list[str] = []
        self.sums = Sums()
        # Every sum: its number, its edge, its operands' edges where Python names both, and the modules then running.
        self.additions: list[tuple[Number, Edge | None, tuple[Edge | None, ...] | None, tuple[str, ...]]] = []
        self.writes: dict[Edge, str] = {}  # the edge of an in-place write into a view, and the function that wrote
        self.returned: list[tuple[str, list[tuple[Edge | None, Edge | None]]]] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True  # no data, no answer: libraries ask for shortcuts, such as "is the mask all ones?"
        kwargs = kwargs or {}
        is_sum, summands = self.sums.operands(func, args, kwargs) is not None, addition_operands(func, args, kwargs)
        before = None if summands is None else tuple(map(producer, summands))
        if summands is not None and _is_in_place(func):
            before = _written(summands[0]), producer(summands[1])
        result = func(*args, **kwargs)
        edge, written = _producers(result)
        if written is not None and type(written[0]).__name__ == "CopySlices" and written not in self.writes:
            edge = written
            self.writes[written] = func.__name__
        self.sums.note(func, args, kwargs, result)
        if is_sum:
            self.additions.append((self.sums.number(func), edge, before, tuple(self.stack)))
        return result

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.get_ident()

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:
                self.stack.append(self.names.get(id(module), ""))

        def leave(module: nn.Module, _: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            self.stack.pop()
            if isinstance(module, nn.Identity) and isinstance(output, Tensor):
                # A value of its own, so that what takes it can be told from what takes the identity's input.
                output = output.view_as(output)
            if id(module) in self.names:
                outputs = output if isinstance(output, tuple | list) else (output,)
                self.returned.append((self.names[id(module)], [_producers(value) for value in outputs]))
            return output

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


def producer(value: Any) -> Edge | None:
    """What produced a tensor; for a leaf, the node that would accumulate its gradient."""
    # Where autograd does not record, as inside of a custom Function's forward, a view of a weight has no node.
    if not isinstance(value, Tensor) or not value.requires_grad or not torch.is_grad_enabled():
        return None
    try:
        edge = torch.autograd.graph.get_gradient_edge(value)
    except (RuntimeError, NotImplementedError):  # it takes a view of a leaf, which not every layout has
        copied: Any = value.clone().grad_fn
        return copied.next_functions[0]
    return edge.node, edge.output_nr


def _producers(value: Any) -> tuple[Edge | None, Edge | None]:
    """A tensor's edge, and that of what it is a view of: an in-place sum replaces the former."""
    return producer(value), _written(value) if isinstance(value, Tensor) else None


def _is_in_place(func: Callable) -> bool:
    return func.__name__ in ("__iadd__", "__isub__") or func.__name__.endswith("_") and not func.__name__.endswith("__")


def _written(value: Tensor) -> Edge | None:
    """The edge that an in-place function writes to: that of the tensor itself, or of what it is a view of."""
    base = value._base if value._is_view() else None
    return producer(value if base is None else base)
