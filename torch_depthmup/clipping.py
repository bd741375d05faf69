"""Gradient clipping in the metric of the explicit network, and noticing that something else clips.

A folded weight ``W' = m W`` has the gradient ``g / m``. Norms over all gradients, and bounds on single ones, mean the
same as in the network with explicit multipliers where they are taken of ``m g'``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.errors import OptimizerError
from torch_depthmup.running import number_of
from torch_depthmup.scaling.registry import folded_multipliers

__all__ = ["ClippingNotice", "clip_grad_norm_", "clip_grad_value_"]

LOOKS = 10  # first steps in which clipping is looked for
ALIKE = 3  # steps in a row with the same norm that tell of clipping
SAME = 1e-4  # relative: torch divides by norm + 1e-6


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
    for parameter, m in zip(params, folded_multipliers(params), strict=True):
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
    for parameter, m in zip(params, folded_multipliers(params), strict=True):
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
    """Tells from the first steps' gradients that something clips them without the multipliers.

    Clipped by norm, gradients have one and the same norm step after step; clipped by value, one and the same largest
    entry.
    """

    def __init__(self) -> None:
        self.looks = 0
        self.seen: tuple[list[float], list[float]] = ([], [])

    @property
    def finished(self) -> bool:
        """Whether it looks no more."""
        return self.looks >= LOOKS

    def look(self, parameters: Sequence[Tensor]) -> str | None:
        """What is wrong, once it shows; None otherwise. Computes two norms, in the first steps only."""
        found = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
        # A gradient of another type, unless it is sharded, may have no entries to look at (`nfd.implicit_model`).
        gradients = [grad for grad in found if type(grad) is Tensor or hasattr(grad, "full_tensor")]
        if self.finished or not gradients:
            return None
        self.looks += 1
        for seen, order in zip(self.seen, (2.0, float("inf")), strict=True):
            norms = [number_of(torch.nn.utils.get_total_norm(some, order)) for some in _by_mesh(gradients)]
            seen.append(float(torch.linalg.vector_norm(torch.tensor(norms), order)))
        same = [_alike(seen[-ALIKE:]) for seen in self.seen]
        for i, function in enumerate(("clip_grad_norm_", "clip_grad_value_")):
            last = self.seen[i][-ALIKE:]
            if same[i] and not same[1 - i]:  # where both stay the same, the gradients themselves do
                return (
                    f"the gradients' {'norm' if 'norm' in function else 'largest entry'} was {last[0]:.4g} in each of "
                    f"{ALIKE} steps, so something clips them. A folded weight's gradient is 1/m times that of the "
                    "network with explicit multipliers, so this clips another network than how='wrap' would. Write "
                    f"dm.{function}(model, ...) in place of torch's, or dm.parametrize(..., how='wrap') where a "
                    "trainer clips by itself"
                )
        return None


def _alike(last: list[float]) -> bool:
    return len(last) == ALIKE and last[0] > 0 and max(last) - min(last) <= SAME * last[0]
