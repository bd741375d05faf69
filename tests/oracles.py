"""Oracles that share no code with the package: dense networks and closed forms, written out plainly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PHI = {
    "identity": (lambda x: x, torch.ones_like),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "relu": (lambda x: x.clamp_min(0), lambda x: (x > 0).to(x)),
}


def dense_training(
    inputs: Tensor,
    targets: Tensor,
    *,
    depth: int,
    width: int,
    steps: int,
    lr: float,
    seed: int,
    activation: str = "tanh",
    independent: bool = False,
) -> Tensor:
    """Outputs (steps + 1, samples) of h_l = h_{l-1} + W_l phi(h_{l-1}) / sqrt(L n), f = v . h_L / n, gradients by hand.

    Full-batch SGD on the mean of half the squared error, learning rate lr * n on every W_l. ``independent`` sends the
    backward pass through independent matrices with the same trained increments.
    """
    phi, slope = PHI[activation]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=inputs.dtype)

    n, L = width, depth
    U, v = normal(inputs.shape[1], n), normal(n)
    W = [normal(n, n) for _ in range(L)]
    back = [normal(n, n) for _ in range(L)] if independent else W
    change = [torch.zeros(n, n, dtype=inputs.dtype) for _ in range(L)]
    outputs = []
    for _ in range(steps + 1):
        h = [inputs @ U / math.sqrt(inputs.shape[1])]
        for w, c in zip(W, change, strict=True):
            h.append(h[-1] + phi(h[-1]) @ (w + c).T / math.sqrt(L * n))
        f = h[-1] @ v / n
        outputs.append(f)
        chi = (f - targets) / len(targets)
        g = v.expand(len(inputs), n)
        increments = []
        for layer in range(L - 1, -1, -1):
            increments.append(-lr * (chi[:, None] * g).T @ phi(h[layer]) / math.sqrt(L * n))
            g = g + slope(h[layer]) * (g @ (back[layer] + change[layer])) / math.sqrt(L * n)
        for layer, increment in zip(range(L - 1, -1, -1), increments, strict=True):
            change[layer] = change[layer] + increment
    return torch.stack(outputs)


def linear_first_order(depth: int, coupling: str) -> float:
    """-df / (eta chi q) of the linear network in the limit of infinite width, to first order in eta."""
    grown = (1 + 1 / depth) ** (depth - 1)
    return grown if coupling == "reused" else grown * (1 + 1 / depth) - 1


def completep_groups(model: nn.Module, *, width: float, depth: float) -> dict[str, tuple[float, float, float]]:
    """AdamW's (lr, weight decay, eps) multipliers of CompleteP with an explicit residual multiplier 1 / depth.

    Written out from arXiv 2505.01618, table 1, for a GPT of hidden weights, biases and norms in blocks called ``h``.
    The table's eps is that of the blocks; outside them no branch multiplier is in the gradient, and 1 / width is left.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if name.startswith("h.") and parameter.ndim == 2:
            groups[name] = (1 / width, width, 1 / width / depth)
        elif name.startswith("h."):  # biases and norms of the blocks
            groups[name] = (1.0, 1.0, 1 / width / depth)
        else:  # embeddings, tied readout, final norm
            groups[name] = (1.0, 1.0, 1 / width)
    return groups
