"""How far a network is from infinite depth and width, and what the next doubling can still change.

Whether there is a limit at all is the rule's matter: with SGD the function's update grows like depth ** e, where
e = 1 - alpha + the largest exponent of a layer's own update (`rules.predicted_slopes`). At e = 0 outputs converge like
1 / depth. Under the corrected rule blocks of two layers have e = 1/2, and nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.nfd.gains import Gains, gains
from torch_depthmup.diagnostics.nfd.result import NFDResult
from torch_depthmup.diagnostics.nfd.setting import Setting
from torch_depthmup.diagnostics.nfd.simulate import simulate
from torch_depthmup.diagnostics.shared.arguments import positive_integers, seeds_of
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.rules import get_family, get_rule, predicted_slopes

__all__ = ["DepthLimit", "Returns", "depth_growth", "infinite_depth", "returns"]


def depth_growth(setting: Setting) -> float:
    """Exponent e of the function's update in depth, under the setting's rule and SGD: there is a limit where it is 0.

    Infinite where the branches are so large that initial values already grow faster than any power (alpha < 1/2).

    Source: arXiv 2310.02244, section 3; arXiv 2512.21075.

    >>> depth_growth(Setting(depth=8, steps=1, lr=1.0, block_layers=2, rule="complete-p"))
    0.0
    >>> depth_growth(Setting(depth=8, steps=1, lr=1.0, block_layers=2, rule="depth-mup-corrected"))
    0.5
    """
    rule = get_rule(setting.rule)
    if rule.alpha < 0.5:
        return math.inf
    slopes = predicted_slopes(rule, get_family("sgd"), inner_layers=setting.block_layers > 1)
    return max(0.0, slopes["function"])


@dataclass(frozen=True)
class DepthLimit:
    """Outputs extrapolated to infinite depth, or how they grow where there is no limit.

    Args:
        value: (steps + 1, samples, classes), the intercept of a least-squares line in 1 / depth; ``None`` where
            there is no limit.
        error: its standard error: the spread over seeds, and beside it the change of the intercept when the smallest
            depth is left out, which is the error of extrapolating by a line.
        rate: exponent p of the distance between the outputs of successive depths, which falls like depth ** -p. The
            theory says 1. Where ``rate_error`` is as large as ``rate``, take more seeds to measure it.
        rate_error: its standard error.
        growth: exponent in depth that the theory gives the function's update; 0 where there is a limit.
        measured_growth: the same, fitted to the trained outputs' change since initialization; (value, standard error).
        depths: simulated.
        results: a simulation for each depth.
    """

    value: Tensor | None
    error: Tensor | None
    rate: float
    rate_error: float
    growth: float
    measured_growth: tuple[float, float]
    depths: tuple[int, ...]
    results: tuple[NFDResult, ...]

    def __str__(self) -> str:
        name = get_rule(self.results[0].setting.rule).name
        measured, error = self.measured_growth
        if self.value is None or self.error is None:
            return _no_limit(name, self.growth) + f"; over these depths it grew like depth^{measured:.2f} ± {error:.2g}"
        values = ", ".join(
            f"{value:+.4f} ± {error:.2g}"
            for value, error in zip(self.value[-1].flatten().tolist(), self.error[-1].flatten().tolist(), strict=True)
        )
        return f"outputs at infinite depth: {values}; distance to it falls like depth^-{self.rate:.2f}"


def _no_limit(rule: str, growth: float) -> str:
    how = "faster than any power of depth" if math.isinf(growth) else f"like depth^{growth:g}"
    return f"under {rule!r} there is no limit of infinite depth: in theory the function's update grows {how}"


def infinite_depth(
    setting: Setting, inputs: Tensor, targets: Tensor, *, depths: Sequence[int], **options: Any
) -> DepthLimit:
    """Simulates several depths and extrapolates the outputs to infinite depth, where the rule has such a limit.

    Args:
        setting: as for `nfd.simulate`; its own depth is replaced.
        inputs: likewise.
        targets: likewise.
        depths: three or more, ascending, such as L, 2 L, 4 L.
        options: as for `nfd.simulate`: width, seeds (two at least), coupling, held_out, device, dtype, progress.

    Raises:
        DepthMuPError: fewer than three depths, not ascending, a single seed, or a simulation diverged.

    >>> setting = Setting(depth=1, steps=1, lr=1.0, block_layers=2, rule="complete-p")
    >>> data = torch.eye(2), torch.tensor([1.0, -1.0])
    >>> infinite_depth(setting, *data, depths=[2, 4, 8], width=500, seeds=4).value.shape
    torch.Size([2, 2, 1])
    """
    if len(depths) < 3 or list(depths) != sorted(set(depths)):
        raise DepthMuPError(f"three or more ascending depths are needed, such as [16, 32, 64], not {list(depths)}")
    if len(seeds_of(options.get("seeds", 2))) < 2:
        raise DepthMuPError("a single seed has no spread and so no error bar: seeds=2 or more")
    results = tuple(simulate(replace(setting, depth=depth), inputs, targets, **options) for depth in depths)
    _check_converged(results)
    rate, rate_error = _rate(results)
    growth = depth_growth(setting)
    value, error = _intercept(results) if growth == 0 else (None, None)
    return DepthLimit(value, error, rate, rate_error, growth, _growth(results), tuple(depths), results)


def _check_converged(results: Sequence[NFDResult]) -> None:
    for result in results:
        if result.diverged is not None:
            raise DepthMuPError(
                f"the simulation at depth {result.setting.depth}, width {result.width} diverged; take a smaller lr"
            )


def _intercept(results: Sequence[NFDResult]) -> tuple[Tensor, Tensor]:
    means = torch.stack([result.mean("outputs").double() for result in results])
    errors = torch.stack([result.error("outputs").double() for result in results])

    def at_infinity(first: int) -> tuple[Tensor, Tensor]:
        x = torch.tensor([1 / result.setting.depth for result in results[first:]], dtype=torch.float64)
        weights = torch.linalg.pinv(torch.stack([torch.ones_like(x), x], dim=1))[0]
        variance = torch.einsum("d,d...->...", weights.square(), errors[first:].square())
        return torch.einsum("d,d...->...", weights, means[first:]), variance

    value, variance = at_infinity(0)
    without_smallest, _ = at_infinity(1)
    return value, (variance + (value - without_smallest).square()).sqrt()


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
    pairs = list(zip(along, along[1:], strict=False))
    steps = [(a.mean() - b.mean()).item() for a, b in pairs]
    errors = [math.hypot(a.std() / len(a) ** 0.5, b.std() / len(b) ** 0.5) for a, b in pairs]
    if steps[0] <= 0 or steps[-1] <= 0:
        return math.nan, math.nan
    distance = math.log(depths[-2] / depths[0])
    rate = math.log(steps[0] / steps[-1]) / distance
    return rate, math.hypot(errors[0] / steps[0], errors[-1] / steps[-1]) / distance


def _growth(results: Sequence[NFDResult]) -> tuple[float, float]:
    """Least-squares exponent in depth of the function's change since initialization, and its standard error."""
    sizes, errors = zip(*(_moved(result) for result in results), strict=True)
    if min(sizes) <= 0:
        return math.nan, math.nan
    x = torch.tensor([result.setting.depth for result in results], dtype=torch.float64).log()
    weights = (x - x.mean()) / (x - x.mean()).square().sum()
    relative = torch.tensor([error / size for size, error in zip(sizes, errors, strict=True)], dtype=torch.float64)
    slope = weights @ torch.tensor(sizes, dtype=torch.float64).log()
    return float(slope), float((weights * relative).square().sum().sqrt())


