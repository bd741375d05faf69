"""What doubling the depth or the width of the user's own network still changes, from predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.nfd.predict import Prediction, predict
from torch_depthmup.diagnostics.shared.arguments import positive_integers
from torch_depthmup.errors import DepthMuPError

__all__ = ["Gains", "gains"]

Pair = tuple[float, float]
"""A mean and its standard error."""
NOISE = 2.0  # standard errors below which a change is not told from none


@dataclass(frozen=True)
class Gains:
    """What is left to gain for a network, in trained outputs (root mean square over them) and in loss; ``print`` it.

    Each pair is (mean, standard error).

    Args:
        next_depth: change of the mean outputs at the next doubling of depth.
        next_width: the same for width.
        next_depth_loss: change of the mean loss at the next doubling of depth; negative is a gain.
        next_width_loss: the same for width.
        infinite_width: distance of the mean outputs to infinite width at this depth. The extrapolation is a line in
            1 / width through this width, twice and four times; its error contains what leaving out the first changes.
        growth: exponent in depth of the function's change in training, measured at this doubling: where it is not 0
            within its error, deeper networks go on to train otherwise, and depth has no limit that is near.
        seed_spread: standard deviation of the trained outputs over seeds at this width.
    """

    next_depth: Pair
    next_width: Pair
    next_depth_loss: Pair
    next_width_loss: Pair
    infinite_width: Pair
    growth: Pair
    seed_spread: float

    def __str__(self) -> str:
        lines = [
            f"twice the {what}: outputs change by {_told(change)}, the loss by {loss[0]:+.3g} ± {loss[1]:.2g}"
            for what, change, loss in (
                ("depth", self.next_depth, self.next_depth_loss),
                ("width", self.next_width, self.next_width_loss),
            )
        ]
        exponent, error = self.growth
        lines.append(f"infinite width: outputs {_told(self.infinite_width)} from here")
        lines.append(
            f"depth: the function's change in training grows like depth^{exponent:.2f} ± {error:.2g} at this doubling"
            + (": no limit in sight" if exponent > NOISE * error else "")
        )
        return "\n".join([*lines, f"a single network's outputs vary by {self.seed_spread:.3g} from seed to seed"])


def _told(pair: Pair) -> str:
    return f"{pair[0]:.3g} ± {pair[1]:.2g}"


def gains(
    make: Callable[[int, int], nn.Module],
    inputs: Any,
    targets: Tensor,
    *,
    depth: int,
    width: int,
    optimizer: Callable[[nn.Module, int], torch.optim.Optimizer],
    steps: int,
    seeds: int = 8,
    **options: Any,
) -> Gains:
    """How much the next doubling of depth or width still changes the user's own network, trained on these data.

    A prediction is exact in law at finite width too, so the next doublings are measured, not extrapolated.

    Args:
        make: a factory (depth, width) -> model.
        inputs: as for `nfd.predict`.
        targets: likewise.
        depth: of the network.
        width: of the network; widths twice and four times as large are predicted too.
        optimizer: (model, depth) -> optimizer, such as `dm.SGD` after `dm.parametrize` at that depth.
        steps: optimizer steps.
        seeds: how many; at least two.
        options: as for `nfd.predict`: loss, coupling, device, dtype, progress.

    Raises:
        DepthMuPError: a single seed, or as `nfd.predict`.

    >>> from torch_depthmup import Residual
    >>> def make(depth, n):
    ...     return nn.Sequential(nn.Linear(2, n), *(Residual(nn.Linear(n, n)) for _ in range(depth)), nn.Linear(n, 1))
    >>> sgd = lambda model, depth: torch.optim.SGD(model.parameters(), lr=0.1 / depth)
    >>> y = torch.tensor([[1.0], [-1.0]])
    >>> print(gains(make, torch.eye(2), y, depth=1, width=64, optimizer=sgd, steps=1, seeds=4))  # doctest: +ELLIPSIS
    twice the depth: outputs change by ...
    """
    positive_integers("depth, width and seeds", [depth, width, seeds])
    if seeds < 2:
        raise DepthMuPError("a single seed has no spread: seeds=2 or more")

    def at(factor: int, times: int, first: int) -> Prediction:
        return predict(
            lambda n: make(factor * depth, n), inputs, targets, width=times * width, steps=steps,
            optimizer=lambda model: optimizer(model, factor * depth), seeds=range(first, first + seeds), **options,
        )  # fmt: skip

    here, deeper, wider, widest = (at(*run) for run in ((1, 1, 0), (2, 1, seeds), (1, 2, 2 * seeds), (1, 4, 3 * seeds)))
    return Gains(
        next_depth=_change(here, deeper),
        next_width=_change(here, wider),
        next_depth_loss=_loss_change(here, deeper),
        next_width_loss=_loss_change(here, wider),
        infinite_width=_to_infinity([here, wider, widest]),
        growth=_growth(here, deeper),
        seed_spread=float(here.outputs[:, -1].var(0).mean().sqrt()),
    )


def _size(difference: Tensor, noise: Tensor) -> float:
    """Root mean square of a difference, less what its standard error alone would give."""
    return math.sqrt(max(0.0, float((difference.square() - noise).mean())))


def _change(a: Prediction, b: Prediction) -> Pair:
    noise = a.error()[-1].square() + b.error()[-1].square()
    return _size(b.mean()[-1] - a.mean()[-1], noise), float(noise.mean().sqrt())


def _loss_change(a: Prediction, b: Prediction) -> Pair:
    change = float(b.mean("losses")[-1] - a.mean("losses")[-1])
    return change, float((a.error("losses")[-1].square() + b.error("losses")[-1].square()).sqrt())


def _to_infinity(runs: list[Prediction]) -> Pair:
    """Distance from the first run to the intercept of a line in 1 / width, and its error with the extrapolation's."""

    def intercept(kept: list[int]) -> Tensor:
        """Weights of all runs in the distance, of which a line goes through those that are kept."""
        x = torch.tensor([1 / runs[i].width for i in kept], dtype=torch.float64)
        weights = torch.zeros(len(runs), dtype=torch.float64)
        weights[kept] = torch.linalg.pinv(torch.stack([torch.ones_like(x), x], dim=1))[0]
        weights[0] -= 1
        return weights

    means = torch.stack([run.mean()[-1].double().flatten() for run in runs])
    noise = torch.stack([run.error()[-1].double().flatten().square() for run in runs])
    full, last = intercept([0, 1, 2]), intercept([1, 2])
    variance = full.square() @ noise
    left_out = ((full - last) @ means).square()
    return _size(full @ means, variance), float((variance + left_out).mean().sqrt())


def _growth(here: Prediction, deeper: Prediction) -> Pair:
    (size, error), (other, its) = _moved(here), _moved(deeper)
    if min(size, other) <= 0:
        return math.nan, math.nan
    return math.log2(other / size), math.hypot(error / size, its / other) / math.log(2)


def _moved(run: Prediction) -> Pair:
    """Root mean square over outputs of their mean change in training, and its standard error."""
    changes = (run.outputs[:, -1] - run.outputs[:, 0]).flatten(1).double()
    mean, variance = changes.mean(0), changes.var(0) / len(changes)
    size = float(mean.square().mean().sqrt())
    return size, float((mean.square() * variance).sum().sqrt()) / (mean.numel() * size) if size else math.nan
