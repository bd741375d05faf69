"""The multiplier of ``how="wrap"``: a forward hook on the module that returns a branch.

``torch.compile`` reuses compiled code for every module of a class and does not look at forward hooks, so a network
without hooks that was compiled before would decide what a network with hooks computes. A module with a multiplier
therefore gets a class of its own, with the same name and a different identity, which the compiler does look at.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torch_depthmup.errors import PlanError
from torch_depthmup.scaling.plan import Hook, PlannedBranch
from torch_depthmup.tracing.branches import Trace

__all__ = [
    "BranchMultiplier",
    "branch_hooks",
    "hang",
    "hang_again",
    "hooked",
    "multiply",
    "plain_class",
    "take_off",
    "targets",
]


class BranchMultiplier:
    """A forward hook that multiplies what a module returns. Pickles, deep-copies, exports and compiles with its module.

    Args:
        multiplier: the factor.
        index: which element to multiply where the module returns a tuple or list; of a single tensor, 0.
    """

    def __init__(self, multiplier: float, index: int = 0):
        self.multiplier = multiplier
        self.index = index

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple | list):  # a tensor, or what stands for one while torch.fx traces
            return output * self.multiplier
        changed = list(output)
        changed[self.index] = changed[self.index] * self.multiplier
        return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)

    def __repr__(self) -> str:
        return f"BranchMultiplier({self.multiplier:g})"


class _Multiplied:
    """What marks the class of a module that carries a `BranchMultiplier`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _multiplied_instance, (plain_class(type(self)),), self.__getstate__()


@functools.cache
def _multiplied_class(cls: Any) -> type:
    return type(cls.__name__, (_Multiplied, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _multiplied_instance(cls: type) -> Any:
    marked: Any = _multiplied_class(cls)
    return marked.__new__(marked)


def plain_class(cls: type) -> type:
    """The class that a module had before it got a multiplier."""
    return cls.__mro__[cls.__mro__.index(_Multiplied) + 1] if issubclass(cls, _Multiplied) else cls


def multiply(module: nn.Module, multiplier: float, index: int = 0) -> None:
    """Hangs a multiplier on one module."""
    module.register_forward_hook(BranchMultiplier(multiplier, index))
    if not isinstance(module, _Multiplied | torch.jit.ScriptModule):
        cls: Any = type(module)
        module.__class__ = _multiplied_class(cls)


@contextlib.contextmanager
def hooked(model: nn.Module, hooks: Iterable[Hook]) -> Iterator[None]:
    """Multipliers on a model for as long as it is measured."""
    try:
        hang(model, hooks)
        yield
    finally:
        take_off(model)


def hang(model: nn.Module, hooks: Iterable[Hook]) -> None:
    """Hangs multipliers on the modules that a plan names."""
    for hook in hooks:
        multiply(model.get_submodule(hook.module), hook.multiplier, hook.output)


def branch_hooks(model: nn.Module, planned: Sequence[PlannedBranch], found: Trace) -> tuple[Hook, ...]:
    """For ``how="wrap"``: one multiplier on each module that returns a branch's value; none for one without such.

    Raises:
        PlanError: a module returns branches that need different multipliers.
    """
    chosen: dict[str, Hook] = {}
    for i, branch in enumerate(planned):
        if branch.supplied != 1.0:
            for name, index in targets(model, found, i) or ():
                hook = chosen.setdefault(name, Hook(name, index, branch.supplied, i))
                if (hook.output, hook.multiplier) != (index, branch.supplied):
                    raise PlanError(
                        f"{name} returns branches with different multipliers. Give each branch a module of its own"
                    )
    return tuple(chosen.values())


def targets(model: nn.Module, found: Trace, i: int) -> list[tuple[str, int]] | None:
    """The modules to multiply: for each summand of the branch one that returns it, and nothing but branches.

    ``None`` where no module returns the branch's value, and nothing else.
    """
    branch = found.traced[i].branch
    users: dict[str, int] = {}
    for traced in found.traced:
        for name in {producer.module for producers in traced.summands for producer in producers}:
            users[name] = users.get(name, 0) + 1

    def preference(target: tuple[str, int]) -> tuple[bool, bool, bool]:
        name = target[0]
        return users[name] > 1, name != branch.name, not any(True for _ in model.get_submodule(name).parameters())

    best = []
    for producers in found.traced[i].summands or ((),):
        fit = [(p.module, p.output) for p in producers if users[p.module] == found.calls[p.module]]
        if not fit:
            return None
        best.append(min(fit, key=preference))
    return best


Taken = list[tuple[nn.Module, BranchMultiplier]]
"""Modules with the multipliers that were taken off them."""


def take_off(model: nn.Module) -> Taken:
    """Removes every multiplier; modules have their own classes again."""
    taken = []
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, BranchMultiplier):
                del module._forward_hooks[key]
                taken.append((module, hook))
        if isinstance(module, _Multiplied) and _multiplied_class(plain_class(type(module))) is type(module):
            module.__class__ = plain_class(type(module))
    return taken


def hang_again(taken: Taken) -> None:
    """Puts multipliers back where they were."""
    for module, hook in taken:
        multiply(module, hook.multiplier, hook.index)
