"""How far a network is from infinite depth and width, and what the next doubling can still change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.result import NFDResult
from torch_depthmup.diagnostics.nfd.simulate import simulate
from torch_depthmup.errors import DepthMuPError

__all__ = ["DepthLimit", "Returns", "infinite_depth", "returns"]


@dataclass(frozen=True)
class DepthLimit:
    """Outputs extrapolated to infinite depth.

    Args:
        value: (steps + 1, samples, classes), the intercept of a least-squares line in 1 / depth.
        error: its standard error, from the spread over seeds.
        rate: exponent p of the distance between successive depths, which falls like depth ** -p; with its standard
            error. The theory says 1; a rate that is not known to better than itself says that noise hides it.
        rate_error: see ``rate``.
        depths: simulated.
        results: a simulation for each depth.
    """

    value: Tensor
    error: Tensor
    rate: float
    rate_error: float
    depths: tuple[int, ...]
    results: tuple[NFDResult, ...]


def infinite_depth(inputs: Tensor, targets: Tensor, *, depths: Sequence[int], **options: Any) -> DepthLimit:
    """Simulates several depths and extrapolates the outputs to infinite depth.

    Args:
        inputs: as for `nfd.simulate`.
        targets: likewise.
        depths: three or more, ascending, such as L, 2 L, 4 L.
        options: as for `nfd.simulate`, at least two seeds.

    Raises:
        DepthMuPError: fewer than three depths, not ascending, or a single seed.
    """
    if len(depths) < 3 or list(depths) != sorted(set(depths)):
        raise DepthMuPError(f"three or more ascending depths are needed, such as [16, 32, 64], not {list(depths)}")
    results = tuple(simulate(inputs, targets, depth=depth, **options) for depth in depths)
    if any(len(result.outputs) < 2 for result in results):
        raise DepthMuPError("a single seed has no spread and so no error bar: seeds=2 or more")
    if any(result.diverged is not None for result in results):
        raise DepthMuPError("a simulation diverged; take a smaller lr")
    x = torch.tensor([1 / depth for depth in depths], dtype=torch.float64)
    design = torch.stack([torch.ones_like(x), x], dim=1)
    solution = torch.linalg.pinv(design)[0]  # weights of the intercept
    means = torch.stack([result.mean("outputs").double() for result in results])
    errors = torch.stack([result.error("outputs").double() for result in results])
    value = torch.einsum("d,d...->...", solution, means)
    error = torch.einsum("d,d...->...", solution.square(), errors.square()).sqrt()
    rate, rate_error = _rate(results)
    return DepthLimit(value, error, rate, rate_error, tuple(depths), results)


def _rate(results: Sequence[NFDResult]) -> tuple[float, float]:
    """From the changes of the trained outputs between successive depths, projected on their mean direction.

    The projection keeps a sign, so noise averages out instead of adding up.
    """
    depths = [result.setting.depth for result in results]
    final = [result.outputs[:, -1].flatten(1).double() for result in results]
    direction = final[0].mean(0) - final[-1].mean(0)
    size = direction.norm()
    if size == 0:
        return math.nan, math.nan
    along = [values @ (direction / size) for values in final]
    steps = [(a.mean() - b.mean()).item() for a, b in zip(along, along[1:], strict=False)]
    errors = [
        math.hypot(a.std() / len(a) ** 0.5, b.std() / len(b) ** 0.5) for a, b in zip(along, along[1:], strict=False)
    ]
    if any(step <= 0 for step in steps[:1] + steps[-1:]):
        return math.nan, math.nan
    distance = math.log(depths[-2] / depths[0])
    rate = math.log(steps[0] / steps[-1]) / distance
    return rate, math.hypot(errors[0] / steps[0], errors[-1] / steps[-1]) / distance


@dataclass(frozen=True)
class Returns:
    """What is left to gain, in trained outputs (root mean square over samples) and in loss.

    Each is (mean, standard error) over seeds. A change that halves with every doubling adds up to twice its first step,
    so what all further doublings can change is about twice the next.

    Args:
        next_depth: change of the mean outputs at the next doubling of depth.
        next_width: the same for width.
        next_depth_loss: change of the mean loss at the next doubling of depth; negative is a gain.
        next_width_loss: the same for width.
        seed_spread: standard deviation of the trained outputs over seeds at this width, which falls like width ** -1/2.
    """

    next_depth: tuple[float, float]
    next_width: tuple[float, float]
    next_depth_loss: tuple[float, float]
    next_width_loss: tuple[float, float]
    seed_spread: float

    def __str__(self) -> str:
        lines = []
        for what, change, loss in (
            ("depth", self.next_depth, self.next_depth_loss),
            ("width", self.next_width, self.next_width_loss),
        ):
            lines.append(
                f"twice the {what}: outputs change by {change[0]:.3g} ± {change[1]:.2g}, the loss by {loss[0]:+.3g} ± "
                f"{loss[1]:.2g}; all further doublings together by about twice that"
            )
        return "\n".join([*lines, f"a single network's outputs vary by {self.seed_spread:.3g} from seed to seed"])


def returns(inputs: Tensor, targets: Tensor, *, depth: int, width: int, seeds: int = 16, **options: Any) -> Returns:
    """How much the next doubling of depth or width still changes a network that is trained on these data.

    The simulation is exact in law at finite width too, so this is measured, not extrapolated.

    Args:
        inputs: as for `nfd.simulate`.
        targets: likewise.
        depth: L of the network.
        width: n of the network.
        seeds: how many; at least two.
        options: as for `nfd.simulate`.

    Raises:
        DepthMuPError: a single seed, or a run diverged.
    """
    if seeds < 2:
        raise DepthMuPError("a single seed has no spread: seeds=2 or more")
    here, deeper, wider = (
        simulate(inputs, targets, depth=d, width=n, seeds=range(start, start + seeds), **options)
        for d, n, start in ((depth, width, 0), (2 * depth, width, seeds), (depth, 2 * width, 2 * seeds))
    )
    if any(result.diverged is not None for result in (here, deeper, wider)):
        raise DepthMuPError("a simulation diverged; take a smaller lr")
    return Returns(
        next_depth=_change(here, deeper),
        next_width=_change(here, wider),
        next_depth_loss=_loss_change(here, deeper),
        next_width_loss=_loss_change(here, wider),
        seed_spread=float(here.outputs[:, -1].var(0).mean().sqrt()),
    )


def _change(a: NFDResult, b: NFDResult) -> tuple[float, float]:
    """Root mean square over samples of the difference in mean, less what the spread over seeds alone would give."""
    difference = a.mean("outputs")[-1] - b.mean("outputs")[-1]
    noise = a.error("outputs")[-1].square() + b.error("outputs")[-1].square()
    size = math.sqrt(max(0.0, float((difference.square() - noise).mean())))
    return size, float(noise.mean().sqrt())


def _loss_change(a: NFDResult, b: NFDResult) -> tuple[float, float]:
    change = float(b.mean("losses")[-1] - a.mean("losses")[-1])
    return change, float((a.error("losses")[-1].square() + b.error("losses")[-1].square()).sqrt())
