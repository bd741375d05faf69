"""A base on ``meta``: given values by the user's own initialization, or told what is not known without them."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable

import torch
from torch import nn

from torch_depthmup.errors import PlanError
from torch_depthmup.running import unwrap

__all__ = ["initialized", "warn_without_sizes"]


def initialized(base: nn.Module | None, init: Callable[[nn.Module], object]) -> nn.Module:
    """A copy of a base on ``meta``, with values on the CPU that ``init(copy)`` gives. The random state stays.

    Raises:
        PlanError: there is no base on ``meta``, or ``init`` leaves a parameter or a buffer without values.
    """
    if base is None or not any(parameter.is_meta for parameter in base.parameters()):
        raise PlanError("init= gives values to a base on the meta device. This base has values: leave init= out")
    made = copy.deepcopy(unwrap(base)).to_empty(device="cpu")
    named = [*made.named_parameters(), *made.named_buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for _, tensor in named:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        init(made)
        for name, tensor in itertools.chain(made.named_parameters(), made.named_buffers()):
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise PlanError(
                    f"init= left {name} without values. Let it set every parameter and buffer, or build the base on a "
                    "real device"
                )
    return made


def warn_without_sizes(base: nn.Module) -> None:
    """Warns where widths differ and the base has no values, so that nothing says which sizes to start with."""
    if any(parameter.is_meta for parameter in base.parameters()):
        warnings.warn(
            "the base is narrower and on the meta device, so the sizes that its values start with are not known: those "
            "of the model are left as they are. Pass init=<function that initializes a model in place>, or a base on "
            "a real device",
            UserWarning,
            stacklevel=4,
        )
