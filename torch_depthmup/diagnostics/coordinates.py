"""Coordinate check: trains briefly over a grid of depths and widths, and holds log-log slopes against the rule's.

It knows the rules and what goes wrong in carrying them out, so that a check that fails names the mistake.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_depthmup import rules
from torch_depthmup.diagnostics.extras import needs
from torch_depthmup.diagnostics.monitor import COLUMNS, FeatureMonitor
from torch_depthmup.diagnostics.training import OPTIMIZERS, default_loss, take
from torch_depthmup.diagnostics.writers import frame
from torch_depthmup.errors import MeasurementError, ignores_depth
from torch_depthmup.graph import call
from torch_depthmup.parametrize import parametrize
from torch_depthmup.rules import Family, Rule, get_family, get_rule

__all__ = ["QUANTITIES", "CoordinateCheck", "Slope", "coordinate_check"]

QUANTITIES: dict[str, str] = {
    "branch": "branch value at initialization",
    "inner": "inner layers' own update",
    "outer": "outer layers' own update",
    "stream": "residual stream's update",
    "function": "function's update",
}
"""What is held against the rule, in words."""

Point = tuple[int, int | None]
"""A depth and, where widths are checked, a width."""

Verdict = Literal["holds", "broken", "cannot tell"]
PROBE = 32  # samples of the first batch that are looked at


@dataclass(frozen=True)
class Slope:
    """A measured exponent beside the rule's.

    Args:
        axis: ``"depth"`` or ``"width"``.
        quantity: a key of `QUANTITIES`.
        measured: slope of log size in log depth (or width), the mean over seeds.
        low: lower end of its 95 % confidence interval.
        high: upper end.
        predicted: the rule's exponent.
        verdict: ``"holds"``, ``"broken"``, or ``"cannot tell"`` where the interval is too wide to say.
    """

    axis: str
    quantity: str
    measured: float
    low: float
    high: float
    predicted: float
    verdict: Verdict


@dataclass(frozen=True)
class CoordinateCheck:
    """What `coordinate_check` found. ``print`` it; ``frame`` is tidy; `figure` draws it.

    Args:
        rule: the rule that was checked.
        family: the optimizer's family.
        slopes: one for each quantity that the model has and each axis with at least two values.
        mistakes: what is wrong, in words; empty where all holds.
        rows: the monitor's rows with ``width``, ``relative_depth`` and ``seed``; step 0 is before training.
    """

    rule: Rule
    family: Family
    slopes: tuple[Slope, ...]
    mistakes: tuple[str, ...]
    rows: tuple[dict[str, Any], ...] = field(repr=False)

    @cached_property
    def frame(self) -> Any:
        """The rows as a tidy pandas data frame."""
        return frame(self.rows, ("width", "total_depth", "relative_depth", "seed", *COLUMNS))

    @cached_property
    def edge(self) -> tuple[dict[str, Any], ...]:
        """The rows at the smallest width, along which the slopes in depth are taken."""
        widths = [row["width"] for row in self.rows if row["width"] is not None]
        return tuple(row for row in self.rows if not widths or row["width"] == min(widths))

    def sizes(self, quantity: str) -> dict[tuple[int, int], float]:
        """A quantity by (depth, seed), as the slope in depth is taken of it.

        Args:
            quantity: a key of `QUANTITIES`.
        """
        groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in self.edge:
            groups.setdefault((row["total_depth"], row["seed"]), []).append(row)
        return {key: _sizes(group)[quantity] for key, group in groups.items()}

    @property
    def verdict(self) -> Verdict:
        """``"broken"`` if any slope is, ``"holds"`` if all do."""
        verdicts = {slope.verdict for slope in self.slopes}
        return "broken" if "broken" in verdicts else "holds" if verdicts == {"holds"} else "cannot tell"

    def figure(self) -> Any:
        """A matplotlib figure: sizes against depth on log axes with the rule's slopes as guides, depth as colour."""
        from torch_depthmup.diagnostics.feature_plots import coordinate_figure

        return coordinate_figure(self)

    def __str__(self) -> str:
        lines = [f"coordinate check of {self.rule.name} with {self.family.name}: {self.verdict}"]
        lines.append(f"  {'':32}{'axis':>6} {'slope':>7} {'95 % interval':>18} {'rule':>8}  verdict")
        for s in self.slopes:
            interval = f"[{s.low:+.2f}, {s.high:+.2f}]"
            said = f"{'' if exact(s.quantity, s.predicted) else '0..'}{s.predicted:+.2f}"
            words = QUANTITIES[s.quantity]
            lines.append(f"  {words:32}{s.axis:>6} {s.measured:+7.2f} {interval:>18} {said:>8}  {s.verdict}")
        return "\n".join([*lines, *(f"  wrong: {mistake}" for mistake in self.mistakes)])


