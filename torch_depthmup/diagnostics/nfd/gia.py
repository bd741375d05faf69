"""What gradient independence gets wrong: both couplings on the same draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_depthmup.diagnostics.nfd.result import NFDResult
from torch_depthmup.diagnostics.nfd.simulate import simulate

__all__ = ["GIAGap", "gia_gap"]


def gia_gap(inputs: Tensor, targets: Tensor, **options: Any) -> GIAGap:
    """What gradient independence gets wrong in one training run: both couplings on the same draws.

    Args:
        inputs: as for `simulate`.
        targets: likewise.
        options: likewise, without ``coupling``.

    Returns:
        Both results, and their differences seed by seed.
    """
    reused, decoupled = (
        simulate(inputs, targets, **options, coupling=coupling)  # type: ignore[arg-type]
        for coupling in ("reused", "decoupled")
    )
    return GIAGap(reused, decoupled)


@dataclass(frozen=True)
class GIAGap:
    """The two couplings of one training run beside each other."""

    reused: NFDResult
    decoupled: NFDResult

    def gap(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean over seeds of reused minus decoupled in one field of the results, and its standard error."""
        difference = getattr(self.reused, name) - getattr(self.decoupled, name)
        return difference.mean(0), difference.std(0) / math.sqrt(len(difference))

    def function(self) -> tuple[Tensor, Tensor]:
        """The gap in the function's change since initialization, (steps + 1, samples, classes), and its error."""
        changes = [r.outputs - r.outputs[:, :1] for r in (self.reused, self.decoupled)]
        difference = changes[0] - changes[1]
        return difference.mean(0), difference.std(0) / math.sqrt(len(difference))
