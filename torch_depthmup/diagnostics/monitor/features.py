"""What a monitor watches, as keys: the function, the residual streams after each addition, the weight operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["FUNCTION", "Feature", "Function", "Layer", "StreamAfter", "by_kind", "from_kinds"]


@dataclass(frozen=True)
class Function:
    """The network's main output."""


@dataclass(frozen=True)
class StreamAfter:
    """The residual stream after the addition of a branch, by the branch's index."""

    branch: int


@dataclass(frozen=True)
class Layer:
    """A weight operation, by its parameter's name; from the second use in a pass on with ``#1``, ``#2``, ..."""

    name: str


Feature = Function | StreamAfter | Layer

FUNCTION = Function()


def by_kind(features: Mapping[Feature, Tensor]) -> dict[str, Any]:
    """Features as plain dictionaries, which ``torch.load(weights_only=True)`` reads."""
    kinds: dict[str, Any] = {"streams": {}, "layers": {}}
    for feature, value in features.items():
        match feature:
            case StreamAfter(branch):
                kinds["streams"][branch] = value
            case Layer(name):
                kinds["layers"][name] = value
            case Function():
                kinds["function"] = value
    return kinds


def from_kinds(kinds: Mapping[str, Any]) -> dict[Feature, Tensor]:
    """What `by_kind` was made of."""
    features: dict[Feature, Tensor] = {FUNCTION: kinds["function"]}
    features |= {StreamAfter(branch): value for branch, value in kinds["streams"].items()}
    features |= {Layer(name): value for name, value in kinds["layers"].items()}
    return features
