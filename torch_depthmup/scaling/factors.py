"""What the forward pass multiplies weights with by itself, beside the base: ``W @ x / sqrt(n)``, ``sqrt(n) * E``.

A weight W in a network that multiplies it by c trains as c W would in a network that does not, if its size is 1 / c of
what that should be and its learning rate makes up for it. So its value is taken for one with 1 / c folded into it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch_depthmup.errors import PlanError
from torch_depthmup.rules import Width
from torch_depthmup.running import normalise_name
from torch_depthmup.scaling.matching import Counterpart, counterparts
from torch_depthmup.scaling.plan import PlannedParameter
from torch_depthmup.tracing.branches import Trace
from torch_depthmup.tracing.uses import Use

__all__ = ["seen_powers", "warn_unseen", "with_factors"]

ALIKE = 1e-6  # relative distance within which two factors are one


def with_factors(
    found: Trace, base_found: Trace, base_names: Iterable[str], entries: Sequence[PlannedParameter]
) -> list[PlannedParameter]:
    """The parameters that have a width, with the factor on them that is there, relative to the base.

    Of a readout it is what an embedding of the same values is multiplied with (see `seen_powers`); and what scales
    attention scores is a matter of the size of heads, where that differs from the base's.

    Raises:
        PlanError: a parameter is used in several places that multiply it differently from the base, or its parts are.
    """
    names = {normalise_name(name): name for name in base_names}
    others = counterparts([entry.name for entry in entries], names)
    resized = _with_other_heads(found, base_found, others)
    changed, unseen = [], []
    for entry in entries:
        other = others[entry.name]
        if entry.width is not None and entry.width.widths and other is not None and other.name in names:
            pair = found.uses.get(entry.name, ()), base_found.uses.get(names[other.name], ())
            kept = [_factors(entry, uses, is_resized=entry.name in resized) for uses in pair]
            ratio = _ratio(entry.name, *kept)
            if entry.width.unnormalised and entry.name not in resized:
                _refuse_unlike_parts(entry.name, entry.width, *pair)
            if math.isnan(ratio):
                unseen.append(entry.name)
            elif abs(ratio - 1) > ALIKE:
                size = entry.initial
                if size is not None:
                    exact = None if size.exact is None else size.exact / ratio
                    size = replace(size, size=size.size / ratio, exact=exact)
                reason = f"{entry.reason}; the forward pass multiplies it by {ratio:.4g}, relative to the base"
                entry = replace(entry, present=ratio, folded=entry.folded / ratio, initial=size, reason=reason)
        changed.append(entry)
    if unseen:
        warn_unseen(unseen)
    return changed


def _ratio(name: str, ours: Sequence[float], theirs: Sequence[float]) -> float:
    if any(map(math.isnan, (*ours, *theirs))):
        return math.nan
    if len(ours) == len(theirs) == 1:
        return ours[0] / theirs[0]
    if len(ours) == len(theirs) and all(math.isclose(a, b, rel_tol=ALIKE) for a, b in zip(ours, theirs, strict=True)):
        return 1.0
    if not ours or not theirs:
        return 1.0
    both = [", ".join(f"{factor:.4g}" for factor in group) for group in (ours, theirs)]
    raise PlanError(
        f"{name} is used in several places that multiply it by {both[0]}, in the base by {both[1]}, so that no "
        "one size and learning rate is right. Multiply it alike everywhere, or keep the base as wide as the model here"
    )


def _refuse_unlike_parts(name: str, width: Width, ours: Sequence[Use], theirs: Sequence[Use]) -> None:
    """Refuses a weight one part of which is multiplied by a number that goes with the width: it needs its own rate."""
    groups = [_different(f for use in uses for f in use.unnormalised.factors) for uses in (ours, theirs)]
    is_alike = len(groups[0]) == len(groups[1]) and all(map(_is_close, *groups))
    if is_alike or any(map(math.isnan, (*groups[0], *groups[1]))):
        return
    both = [", ".join(f"{factor:.4g}" for factor in group) for group in groups]
    rows = ", ".join(f"{start} to {end - 1}" for start, end in width.unnormalised)
    raise PlanError(
        f"what rows {rows} of {name} make is multiplied by {both[0]}, in the base by {both[1]}, and a norm follows "
        "what the other rows make, so that no one learning rate is right for both. Give these rows a weight of their "
        "own, or take the number out"
    )


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=ALIKE)


def _factors(entry: PlannedParameter, uses: Sequence[Use], *, is_resized: bool) -> list[float]:
    """The different factors with which a parameter is used: a readout, but for where it reads out."""
    assert entry.width is not None
    is_readout = entry.width.kind == "readout"
    kept = [use for use in uses if not (is_readout and use.is_weight_operation)]
    return _different(use.factor / (use.scores_factor if is_resized else 1.0) for use in kept)


def _different(factors: Iterable[float]) -> list[float]:
    """Factors that differ, without signs and in order."""
    found: list[float] = []
    for factor in map(abs, factors):
        if factor != 0 and not any(math.isclose(factor, known, rel_tol=ALIKE) for known in found):
            found.append(factor)
    return sorted(found)


def seen_powers(
    found: Trace, base_found: Trace, base_names: Iterable[str], entries: Sequence[PlannedParameter]
) -> dict[str, float]:
    """For each readout the exponent of 1 / width_mult that the numbers around its product leave, where not all of it.

    Raises:
        PlanError: it reads out in several places with different numbers.
    """
    names = {normalise_name(name): name for name in base_names}
    others = counterparts([entry.name for entry in entries], names)
    powers, unseen = {}, []
    for entry in entries:
        other, width = others[entry.name], entry.width
        if (
            width is None
            or width.kind != "readout"
            or width.multiplier == 1
            or other is None
            or other.name not in names
        ):
            continue
        groups = found.uses.get(entry.name, ()), base_found.uses.get(names[other.name], ())
        kept = [_different(use.factor for use in uses if use.is_weight_operation) for uses in groups]
        ratio = _ratio(entry.name, *kept)
        if math.isnan(ratio):
            unseen.append(entry.name)
        elif abs(ratio - 1) > ALIKE:
            powers[entry.name] = 1 + math.log(ratio) / math.log(width.multiplier)
    if unseen:
        warn_unseen(unseen)
    return powers


def warn_unseen(names: Sequence[str]) -> None:
    """Says of parameters what cannot be seen on ``meta``."""
    named = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    warnings.warn(
        f"what the forward pass multiplies {named} with is a tensor, whose number cannot be seen on the meta device: "
        "it is taken for the same as in the base. If it goes with the width (a root of it on embeddings, say), build "
        "model and base on a real device to plan, or write it as a Python number",
        UserWarning,
        stacklevel=5,
    )


def _with_other_heads(found: Trace, base_found: Trace, others: Mapping[str, Counterpart | None]) -> set[str]:
    """The parameters that make queries or keys of another size than in the base."""
    sizes = {normalise_name(name): a.size for a in base_found.attentions for name in (*a.query, *a.key)}
    ours = {name: a.size for a in found.attentions for name in (*a.query, *a.key)}
    known = {name: other.name for name, other in others.items() if other is not None}
    return {name for name, size in ours.items() if sizes.get(known.get(name, ""), size) != size}