def coordinate_check(
    make_model: Callable[..., nn.Module],
    data: Any,
    *,
    depths: Sequence[int],
    widths: Sequence[int] | None = None,
    base_depth: int | None = None,
    rule: str | Rule = "depth-mup",
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "adam",
    lr: float = 1e-3,
    family: str | Family | None = None,
    steps: int = 3,
    seeds: int | Sequence[int] = 3,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    prepare: Callable[[nn.Module, nn.Module], Any] | None = None,
    tolerance: float = 0.15,
) -> CoordinateCheck:
    """Trains briefly at each depth (and width), and holds the slopes of what moved against the rule's exponents.

    Args:
        make_model: ``depth -> model``, or ``(depth, width) -> model`` with ``widths``; called under a fixed seed.
        data: ``(inputs, targets)``, or a list of such batches, which are cycled through.
        depths: at least two values; what they count is the factory's affair, as long as streams grow in proportion.
        widths: values of the width; slopes in width are checked too where there are at least two.
        base_depth: what to call the factory with for the base; the default is the smallest of ``depths``. The narrowest
            width is the base's.
        rule: the rule that should hold.
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, or a function of the model that makes one.
        lr: learning rate at the base for a named optimizer. The theory speaks of small ones.
        family: the family of ``optimizer`` where that is a function.
        steps: training steps before the updates are measured.
        seeds: how many, or which. Their scatter gives the confidence intervals.
        loss: ``(output, targets) -> scalar``; the default is cross-entropy for integer targets, else mean squares.
        prepare: ``(model, base) -> anything``: one's own code for the rule in place of `parametrize`.
        tolerance: how far from the rule's exponent a slope still counts as holding.

    Returns:
        The slopes, verdicts and mistakes.

    Raises:
        MeasurementError: fewer than two depths, a factory that ignores depth, or values that are not finite.
        DepthMuPError: as raised by `parametrize` and `FeatureMonitor`.

    Source: the coordinate check of arXiv 2203.03466, appendix D.1, in depth; exponents from `rules.predicted_slopes`.
    """
    rule, kind = get_rule(rule), _family(optimizer, family)
    batches = _batches(data)
    grid = _grid(depths, widths, steps)
    chosen = range(seeds) if isinstance(seeds, int) else tuple(seeds)
    if not len(chosen):
        raise MeasurementError("seeds must name at least one seed")
    base = _made(make_model, base_depth or grid[0][0], grid[0][1], seed=0)
    make_optimizer = optimizer if callable(optimizer) else _named(optimizer, lr)
    rows: list[dict[str, Any]] = []
    found: dict[int, int] = {}
    for seed, (depth, width) in itertools.product(chosen, grid):
        model = _made(make_model, depth, width, seed)
        if prepare is not None:
            prepare(model, base)
        elif rule.scales_depth or widths is not None:
            parametrize(model, base=base, rule=rule, example_inputs=take(batches[0][0], slice(4)))
        else:
            parametrize(model, rule=rule)
        monitor = FeatureMonitor(model, take(batches[0][0], slice(PROBE)))
        _check_depth(found, depth, len(monitor.branches))
        _train(model, make_optimizer(model), batches, steps, loss, monitor)
        rows += [_row(row, depth, width, seed) for row in monitor.rows]
        monitor.close()
    slopes = tuple(_slopes(rows, rule, kind, grid, tolerance))
    mistakes = _mistakes(slopes, rule, kind, _gradient_slope(rows, grid))
    return CoordinateCheck(rule, kind, slopes, tuple(mistakes), tuple(rows))


