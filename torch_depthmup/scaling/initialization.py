"""The sizes that values start with, beside those of the base, and what they should be.

A library may start every matrix at 0.02, by fan-in, or smaller in deep networks. With the base at hand none of this has
to be known: a hidden weight should start at the base's size times width_mult ** -1/2, everything else at the base's
size, and a depth factor that the branch has already is a part of its multiplier.

Sizes are root mean squares. They are random, so a ratio is taken for the likeliest powers of the width and the depth
multiplier from which it differs by no more than chance, and for what it is where there are none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torch_depthmup.running import number_of
from torch_depthmup.scaling.plan import InitialSize
from torch_depthmup.scaling.verify import entries, filled, scaled
from torch_depthmup.tracing.branches import Trace
from torch_depthmup.tracing.replay import Meter, run_metered

__all__ = ["correction", "default_bounds", "forward_factor", "initial_size", "relative_sizes", "simplest"]

SURE = 4.0  # standard errors by which a size must miss a power before it is taken for another
LEAST = 0.1  # spread of branch sizes, relative to them, that is always there: networks are of finite width
SIGNIFICANT = 4.0  # standard errors by which branch sizes must differ ...
FEW = 4.0  # ... and this share of it more for each degree of freedom that is missing
RARE = 1e-4  # how seldom uniform values may all be as far from their bound as some are
NORMAL = 3.0  # kurtosis of normal values
ROUNDING = 1e-6  # spread, relative to the size, of values that are all the same
UNEVEN = 0.75  # share of a factor that may change along a stream: 0.55 for 1 / sqrt(l), 1 for a ** l
RELATIVE = 0.01  # and this much of it, at least: initializations truncate and round
POWERS = (
    ((0.0, 0.0),),
    tuple(itertools.product((0.0, -0.5, 0.5), (0.0,))),
    tuple(itertools.product((0.0, -0.5, 0.5), (0.5,))),
    tuple(itertools.product((0.0, -0.5, 0.5, -1.0, 1.0), (0.0, 0.25, 0.5, 1.0, -0.25, -0.5))),
)
"""Exponents in the width and the depth multiplier of what a size lacks, the likely ones first: nothing; what one
standard deviation for all widths, or fan-in where a size should be fixed, lacks, and GPT-2's depth factor; others."""


def default_bounds(model: nn.Module) -> dict[str, float]:
    """1 / sqrt(fan_in) of linear, convolution and recurrent layers: the bound of PyTorch's default initialization."""
    bounds = {}
    for name, module in model.named_modules():
        # Sizes that the layer was made with: a weight that is computed, as under spectral norm, may write to buffers.
        if isinstance(module, nn.Linear):
            fan_in = module.in_features
        elif isinstance(module, _ConvNd):
            fan_in = (module.out_channels if module.transposed else module.in_channels) // module.groups
            fan_in *= math.prod(module.kernel_size)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            fan_in = module.hidden_size
        else:
            continue
        for own, _ in module.named_parameters():
            if "." not in own or own.startswith("parametrizations."):
                bounds[f"{name}.{own}".lstrip(".")] = max(fan_in, 1) ** -0.5
    return bounds


def initial_size(parameter: Tensor, bound: float | None = None) -> InitialSize | None:
    """The size of a freshly initialized parameter, or ``None`` on ``meta``; works on sharded parameters.

    Args:
        parameter: any shape.
        bound: of PyTorch's default initialization. Values that look uniform up to it have its size too, exactly.
    """
    if parameter.is_meta or not parameter.numel() or not parameter.is_floating_point():
        return None
    # Only sums: the largest of no values is an error, and of a small parameter some processes may hold none.
    values = parameter.detach().float()
    size = number_of(torch.linalg.vector_norm(values)) / math.sqrt(values.numel())
    mean = number_of(values.sum()) / values.numel()
    spread = number_of(torch.linalg.vector_norm(values - mean)) / math.sqrt(values.numel())
    if spread <= ROUNDING * size and values.numel() > 1 or size == 0:  # gains at 1, biases at 0
        return InitialSize(size, 0.0)
    kurtosis = number_of(values.square().square().sum()) / values.numel() / size**4
    error = math.sqrt((max(kurtosis, NORMAL) - 1) / 4 / values.numel())
    is_uniform = bound is not None and _is_uniform(values, size, bound)
    return InitialSize(size, error, bound / math.sqrt(3) if bound is not None and is_uniform else None)


