"""The canonical residual networks of the theory as ordinary modules.

Source: arXiv 2512.21075, the depth-muP ResNets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.nfd.activations import get_activation
from torch_depthmup.diagnostics.nfd.setting import Setting
from torch_depthmup.errors import DepthMuPError

__all__ = ["CanonicalBlock", "CanonicalResNet"]


class CanonicalResNet(nn.Module):
    """The canonical network at its base: scale it in depth with `parametrize(how="wrap")`, as any other network.

    Its branches carry sqrt(T / base_depth); `parametrize` adds the rule's multiplier. Train it with
    ``dm.SGD(network, lr=setting.lr * width)``.

    Args:
        setting: depth, activation, block layers and horizon are read.
        inputs: d.
        outputs: number of outputs.
        width: n.
        backward: ``"tied"``, or ``"independent"``: gradients flow back through independent copies of the initial
            matrices, with the same trained increments. That is the network of which gradient independence holds.

    Shapes:
        input (samples, d), output (samples, outputs).
    """

    def __init__(
        self, setting: Setting, inputs: int, outputs: int, width: int,
        backward: Literal["tied", "independent"] = "tied",
    ):  # fmt: skip
        super().__init__()
        if backward not in ("tied", "independent"):
            raise DepthMuPError(f"backward must be 'tied' or 'independent', not {backward!r}")
        self.embedding = nn.Parameter(torch.randn(width, inputs), requires_grad=setting.train_input)
        self.blocks = nn.ModuleList([CanonicalBlock(setting, width, backward) for _ in range(setting.depth)])
        self.readout = nn.Parameter(torch.randn(outputs, width), requires_grad=setting.train_readout)

    def stem(self, x: Tensor) -> Tensor:
        """h_0, (samples, n)."""
        return x @ self.embedding.T / math.sqrt(x.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return h @ self.readout.T / h.shape[1]


class CanonicalBlock(nn.Module):
    """The branch: a W phi(h) / sqrt(n), or a V phi(W h / sqrt(n)) / sqrt(n)."""

    def __init__(self, setting: Setting, width: int, backward: str):
        super().__init__()
        self.scale = math.sqrt(setting.horizon / setting.base_depth)
        self.phi: Callable[[Tensor], Tensor] = get_activation(setting.activation)
        self.inner = _Matrix(width, backward) if setting.block_layers == 2 else None
        self.outer = _Matrix(width, backward)

    def forward(self, h: Tensor) -> Tensor:
        taken = h if self.inner is None else self.inner(h)
        return self.scale * self.outer(self.phi(taken))


class _Matrix(nn.Module):
    """W x / sqrt(n), whose backward pass may go through another matrix."""

    def __init__(self, width: int, backward: str):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        independent = backward == "independent"
        self.start: Tensor | None
        self.other: Tensor | None
        self.register_buffer("start", self.weight.detach().clone() if independent else None)
        self.register_buffer("other", torch.randn(width, width) if independent else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.other is None:
            return x @ self.weight.T / math.sqrt(x.shape[-1])
        return _IndependentBackward.apply(x, self.weight, self.start, self.other)


class _IndependentBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, start: Tensor, other: Tensor) -> Tensor:
        context.save_for_backward(x, weight, start, other)
        return x @ weight.T / math.sqrt(x.shape[-1])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, start, other = context.saved_tensors
        root = math.sqrt(x.shape[-1])
        return gradient @ (other + weight - start) / root, gradient.T @ x / root, None, None