# Training on the grid


def _family(optimizer: Any, family: str | Family | None) -> Family:
    if family is not None:
        return get_family(family)
    if callable(optimizer):
        raise MeasurementError("optimizer is a function: say which rule holds for it, family='sgd' or family='adam'")
    if optimizer not in OPTIMIZERS:
        known = ", ".join(map(repr, OPTIMIZERS))
        raise MeasurementError(
            f"optimizer={optimizer!r} is not known. Write one of {known}, or a function of the model"
        )
    return get_family(optimizer)


def _named(optimizer: str, lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: OPTIMIZERS[optimizer](model, lr=lr)


def _batches(data: Any) -> list[tuple[Any, Tensor]]:
    pairs = data if isinstance(data, list) else [data]
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
            raise MeasurementError("data must be (inputs, targets) with a tensor of targets, or a list of such batches")
    return pairs


def _grid(depths: Sequence[int], widths: Sequence[int] | None, steps: int) -> list[Point]:
    """Depths at the smallest width, then widths at the smallest depth: slopes are taken along the edges."""
    if len(set(depths)) < 2 or min(depths) < 1:
        raise MeasurementError(f"depths must hold at least two different positive values, not {list(depths)}")
    if steps < 1:
        raise MeasurementError(f"steps must be at least 1, not {steps}")
    ordered = sorted(set(depths))
    narrow, *wider = sorted(set(widths)) if widths else [None]
    points: list[Point] = [(depth, narrow) for depth in ordered]
    return points + [(ordered[0], width) for width in wider]


def _made(make_model: Callable[..., nn.Module], depth: int, width: int | None, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model(depth) if width is None else make_model(depth, width)
    if not isinstance(model, nn.Module):
        raise MeasurementError(f"the factory returned {type(model).__name__} at depth {depth}, not an nn.Module")
    return model


def _check_depth(found: dict[int, int], depth: int, branches: int) -> None:
    found[depth] = branches
    for other, count in found.items():
        if other != depth and count == branches:
            raise MeasurementError(ignores_depth(branches, other, depth))


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Any, Tensor]],
    steps: int,
    loss: Callable[[Any, Tensor], Tensor] | None,
    monitor: FeatureMonitor,
) -> None:
    model.train()
    monitor.record(0)
    for step in range(steps):
        inputs, targets = batches[step % len(batches)]
        optimizer.zero_grad()
        value = (loss or default_loss)(call(model, inputs), targets)
        if not value.isfinite():
            depth = max(branch.depth for branch in monitor.branches)
            raise MeasurementError(
                f"the loss is {value.item()} in step {step + 1} of the network with {depth} residual additions. Use a "
                "smaller lr, or a rule that scales depth"
            )
        value.backward()
        optimizer.step()
    monitor.record(steps)


def _row(row: dict[str, Any], depth: int, width: int | None, seed: int) -> dict[str, Any]:
    relative = (row["position"] + 1) / row["depth"] if row["depth"] else math.nan
    return {"width": width, "total_depth": depth, "relative_depth": relative, "seed": seed, **row}


# Slopes