def _is_uniform(values: Tensor, size: float, bound: float) -> bool:
    """Whether values may be uniform up to a bound: none lies beyond, the largest near it, and their size is right."""
    count = values.numel()
    largest = bound * RARE ** (1 / count)  # of independent values, all lie below with a chance of RARE
    if number_of((values.abs() > bound * 1.01).sum()) or not number_of((values.abs() > largest).sum()):
        return False
    return abs(size * math.sqrt(3) / bound - 1) < SURE * math.sqrt(0.2 / count)  # variance of a uniform value's square


def simplest(ratio: float, error: float, width_multiplier: float, depth_multiplier: float) -> tuple[float, float]:
    """A ratio as a factor from width and one from depth: the likeliest powers that it may be, or the ratio itself.

    Args:
        ratio: measured, positive.
        error: standard error of its logarithm.
        width_multiplier: width over that of the base.
        depth_multiplier: depth over that of the base.
    """
    tolerance = SURE * error + RELATIVE
    width, depth = math.log(width_multiplier), math.log(depth_multiplier)
    for powers in POWERS:
        distance, a, b = min((abs(math.log(ratio) - a * width - b * depth), a, b) for a, b in powers)
        if distance <= tolerance:
            return width_multiplier**a, depth_multiplier**b
    return (ratio, 1.0) if width_multiplier != 1 else (1.0, ratio)


def correction(
    pairs: Iterable[tuple[InitialSize | None, InitialSize | None]], width_multiplier: float, depth_multiplier: float
) -> tuple[float, float]:
    """The factors for width and for depth that take the parameters of one kind to the sizes that they should have.

    Args:
        pairs: for each parameter the size that it should have and the one that it has; ``None`` is not known.
        width_multiplier: of these parameters.
        depth_multiplier: of their stream, or of the network's.
    """
    known = [(w, h) for w, h in pairs if w is not None and h is not None and w.size > 0 and h.size > 0]
    if not known or width_multiplier == depth_multiplier == 1:
        return 1.0, 1.0
    # Several parameters of the model may be compared with one of the base, which counts once.
    if all(size.exact is not None for pair in known for size in pair):  # both as by default, so nothing is chance
        known = [(InitialSize(w.exact or 0.0, 0.0), InitialSize(h.exact or 0.0, 0.0)) for w, h in known]
    (wanted, wanted_error), (has, has_error) = _mean({w for w, _ in known}), _mean([h for _, h in known])
    error = math.hypot(wanted_error, has_error)
    return simplest(math.exp(wanted - has), error, width_multiplier, depth_multiplier)


def _mean(sizes: Collection[InitialSize]) -> tuple[float, float]:
    """The mean of log sizes, and its standard error."""
    mean = sum(math.log(size.size) for size in sizes) / len(sizes)
    return mean, math.hypot(*(size.error for size in sizes)) / len(sizes)


def relative_sizes(
    model: nn.Module, inputs: Any, found: Trace, scales: Mapping[str, float] | None = None
) -> dict[int, float]:
    """How large each branch's value is beside what it is added to, when no branch is added.

    So every branch of a stream takes what the skips alone hand on, however deep the network is. Parameters that are
    zero throughout have temporary values. A branch whose addition is out of Python's sight has no number.

    Args:
        model: freshly initialized.
        inputs: example inputs.
        found: its trace.
        scales: temporary factors on parameters.
    """
    sizes: dict[int, float] = {}

    def visit(branch: int, value: Tensor, skip: Tensor) -> Tensor:
        beside = float(entries(skip).square().mean().sqrt())
        size = float(entries(value).square().mean().sqrt())
        if beside > 0 and math.isfinite(size / beside) and size > 0:
            sizes[branch] = found.traced[branch].numbers.alpha * size / beside
        return torch.zeros_like(value)

    inside = {name for branch in found.branches for name in (*branch.inner, *branch.outer)}
    parameters = dict(model.named_parameters())
    factors = [(parameters[name], factor) for name, factor in (scales or {}).items()]
    with torch.no_grad(), filled(parameters[name] for name in parameters if name in inside), scaled(factors):
        run_metered(model, inputs, Meter(found, visit))
    return sizes