def _moved(result: NFDResult) -> tuple[float, float]:
    """Root mean square over samples of the mean change of the outputs in training, and its standard error."""
    changes = (result.outputs[:, -1] - result.outputs[:, 0]).flatten(1).double()
    mean, variance = changes.mean(0), changes.var(0) / len(changes)
    size = float(mean.square().mean().sqrt())
    error = float((mean.square() * variance).sum().sqrt()) / (mean.numel() * size) if size else math.nan
    return size, error


@dataclass(frozen=True)
class Returns:
    """What is left to gain, in trained outputs (root mean square over samples) and in loss.

    Each pair is (mean, standard error) over seeds. Where a limit exists, a change halves with every doubling, so that
    all further doublings together change about twice as much as the next.

    Args:
        next_depth: change of the mean outputs at the next doubling of depth.
        next_width: the same for width.
        next_depth_loss: change of the mean loss at the next doubling of depth; negative is a gain.
        next_width_loss: the same for width.
        seed_spread: standard deviation of the trained outputs over seeds at this width, which falls like width ** -1/2.
        growth: exponent in depth that the theory gives the function's update; 0 where infinite depth is a limit.
        measured_growth: the same, measured at this doubling.
        rule: name of the rule.
    """

    next_depth: tuple[float, float]
    next_width: tuple[float, float]
    next_depth_loss: tuple[float, float]
    next_width_loss: tuple[float, float]
    seed_spread: float
    growth: float
    measured_growth: tuple[float, float]
    rule: str

    def __str__(self) -> str:
        lines = []
        for what, change, loss in (
            ("depth", self.next_depth, self.next_depth_loss),
            ("width", self.next_width, self.next_width_loss),
        ):
            line = (
                f"twice the {what}: outputs change by {change[0]:.3g} ± {change[1]:.2g}, the loss by {loss[0]:+.3g} ± "
                f"{loss[1]:.2g}"
            )
            if what == "width" or self.growth == 0:
                line += "; all further doublings together by about twice that"
            lines.append(line)
        if self.growth:
            measured, error = self.measured_growth
            grows = f"; at this doubling like depth^{measured:.2f} ± {error:.2g}"
            lines.append(_no_limit(self.rule, self.growth) + grows)
        return "\n".join([*lines, f"a single network's outputs vary by {self.seed_spread:.3g} from seed to seed"])