def _slopes(rows: list[dict[str, Any]], rule: Rule, family: Family, grid: list[Point], tolerance: float) -> list[Slope]:
    predicted = {"branch": -rule.alpha, **rules.predicted_slopes(rule, family)}
    sizes: dict[tuple[str, int, int | None, int], float] = {}
    groups: dict[tuple[int, int | None, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["total_depth"], row["width"], row["seed"]), []).append(row)
    for key, group in groups.items():
        sizes |= {(quantity, *key): size for quantity, size in _sizes(group).items()}
    seeds = sorted({row["seed"] for row in rows})
    found = []
    shallow, narrow = grid[0]
    depths = [depth for depth, width in grid if width == narrow]
    widths = [width for depth, width in grid if depth == shallow and width is not None]
    for quantity in QUANTITIES:
        if (quantity, *grid[0], seeds[0]) not in sizes:
            continue
        lines = [[sizes[quantity, depth, narrow, seed] for depth in depths] for seed in seeds]
        found.append(_slope("depth", quantity, depths, lines, predicted[quantity], tolerance))
        if len(widths) > 1 and rule.width and quantity != "branch":
            lines = [[sizes[quantity, shallow, width, seed] for width in widths] for seed in seeds]
            found.append(_slope("width", quantity, widths, lines, 0.0, tolerance))
    return found


