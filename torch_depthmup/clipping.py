"""Gradient clipping in the metric of the explicit network, and noticing that something else clips.

A folded weight ``W' = m W`` has the gradient ``g / m``. Norms over all gradients, and bounds on single ones, mean the
same as in the network with explicit multipliers where they are taken of ``m g'``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.errors import OptimizerError
from torch_depthmup.running import number_of
from torch_depthmup.scaling.registry import folded_multipliers, way_out_of_folding

__all__ = ["ClippingNotice", "clip_grad_norm_", "clip_grad_value_"]

LOOKS = 10  # first steps in which clipping is looked for
ALIKE = 3  # steps in a row with the same norm that tell of clipping
SAME = 1e-4  # relative: torch divides by norm + 1e-6

_ours: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
"""Of the folded parameters that were given to the functions below, one a call, by its id."""


def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` with the norm of the gradients in the network with explicit multipliers.

    Fold and wrap then clip alike. Parameters without a plan, and those of a wrapped model, count as in torch.

    Args:
        parameters: as torch takes them, or the model itself. Sharded ones (DTensor) too.
        max_norm: the largest norm that is left as it is.
        norm_type: p of the p-norm, or ``inf``.
        error_if_nonfinite: raise where the norm is nan or infinite.
        foreach: as in torch.

    Returns:
        The norm before clipping, a scalar tensor.

    Raises:
        PlanError: a flat parameter of FSDP1 holds several parameters of a folded plan.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.

    Source: ``sqrt(sum |m_i g_i|^2)`` with the forward multiplier ``m_i`` folded into parameter i.

    >>> import torch, torch_depthmup as dm
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
    >>> dm.clip_grad_norm_(model, 1.0)
    tensor(5.)
    """
    params = _with_gradients(parameters)
    alike: dict[Any, list[Tensor]] = {}
    for parameter, m in zip(params, _multipliers(params), strict=True):
        assert parameter.grad is not None
        alike.setdefault((m, _mesh(parameter.grad)), []).append(parameter.grad)
    norms = []
    for (m, _), gradients in alike.items():
        norm = torch.nn.utils.get_total_norm(gradients, norm_type, False, foreach)
        if m == 1.0 and len(alike) == 1:
            norms.append(norm)
        else:  # norms of different meshes add up as ordinary numbers
            norms.append(m * getattr(norm, "full_tensor", lambda norm=norm: norm)())
    if not norms:
        return torch.tensor(0.0)
    total = norms[0]
    if len(norms) > 1:
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), float(norm_type))
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the total norm of order {norm_type} of the gradients is not finite: {total}")
    for some in _by_mesh(params):
        torch.nn.utils.clip_grads_with_norm_(some, max_norm, total, foreach)
    return total


def _multipliers(params: list[Tensor]) -> list[float]:
    """Each parameter's folded multiplier; notes that they were clipped in the right metric."""
    multipliers = folded_multipliers(params)
    first = next((p for p, m in zip(params, multipliers, strict=True) if m != 1.0), None)
    if first is not None:
        _ours[id(first)] = first
    return multipliers


def _mesh(tensor: Tensor) -> Any:
    """The processes over which a tensor is spread; torch's functions on lists of tensors take those of one mesh."""
    return getattr(tensor, "device_mesh", None)


def _by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(_mesh(tensor), []).append(tensor)
    return list(groups.values())


def clip_grad_value_(
    parameters: nn.Module | Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """``torch.nn.utils.clip_grad_value_`` with the gradients of the network with explicit multipliers.

    Args:
        parameters: as torch takes them, or the model itself.
        clip_value: bound on the absolute value of each entry of ``m g'``.
        foreach: as in torch.

    Raises:
        PlanError: a flat parameter of FSDP1 holds several parameters of a folded plan.
    """
    params = _with_gradients(parameters)
    alike: dict[Any, list[Tensor]] = {}
    for parameter, m in zip(params, _multipliers(params), strict=True):
        alike.setdefault((m, _mesh(parameter)), []).append(parameter)
    for (m, _), some in alike.items():
        torch.nn.utils.clip_grad_value_(some, clip_value / m, foreach)


def _with_gradients(parameters: nn.Module | Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    listed = list(parameters)
    if strange := [item for item in listed if not isinstance(item, Tensor)]:
        raise OptimizerError(f"clipping takes tensors or a module, not {type(strange[0]).__name__}")
    return [parameter for parameter in listed if parameter.grad is not None]


class ClippingNotice:
    """Tells from gradients that something clips them without the multipliers.

    Clipped by norm, gradients have one and the same norm step after step, or again and again the same largest one;
    clipped by value, the same largest entry. Looks in the first steps, and at three more each time that their number
    has doubled.
    """

    def __init__(self) -> None:
        self.seen: tuple[list[float], list[float]] = ([], [])

    @staticmethod
    def looks_at(step: int) -> bool:
        """Whether it looks at a step, counted from 1."""
        return step <= LOOKS or step - (1 << step.bit_length() - 1) < ALIKE

    def look(self, parameters: Sequence[Tensor]) -> str | None:
        """What is wrong, once it shows; None otherwise. Computes two norms."""
        if any(id(parameter) in _ours for parameter in parameters):
            return None
        found = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
        # A gradient of another type, unless it is sharded, may have no entries to look at (`nfd.implicit_model`).
        gradients = [grad for grad in found if type(grad) is Tensor or hasattr(grad, "full_tensor")]
        if not gradients:
            return None
        for seen, order in zip(self.seen, (2.0, float("inf")), strict=True):
            norms = [number_of(torch.nn.utils.get_total_norm(some, order)) for some in _by_mesh(gradients)]
            seen.append(float(torch.linalg.vector_norm(torch.tensor(norms), order)))
        norm, entry = map(_again_and_again, self.seen)
        if bool(norm) == bool(entry):  # where both stay the same, the gradients themselves do
            return None
        label, function = ("norm", "clip_grad_norm_") if norm else ("largest entry", "clip_grad_value_")
        return (
            f"the gradients' {label} was {norm or entry:.4g} in each of {ALIKE} steps, so something clips them. A "
            "folded weight's gradient is 1/m times that of the network with explicit multipliers, so this clips "
            f"another network. Write dm.{function}(model, ...) in place of torch's, in the hook that a trainer calls "
            f"before the step, or where it has none {way_out_of_folding(parameters)}"
        )


def _again_and_again(seen: Sequence[float]) -> float:
    """The value of the last steps, or the largest one, where it was there often enough; 0 where there is none.

    Where training diverges there is none: nothing is less than infinity by a share of it.
    """
    for some, value in ((seen[-ALIKE:], max(seen[-ALIKE:])), (seen, max(seen))):
        if not math.isfinite(value):
            return 0.0
        if value > 0 and sum(value - one <= SAME * value for one in some) >= ALIKE:
            return value
    return 0.0
