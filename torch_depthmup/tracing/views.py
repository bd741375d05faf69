"""Views, as autograd keeps them: what they do to one tensor they can do to another, such as one of numbered rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["View", "signed", "view_of"]

RESHAPES = ("View", "UnsafeView", "ReshapeAlias", "_ReshapeAlias", "Squeeze", "Unsqueeze")
COPIES = ("Clone", "Alias", "ToCopy")
ARGUMENTS = {
    "T": (),
    "Expand": (),
    "Transpose": ("dim0", "dim1"),
    "Permute": ("dims",),
    "Slice": ("dim", "start", "end", "step"),
    "Select": ("dim", "index"),
    "Split": ("split_size", "dim"),
    "SplitWithSizes": ("split_sizes", "dim"),
    "Unbind": ("dim",),
    **dict.fromkeys(RESHAPES + COPIES, ()),
}
"""What autograd keeps of each operation."""


@dataclass(frozen=True)
class View:
    """A view, or a copy of one.

    Args:
        operation: as autograd calls it.
        arguments: numbers and tuples of them.
        output: which of its values, where it has several.
    """

    operation: str
    arguments: tuple[Any, ...]
    output: int

    def of(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The same view of another tensor; ``shape`` is that of its value."""
        if self.operation in COPIES:
            return tensor
        if self.operation in RESHAPES:
            return tensor.reshape(shape)
        if self.operation == "Expand":
            return tensor.expand(shape)
        if self.operation == "T":
            return tensor.t()
        if self.operation == "Slice":
            dim, start, end, step = self.arguments
            index = [slice(None)] * tensor.ndim
            index[dim] = slice(start, end, step)
            return tensor[tuple(index)]
        method = {"SplitWithSizes": "split_with_sizes"}.get(self.operation, self.operation.lower())
        value = getattr(tensor, method)(*self.arguments)
        return value if isinstance(value, Tensor) else value[self.output]


def view_of(autograd_node: Any, output: int) -> View | None:
    """The view that a node is; ``None`` where it is none that is known."""
    operation = type(autograd_node).__name__.partition("Backward")[0]
    if operation not in ARGUMENTS:
        return None
    saved = [getattr(autograd_node, f"_saved_{name}") for name in ARGUMENTS[operation]]
    return View(operation, tuple(tuple(map(signed, v)) if isinstance(v, tuple) else signed(v) for v in saved), output)


def signed(number: int) -> int:
    """A number that autograd keeps as an unsigned one: -1 as 2 ** 64 - 1."""
    return number - 2**64 if number >= 2**63 else number