def _sizes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The quantities of one network: root mean squares over its layers, or the ends of its streams."""
    last = max(row["step"] for row in rows)
    end = [row for row in rows if row["step"] == last]
    layers = {role: [r["own"] / r["folded"] for r in end if r["role"] == role] for role in ("inner", "outer")}
    values = {
        "branch": [r["added"] for r in rows if r["step"] == 0 and r["kind"] == "stream"],
        **layers,
        "stream": [r["update"] for r in end if r["kind"] == "stream" and r["position"] == r["depth"] - 1],
        "function": [r["update"] for r in end if r["kind"] == "function"],
    }
    return {name: math.sqrt(sum(v * v for v in given) / len(given)) for name, given in values.items() if given}


def _gradient_slope(rows: list[dict[str, Any]], grid: list[Point]) -> float:
    """Slope in depth of the gradient in the residual stream at initialization, which the rules take to be 0."""
    logs: dict[int, list[float]] = {}
    for row in rows:
        if row["step"] == 0 and row["kind"] == "stream" and row["width"] == grid[0][1]:
            logs.setdefault(row["total_depth"], []).append(row["gradient"])
    sizes = {depth: math.sqrt(sum(g * g for g in values) / len(values)) for depth, values in logs.items()}
    if not all(0 < size < math.inf for size in sizes.values()):
        return math.nan
    return _mean_slope([math.log(depth) for depth in sizes], [[math.log(size) for size in sizes.values()]])[0]


def _slope(
    axis: str, quantity: str, at: list[Any], lines: list[list[float]], predicted: float, tolerance: float
) -> Slope:
    if not all(math.isfinite(size) and size > 0 for line in lines for size in line):
        words = QUANTITIES[quantity]
        raise MeasurementError(
            f"the {words} is zero or not finite somewhere on the grid ({[f'{s:.3g}' for s in lines[0]]} over {axis} "
            f"{at}), so it has no slope. Use a smaller lr, a layer that does not start at zero, or more steps"
        )
    measured, half = _mean_slope([math.log(x) for x in at], [[math.log(size) for size in line] for line in lines])
    low, high = measured - half, measured + half
    floor = predicted if exact(quantity, predicted) else 0.0
    bottom, top = floor - tolerance, predicted + tolerance
    verdict: Verdict = "cannot tell"
    if high < bottom or low > top:
        verdict = "broken"
    elif bottom <= measured <= top and bottom - tolerance <= low and high <= top + tolerance:
        verdict = "holds"
    return Slope(axis, quantity, measured, low, high, predicted, verdict)


def exact(quantity: str, predicted: float) -> bool:
    """Whether a prediction is the slope itself, or what the slope rises to from 0 at large depth.

    Where a rule lets the whole grow, the part that grows adds to one that does not: readout, stem, outer layers.
    """
    return predicted <= 0 or quantity not in ("stream", "function")


def _mean_slope(x: list[float], lines: list[list[float]]) -> tuple[float, float]:
    """The mean slope over seeds and half its 95 % interval; of one seed, from the scatter around the fit."""
    stats = needs("scipy.stats")
    fits = [stats.linregress(x, line) for line in lines]
    slopes = [float(fit.slope) for fit in fits]
    mean, n = sum(slopes) / len(slopes), len(slopes)
    if n > 1:
        spread = math.sqrt(sum((slope - mean) ** 2 for slope in slopes) / (n - 1))
        return mean, float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    if len(x) > 2:
        return mean, float(stats.t.ppf(0.975, len(x) - 2) * fits[0].stderr)
    return mean, math.inf


# What is wrong

NEAR = 0.2  # how far from a mistake's deviations the measured ones may be


def _mistakes(slopes: Sequence[Slope], rule: Rule, family: Family, gradient: float) -> list[str]:
    """The probable cause first, then each broken slope in words."""
    off = {s.quantity: s.measured - s.predicted for s in slopes if s.axis == "depth"}
    broken = [slope for slope in slopes if slope.verdict == "broken"]
    words = [_in_words(slope) for slope in broken]
    causes: list[str] = []
    if any(s.axis == "depth" and s.quantity == "branch" for s in broken):
        # Everything else hangs on the multiplier; learning rates cannot be judged beside a wrong one.
        causes = [
            text
            for text, deviation in (("forgotten", rule.alpha), ("applied twice", -rule.alpha))
            if deviation and abs(off["branch"] - deviation) <= NEAR
        ]
        causes = [f"the branch multiplier is {text}" for text in causes]
    elif any(s.axis == "depth" and s.quantity in ("inner", "outer") for s in broken):
        known = [
            (
                max(abs(off[name] - d) for name, d in zip(("inner", "outer"), deviation, strict=True) if name in off),
                text,
            )
            for text, deviation in _catalogue(rule, family)
            if any(deviation)
        ]
        nearest = min((distance for distance, _ in known), default=math.inf)
        causes = list(dict.fromkeys(text for d, text in known if d <= min(NEAR, nearest + 0.05)))
    head = [f"probably {', or '.join(causes)}"] if causes else []
    sides = [off[name] for name in ("inner", "outer") if name in off]
    if not causes and not family.normalised and abs(gradient) > NEAR and all(s * gradient > 0 for s in sides):
        head = [
            f"probably the network, not the rule: at initialization the gradient in the residual stream goes as "
            f"depth^{gradient:+.2f}, and the rule takes it to be constant"
        ]
    return head + words


def _in_words(slope: Slope) -> str:
    off = slope.measured - slope.predicted
    return (
        f"the {QUANTITIES[slope.quantity]} goes as {slope.axis}^{slope.measured:+.2f} where the rule says "
        f"{slope.predicted:+.2f}: too {'large' if off > 0 else 'small'} by {slope.axis}^{abs(off):.2f}"
    )


def _catalogue(rule: Rule, family: Family) -> list[tuple[str, tuple[float, float]]]:
    """Wrong learning rates beside a right branch multiplier: by which exponents inner and outer updates differ.

    A multiplier that is folded into the outer weights and not made up for in their learning rate enters their own
    update too, relative to those weights; so each mistake with whole groups has a folded and an explicit form.
    """
    a, c = rule.alpha, rule.correction
    other = get_family("sgd" if family.normalised else "adam")
    folded = a if family.normalised else 2 * a
    inner, outer = (rule.lr_exponent(family, role) for role in ("inner", "outer"))
    swapped = rule.lr_exponent(other, "outer") - outer
    unfolded = -a if family.normalised else a
    plain = "the learning rates are not scaled with depth (a plain torch optimizer)"
    swap = f"the learning-rate rule is that of {other.name}, not {family.name}"
    return [
        ("the correction of the inner layers' learning rate is missing", (-c, 0)),
        ("the correction is applied twice", (c, 0)),
        ("the correction is applied to the outer layer as well", (0, c)),
        ("the correction is applied to the outer layer instead of the inner ones", (-c, c)),
        (swap, (swapped, swapped)),
        (swap, (swapped, swapped + unfolded)),
        (plain, (-inner, -outer)),
        (plain, (-inner, -outer + folded)),
        ("the outer layers' learning rate does not make up for the folded multiplier", (0, folded)),
    ]
