"""What gradient independence gets wrong in one training run: both couplings on the same draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_depthmup.diagnostics.nfd.result import NFDResult
from torch_depthmup.diagnostics.nfd.setting import Setting
from torch_depthmup.diagnostics.nfd.simulate import simulate

__all__ = ["GIAGap", "gia_gap"]


@dataclass(frozen=True)
class GIAGap:
    """The two couplings of one training run beside each other."""

    reused: NFDResult
    decoupled: NFDResult

    def gap(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean over seeds of reused minus decoupled in one field of the results, and its standard error."""
        return _mean_and_error(getattr(self.reused, name) - getattr(self.decoupled, name))

    def function(self) -> tuple[Tensor, Tensor]:
        """The gap in the function's change since initialization, (steps + 1, samples, classes), and its error."""
        reused, decoupled = (result.outputs - result.outputs[:, :1] for result in (self.reused, self.decoupled))
        return _mean_and_error(reused - decoupled)


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.mean(0), values.std(0) / math.sqrt(len(values))


def gia_gap(setting: Setting, inputs: Tensor, targets: Tensor, **options: Any) -> GIAGap:
    """Simulates a setting under both couplings, on the same draws.

    Args:
        setting: as for `nfd.simulate`.
        inputs: likewise.
        targets: likewise.
        options: likewise, without ``coupling``: width, seeds, held_out, device, dtype, progress.

    Returns:
        Both results, and their differences seed by seed.

    Raises:
        DepthMuPError: as `nfd.simulate`.

    >>> import torch
    >>> setting = Setting(depth=4, steps=2, lr=1.0)
    >>> gap, error = gia_gap(setting, torch.eye(2), torch.tensor([1.0, -1.0]), width=1000, seeds=4).function()
    >>> gap[0].abs().max()  # nothing at initialization
    tensor(0.)
    """
    reused = simulate(setting, inputs, targets, coupling="reused", **options)
    return GIAGap(reused, simulate(setting, inputs, targets, coupling="decoupled", **options))
