"""Numbers that autograd keeps of an operation: what it multiplies with, and what power of a factor it hands on."""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_depthmup.tracing.operations import Kind

__all__ = ["alpha_of", "factor_of", "power_of"]

POWERS = {"Sqrt": 0.5, "Rsqrt": -0.5, "Reciprocal": -1.0, "Var": 2.0, "Std": 1.0, "LinalgVectorNorm": 1.0, "Norm": 1.0}
"""Of functions that are no kind of their own."""
BOUNDED = ("ClampMin", "Clamp")  # from below, by what keeps a division from failing


def factor_of(kind: Kind, autograd_node: Any) -> float:
    """The number that a node multiplies with, as autograd keeps it; of fused attention the scale of its scores."""
    if kind is Kind.ATTENTION:
        scale = getattr(autograd_node, "_saved_scale", None)
        query = getattr(autograd_node, "_saved_query", None)
        return float(scale) if scale is not None else 1.0 if query is None else query.shape[-1] ** -0.5
    if kind is Kind.MATRIX_PRODUCT:
        return float(getattr(autograd_node, "_saved_alpha", 1.0) or 1.0)
    if kind not in (Kind.MULTIPLY, Kind.DIVIDE):
        return 1.0
    if _operation(autograd_node) in ("Addcmul", "Addcdiv"):
        return float(autograd_node._saved_value)
    names = ["_saved_other", "_saved_self"]
    first_is_constant = autograd_node.next_functions[0][0] is None
    if first_is_constant or kind is Kind.MULTIPLY and not _is_number(autograd_node, names[0]):
        names.reverse()
    if not _is_number(autograd_node, names[0]):
        return 1.0
    saved = getattr(autograd_node, names[0])
    if isinstance(saved, torch.Tensor) and saved.is_meta:
        return math.nan
    number = float(saved.detach() if isinstance(saved, torch.Tensor) else saved)
    return 1 / number if kind is Kind.DIVIDE and number else number


def alpha_of(autograd_node: Any) -> float:
    """What ``torch.add(..., alpha=)`` multiplies its second operand with; 1 for everything else."""
    is_plain = _operation(autograd_node) in ("Add", "Sub")
    return float(getattr(autograd_node, "_saved_alpha", 1.0)) if is_plain else 1.0


def _operation(autograd_node: Any) -> str:
    return type(autograd_node).__name__.partition("Backward")[0]


def _is_number(autograd_node: Any, name: str) -> bool:
    saved = getattr(autograd_node, name, None)
    return isinstance(saved, float | int) or isinstance(saved, torch.Tensor) and saved.numel() == 1


def power_of(kind: Kind, autograd_node: Any) -> float:
    """The power of a positive factor of its data that a node's value gets; NaN where there is none."""
    name = _operation(autograd_node)
    if name == "Pow":
        exponent = getattr(autograd_node, "_saved_exponent", None)
        return float(exponent) if isinstance(exponent, float | int) else math.nan
    if kind.is_linear or kind.takes_one_factor_of_data or kind in (Kind.HOMOGENEOUS, Kind.MAX_POOL) or name in BOUNDED:
        return 1.0
    return POWERS.get(name, math.nan)
