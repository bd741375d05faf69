"""How much a readout's steps move what it computes, beside its base: what of its 1 / width_mult is there already.

A forward pass may divide by the width itself (``logits / (width / base_width)``), normalise what it reads out, or take
a weight whose own size does not matter (weight norm). None of it shows in the weight, all of it in the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_depthmup.running import tensors_in
from torch_depthmup.scaling.verify import filled, scaled
from torch_depthmup.tracing.replay import run_metered

__all__ = ["Looked", "Ratio", "missing_power", "response_ratios"]

STEP = 0.5  # powers of the width that a forward pass has: none, its root, itself
DIRECTIONS = 8  # random ones in the space of outputs, over which a response is the sum
SURE = 3.0  # standard errors


@dataclass(frozen=True)
class Looked:
    """Where to look at a weight.

    Args:
        base_name: its name in the base.
        summed: the dimension that its operation sums over.
        place: the module whose value is looked at, ``None`` for the outputs of the model.
        base_place: the same in the base.
    """

    base_name: str
    summed: int
    place: str | None
    base_place: str | None


@dataclass(frozen=True)
class Ratio:
    """A ratio of responses, with the standard error of its logarithm."""

    value: float
    error: float


def missing_power(ratio: Ratio, width_multiplier: float, *, expected: float = 1.0, is_plain: bool = True) -> float:
    """The exponent of 1 / width_mult that a readout lacks: 1, or 1/2 or 0 where the forward pass has the rest.

    Args:
        ratio: of the response to that of the base.
        width_multiplier: of the width that is read out, above 1.
        expected: what the numbers that can be seen around the operation leave.
        is_plain: whether the operation takes the weight itself, so that nothing but these numbers is to expect.
    """
    if not ratio.value > 0 or not math.isfinite(ratio.value):
        return expected
    off = math.log(ratio.value) - expected * math.log(width_multiplier)
    nearest = expected + round(off / math.log(width_multiplier) / STEP) * STEP
    is_sure = abs(off) > SURE * ratio.error or not is_plain
    return nearest if is_sure and 0 <= nearest <= max(1.0, expected) else expected


def response_ratios(
    model: tuple[nn.Module, Any],
    base: tuple[nn.Module, Any],
    looked: Mapping[str, Looked],
    factors: Mapping[str, float],
) -> dict[str, Ratio]:
    """For each weight the sum of its gradient's magnitudes, over that of its counterpart in the base.

    So much does a step of equal entries, along the gradient's signs, move what the weight reads out.

    Args:
        model: freshly initialized, and its example inputs.
        base: likewise.
        looked: the weights by name.
        factors: temporary factors on the model's parameters, which give them their planned sizes.

    Returns:
        The ratios; a weight that cannot be seen has none.
    """
    parameters = dict(model[0].named_parameters())
    with filled(p for p in parameters.values() if p.ndim > 1), scaled((parameters[n], f) for n, f in factors.items()):
        ours = _responses(*model, looked)
    with filled(p for p in base[0].parameters() if p.ndim > 1):
        theirs = _responses(*base, {at.base_name: replace(at, place=at.base_place) for at in looked.values()})
    found = {}
    for name, at in looked.items():
        mine, its = ours[name], theirs[at.base_name]
        if shared := mine.keys() & its.keys():
            one, other = (sum(known[key] for key in shared) for known in (mine, its))
            assert isinstance(one, Tensor) and isinstance(other, Tensor)
            if float(one.sum()) > 0 and float(other.sum()) > 0:
                found[name] = Ratio(float(one.sum() / other.sum()), math.hypot(_error(one), _error(other)))
    return found


def _error(responses: Tensor) -> float:
    """Standard error of the log of a sum over a width, whose members are draws from one distribution."""
    count = len(responses)
    return float(responses.std() / responses.mean()) / math.sqrt(count) if count > 1 else math.inf


Values = dict[str, dict[tuple[int, tuple[int, ...]], Tensor]]
"""By the weight's name, and by which value it is at its place and the value's shape: wide ones are not comparable."""


def _responses(model: nn.Module, inputs: Any, looked: Mapping[str, Looked]) -> Values:
    parameters = dict(model.named_parameters())
    with _returned(model, {at.place for at in looked.values() if at.place is not None}) as returned:
        returned[None] = list(tensors_in(run_metered(model, inputs, _Untied(parameters[name] for name in looked))))
    found: Values = {name: {} for name in looked}
    for place, values in returned.items():
        names = [name for name, at in looked.items() if at.place == place and parameters[name].requires_grad]
        for i, value in enumerate(values):
            if not names or not value.requires_grad or not value.is_floating_point():
                continue
            weights = [parameters[name] for name in names]
            sums = _along_directions(value, weights, [looked[name].summed for name in names], i)
            found |= {
                name: {**found[name], (i, tuple(value.shape)): response}
                for name, response in zip(names, sums, strict=True)
                if response is not None
            }
    return found


def _along_directions(
    value: Tensor, weights: Sequence[Tensor], summed: Sequence[int], seed: int
) -> list[Tensor | None]:
    """For each weight and each index of its summed dimension the magnitudes of a value's gradients, added up."""
    generator = torch.Generator().manual_seed(seed)
    sums: list[Tensor | None] = [None] * len(weights)
    for _ in range(DIRECTIONS):
        towards = torch.randn(value.shape, generator=generator).to(value)
        gradients = torch.autograd.grad(value, list(weights), towards, retain_graph=True, allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                sizes = gradient.abs().movedim(summed[i], 0).flatten(1).sum(1, dtype=torch.float64)
                before = sums[i]
                sums[i] = sizes if before is None else before + sizes
    return sums


@contextmanager
def _returned(model: nn.Module, places: set[str]) -> Iterator[dict[str | None, list[Tensor]]]:
    """What modules return while a model runs."""
    returned: dict[str | None, list[Tensor]] = {}

    def keep(place: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: returned.setdefault(place, []).extend(tensors_in(output))

    handles = [model.get_submodule(place).register_forward_hook(keep(place)) for place in places]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()


class _Untied(TorchFunctionMode):
    """Lookups take weights without their gradient, so that a shared weight's gradient is that of its products."""

    def __init__(self, weights: Iterator[Tensor]):
        super().__init__()
        self.weights = {id(weight) for weight in weights}

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in ("embedding", "embedding_bag", "__getitem__", "index_select", "gather"):
            args = [a.detach() if isinstance(a, Tensor) and id(a) in self.weights else a for a in args]
        return func(*args, **(kwargs or {}))
