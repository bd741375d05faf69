"""Modules for one's own blocks, and what ``how="wrap"`` leaves on a user's module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Residual"]


class Residual(nn.Module):
    """A residual block: ``shortcut(x) + branch(x)``. `find_branches` takes its branch without looking further.

    Args:
        branch: the module whose output is added; called with all arguments of the block.
        shortcut: a module for the skip, called with the first argument; ``None`` is the identity.

    Shapes:
        input ``x`` of any shape; branch and shortcut return tensors that can be added. A branch that returns a tuple
        has its first element added, and the block returns the tuple with the sum in its place.

    Raises:
        TypeError: ``branch`` or ``shortcut`` is not a module.

    >>> import torch, torch_depthmup as dm
    >>> block = dm.Residual(torch.nn.Linear(4, 4))
    >>> x = torch.ones(2, 4)
    >>> torch.equal(block(x), x + block.branch(x))
    True
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None):
        super().__init__()
        for label, module in (("branch", branch), ("shortcut", shortcut)):
            if not isinstance(module, nn.Module) and (label == "branch" or module is not None):
                raise TypeError(f"Residual({label}=...) takes an nn.Module, not {type(module).__name__}")
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        skip = x if self.shortcut is None else self.shortcut(x)
        value = self.branch(x, *args, **kwargs)
        return (skip + value[0], *value[1:]) if isinstance(value, tuple) else skip + value
