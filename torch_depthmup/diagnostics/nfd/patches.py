"""A convolution as a matrix product: patches of its input, as rows, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

__all__ = ["Patches", "positions"]


@dataclass(frozen=True)
class Patches:
    """How a convolution over one or two dimensions walks over its input.

    Args:
        kernel: sizes of the kernel.
        stride: steps.
        padding: zeros on both sides.
        dilation: distances within the kernel.
    """

    kernel: tuple[int, ...]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def _options(self) -> dict[str, tuple[int, int]]:
        """As `F.unfold` takes them: it knows two dimensions."""
        one = len(self.kernel) == 1
        full = {"stride": (self.stride, 1), "padding": (self.padding, 0), "dilation": (self.dilation, 1)}
        return {name: (neutral, given[0]) if one else tuple(given) for name, (given, neutral) in full.items()}  # type: ignore[misc]

    def _kernel(self) -> tuple[int, ...]:
        return (1, *self.kernel)[-2:]

    def sizes(self, x: Tensor) -> tuple[int, ...]:
        """The output's sizes."""
        along = zip(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(
            (size + 2 * pad - apart * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, apart in along
        )

    def rows(self, x: Tensor) -> Tensor:
        """(samples, channels, *sizes) -> (samples * positions, channels * kernel)."""
        flat = x if x.ndim == 4 else x[:, :, None]
        return F.unfold(flat, self._kernel(), **self._options()).transpose(1, 2).flatten(0, 1)

    def summed(self, rows: Tensor, x: Tensor) -> Tensor:
        """The transpose: rows of patches added up at their places in an input of the shape of x."""
        columns = rows.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return F.fold(columns, (1, *x.shape[2:])[-2:], self._kernel(), **self._options()).reshape(x.shape)

    def image(self, rows: Tensor, x: Tensor) -> Tensor:
        """(samples * positions, channels) -> (samples, channels, *output sizes)."""
        sizes = self.sizes(x)
        return rows.view(x.shape[0], math.prod(sizes), -1).transpose(1, 2).reshape(x.shape[0], -1, *sizes)


def positions(image: Tensor) -> Tensor:
    """(samples, channels, *sizes) -> (samples * positions, channels)."""
    return image.flatten(2).transpose(1, 2).flatten(0, 1)
