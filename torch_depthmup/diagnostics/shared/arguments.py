"""What a user hands to the instruments that train: values of a grid, seeds, data. One clear line where it is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from torch_depthmup.errors import DepthMuPError
from torch_depthmup.running import tensors_in

__all__ = ["checked_samples", "positive_integer", "positive_integers", "positive_numbers", "seeds_of"]


def positive_integer(name: str, value: Any) -> int:
    """A positive integer.

    Args:
        name: what it is, for the message.
        value: an ``int``, or an integer of another library.

    Raises:
        DepthMuPError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise DepthMuPError(f"{name} must be a positive integer, not {value!r}")
    return int(value)


def positive_integers(name: str, values: Any, least: int = 1) -> list[int]:
    """Different positive integers, ascending.

    Args:
        name: what the values are, for the message.
        values: a list, or a range or array of integers.
        least: how many there must be.

    Raises:
        DepthMuPError: they are something else, or too few.
    """
    if not isinstance(values, Iterable):
        raise DepthMuPError(f"{name} must be a list of positive integers, not {values!r}")
    given = list(values)
    if any(isinstance(value, bool) or not isinstance(value, Integral) or value < 1 for value in given):
        raise DepthMuPError(f"{name} must be positive integers, not {values!r}")
    found = sorted({int(value) for value in given})
    if len(found) < least:
        count = {1: "at least one value", 2: "at least two different values"}[least]
        raise DepthMuPError(f"{name} must hold {count}, not {given}")
    return found


def positive_numbers(name: str, values: Any) -> list[float]:
    """Different positive numbers in their order.

    Args:
        name: what the values are, for the message.
        values: a list or array, with one at least.

    Raises:
        DepthMuPError: they are something else.
    """
    given = list(values) if isinstance(values, Iterable) else []
    if not given or not all(isinstance(value, Real) and 0 < float(value) < math.inf for value in given):
        raise DepthMuPError(f"{name} must hold positive numbers, at least one, not {values!r}")
    return list(dict.fromkeys(map(float, given)))


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """The seeds themselves, where they are named or counted, in order and without repetition.

    Raises:
        DepthMuPError: there is none, or one is not an integer.
    """
    which = range(int(seeds)) if isinstance(seeds, Integral) else seeds
    given = list(which) if isinstance(which, Iterable) else []
    if not given or not all(isinstance(seed, Integral) for seed in given):
        raise DepthMuPError(f"seeds must be how many or which, at least one integer, not {seeds!r}")
    return list(dict.fromkeys(map(int, given)))


def checked_samples(data: Any, source: str = "data") -> tuple[Any, Tensor]:
    """A pair (inputs, targets) of equally many samples.

    Args:
        data: what should be one.
        source: what to call it in the message.

    Raises:
        DepthMuPError: it is something else, or holds no samples.
    """
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor) and data[1].ndim):
        found = f"{type(data).__name__}{f' of {len(data)}' if isinstance(data, tuple | list) else ''}"
        raise DepthMuPError(f"{source} must be a pair (inputs, targets) with a tensor of targets, not a {found}")
    inputs, targets = data
    tensors = list(tensors_in(inputs))
    if not tensors:
        raise DepthMuPError(f"{source}: the inputs hold no tensor. Inputs are a tensor, or a dict or tuple of tensors")
    sizes = {len(tensor) for tensor in (*tensors, targets) if tensor.ndim}
    if len(sizes) != 1:
        raise DepthMuPError(f"{source}: inputs and targets must have equally many samples, not {sorted(sizes)}")
    if not len(targets):
        raise DepthMuPError(f"{source}: there are no samples in it")
    return inputs, targets
