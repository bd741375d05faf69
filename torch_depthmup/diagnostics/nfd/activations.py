"""Activations of the canonical networks, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_depthmup.errors import DepthMuPError

__all__ = ["ACTIVATIONS", "Activation", "derivative", "get_activation"]

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "erf": torch.erf,
    "silu": F.silu,
}


def get_activation(activation: str | Activation) -> Activation:
    """The activation of that name, or the callable itself.

    Raises:
        DepthMuPError: no activation has that name.
    """
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise DepthMuPError(
            f"no activation is called {activation!r}. Write one of {', '.join(ACTIVATIONS)}, or a callable"
        )
    return ACTIVATIONS[activation]


def derivative(activation: Activation, x: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise activation's value and derivative at x.

    Raises:
        DepthMuPError: the value cannot be differentiated.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = activation(leaf)
        if not (isinstance(value, Tensor) and value.requires_grad):
            name = getattr(activation, "__name__", type(activation).__name__)
            raise DepthMuPError(
                f"the activation {name} gives a value that autograd cannot differentiate. Write it in torch's "
                "operations, without detach, item or numpy; a constant as 0 * x + constant"
            )
        (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
    return value.detach(), slope