Beside = Sequence[tuple[float, float | None]]
"""Of each branch of a kind, what numbers multiply it with, and its measured size; both beside its skip."""


def forward_factor(ours: Beside, base: Beside, depth_multiplier: float) -> tuple[float, bool]:
    """The factor that the forward pass of a deep network has on one kind of branch, relative to its base.

    Args:
        ours: the branches of this kind, with sizes from `relative_sizes` where there are any.
        base: those of the base.
        depth_multiplier: additions over those of the base.

    Returns:
        The factor, 1 where branches are as large as those of the base, or where chance could explain that they are
        smaller; and whether something besides such a factor makes them differ: numbers that grow or shrink layer upon
        layer, as where skips are multiplied over and over.
    """
    if not ours or not base or depth_multiplier <= 1:
        return 1.0, False
    known = _known_factor([number for number, _ in ours], [number for number, _ in base], depth_multiplier)
    mine, its = (
        [math.log(size / (number if known else 1)) for number, size in group if size] for group in (ours, base)
    )
    if not mine or not its:
        return known or 1.0, known is None
    measured, is_unclear = _measured_factor(mine, its, depth_multiplier)
    # What grows along the stream may be made up for: a branch without a norm grows with its skip.
    return (known or 1.0) * measured, is_unclear or known is None and _follows(mine, [math.log(n) for n, _ in ours])


def _follows(sizes: Sequence[float], numbers: Sequence[float]) -> bool:
    """Whether sizes change along a stream as the numbers do, rather than not at all; both logs."""
    mean = _average(numbers)
    spread = sum((number - mean) ** 2 for number in numbers)
    return sum((n - mean) * size for n, size in zip(numbers, sizes, strict=False)) >= spread / 2


def _known_factor(ours: Sequence[float], base: Sequence[float], depth_multiplier: float) -> float | None:
    """The ratio of numbers, at most 1 and the same everywhere along the stream; ``None`` where it is not."""
    logs = [list(map(math.log, group)) for group in (ours, base)]
    edges = [round(i * len(ours) / len(base)) for i in range(len(base) + 1)]
    ratios = [
        _average(logs[0][start:end]) - there
        for (start, end), there in zip(pairwise(edges), logs[1], strict=True)
        if start < end
    ]
    mean = _average(logs[0]) - _average(logs[1])
    if max(ratios) - min(ratios) > max(UNEVEN * abs(mean), ROUNDING) or mean > ROUNDING:
        return None
    exponent = mean / math.log(depth_multiplier)
    nearest = round(4 * exponent) / 4
    return depth_multiplier ** (nearest if abs(exponent - nearest) < ROUNDING else exponent)


def _measured_factor(ours: Sequence[float], base: Sequence[float], depth_multiplier: float) -> tuple[float, bool]:
    """A power of the depth multiplier below 1 by which sizes differ, from their logs; and whether they do otherwise."""
    difference, margin = _average(ours) - _average(base), _margin(ours, base)
    step = math.log(depth_multiplier) / 4  # a quarter of a power
    if margin > 2 * step:
        return 1.0, abs(difference) > margin
    if difference > -max(step / 2, margin):
        return 1.0, difference > max(2 * step, margin)
    exponent = round(difference / step) / 4
    near = abs(difference - 4 * exponent * step) <= margin + RELATIVE
    return (depth_multiplier**exponent if near else math.exp(difference)), False


def _margin(*logs: Sequence[float]) -> float:
    """By how much chance may make mean log sizes differ.

    Chance is what differs between neighbours: a factor of a layer's own, such as 1 / sqrt(l), changes slowly.
    """
    changes = [b - a for group in logs for a, b in pairwise(group)]
    free = max(len(changes), 1)
    deviation = max(math.sqrt(sum(change**2 for change in changes) / 2 / free), LEAST)
    # Of few branches the scatter may come out small by chance, so they must differ by more.
    return SIGNIFICANT * (1 + FEW / free) * deviation * math.sqrt(sum(1 / len(group) for group in logs))


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