@overload
def returns(
    setting: Setting, inputs: Tensor, targets: Tensor, *, width: int = 4096, seeds: int = 16, **options: Any
) -> Returns: ...
@overload
def returns(setting: Callable[[int, int], nn.Module], inputs: Any, targets: Tensor, **options: Any) -> Gains: ...
def returns(
    setting: Any, inputs: Any, targets: Tensor, *, width: int = 4096, seeds: int = 16, **options: Any
) -> Returns | Gains:
    """How much the next doubling of depth or width still changes a network that is trained on these data.

    The simulation is exact in law at finite width too, so the next doubling is measured, not extrapolated.

    Args:
        setting: as for `nfd.simulate`, or a factory (depth, width) -> model of a network of yours, for which
            ``options`` are those of `gains.gains`: depth, optimizer, steps and so on.
        inputs: likewise.
        targets: likewise.
        width: n of the network.
        seeds: how many; at least two.
        options: as for `nfd.simulate`: coupling, held_out, device, dtype, progress.

    Raises:
        DepthMuPError: a single seed, or a run diverged.

    >>> setting = Setting(depth=2, steps=1, lr=1.0)
    >>> print(returns(setting, torch.eye(2), torch.ones(2), width=200, seeds=4))  # doctest: +ELLIPSIS
    twice the depth: outputs change by ...
    """
    if not isinstance(setting, Setting):
        return gains(setting, inputs, targets, width=width, seeds=seeds, **options)
    positive_integers("seeds", [seeds])
    if seeds < 2:
        raise DepthMuPError("a single seed has no spread: seeds=2 or more")
    twice = replace(setting, depth=2 * setting.depth)
    runs = ((setting, width, 0), (twice, width, seeds), (setting, 2 * width, 2 * seeds))
    here, deeper, wider = (
        simulate(s, inputs, targets, width=n, seeds=range(first, first + seeds), **options) for s, n, first in runs
    )
    _check_converged([here, deeper, wider])
    return Returns(
        next_depth=_change(here, deeper),
        next_width=_change(here, wider),
        next_depth_loss=_loss_change(here, deeper),
        next_width_loss=_loss_change(here, wider),
        seed_spread=float(here.outputs[:, -1].var(0).mean().sqrt()),
        growth=depth_growth(setting),
        measured_growth=_growth([here, deeper]),
        rule=get_rule(setting.rule).name,
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
