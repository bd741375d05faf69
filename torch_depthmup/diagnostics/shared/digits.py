"""Real data and a residual network small enough for the demo: scanned digits, two-layer blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.modules import Residual

__all__ = ["DigitsResNet", "digits"]


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 scanned digits of 8 x 8 pixels.

    Returns:
        Images of shape (1797, 64), each pixel centred and scaled to unit variance over the data set; labels (1797,).

    Raises:
        ImportError: scikit-learn is not installed.

    Source: the UCI ML hand-written digits, bundled with scikit-learn.
    """
    data = needs("sklearn.datasets").load_digits()
    images = torch.tensor(data.data, dtype=torch.float32)
    images = (images - images.mean(0)) / images.std(0).clamp_min(1.0)
    return images, torch.tensor(data.target)


class DigitsResNet(nn.Sequential):
    """``h + W2 relu(W1 norm(h))`` in ``depth`` blocks, between a linear stem and a linear readout.

    Args:
        depth: number of residual blocks.
        width: size of the residual stream.
        pixels: of a picture.

    Shapes:
        input (batch, pixels), output (batch, 10).
    """

    def __init__(self, depth: int, width: int = 64, pixels: int = 64):
        if depth < 1 or width < 1:
            raise ValueError(f"depth and width must be at least 1, not {depth} and {width}")
        super().__init__(
            nn.Linear(pixels, width), *[Residual(_branch(width)) for _ in range(depth)], nn.LayerNorm(width),
            nn.Linear(width, 10),
        )  # fmt: skip


def _branch(width: int) -> nn.Sequential:
    first, second = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
    for layer, gain in ((first, 1.0), (second, math.sqrt(2.0))):  # branches as large as the stream they start from
        nn.init.normal_(layer.weight, std=gain / math.sqrt(width))
    return nn.Sequential(nn.LayerNorm(width), first, nn.ReLU(), second)
