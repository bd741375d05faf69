"""Attention scores of heads that are larger than the base's: 1 / head size in place of its root, on the query side."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch_depthmup.rules import scores_multiplier
from torch_depthmup.running import normalise_name
from torch_depthmup.scaling.factors import warn_unseen
from torch_depthmup.scaling.matching import counterparts
from torch_depthmup.scaling.plan import PlannedParameter
from torch_depthmup.tracing.attention import Attention
from torch_depthmup.tracing.branches import Trace

__all__ = ["with_head_sizes"]


def with_head_sizes(
    found: Trace, base_found: Trace, base_names: Iterable[str], entries: Sequence[PlannedParameter]
) -> list[PlannedParameter]:
    """Folds what attention scores lack to the base's times base head size over head size into what makes the queries.

    What the forward pass multiplies scores with is read off it, so a factor that is there already is not supplied
    again, and neither is one to cosines. Warns where nothing makes queries alone, as in a fused projection.

    Source: arXiv 2203.03466, definition 4.1 (1/d attention).
    """
    changed = {entry.name: entry for entry in entries}
    theirs = {normalise_name(name): a for a in base_found.attentions for name in (*a.query, *a.key)}
    others = counterparts(changed, base_names)
    unmet: list[tuple[Attention, Attention, float]] = []
    folded: set[str] = set()
    unseen: list[str] = []
    for attention in found.attentions:
        names = [others[name] for name in (*attention.query, *attention.key) if name in others]
        base = next((theirs[other.name] for other in names if other is not None and other.name in theirs), None)
        if base is None or base.size == attention.size or attention.is_unit:
            continue
        missing = base.factor * scores_multiplier(attention.size, base.size) / attention.factor
        if math.isnan(missing):
            unseen += attention.query
        if math.isnan(missing) or abs(missing - 1) < 1e-6:
            continue
        if not attention.is_own or any(len(found.uses.get(name, ())) != 1 for name in attention.query):
            unmet.append((attention, base, missing))
            continue
        for name in attention.query:
            if name not in folded:
                reason = f"{changed[name].reason}; makes queries, heads of {attention.size} in place of {base.size}"
                changed[name] = replace(changed[name], folded=changed[name].folded * missing, reason=reason)
        folded |= set(attention.query)
    if unseen:
        warn_unseen(unseen)
    if unmet:
        _warn(unmet)
    return list(changed.values())


def _warn(unmet: Sequence[tuple[Attention, Attention, float]]) -> None:
    attention, base, missing = unmet[0]
    names = list(dict.fromkeys((*attention.query, *attention.key)))
    where = ", ".join(names[:2]) or "an attention without weights of its own"
    wanted = base.factor * scores_multiplier(attention.size, base.size)
    kept = wanted * attention.size  # what stands over the head size
    warnings.warn(
        f"{len(unmet)} attentions have heads of another size than the base ({where}: {attention.size}, base "
        f"{base.size}), and width asks for scores of 1 / head size: {missing:.4g} of it is missing, and no parameter "
        f"makes queries alone that could carry it. Multiply scores by {wanted:.4g} (scale={kept:.4g} / "
        "head_dim, which is the base's own at its head size), or keep the head size and give the model more heads",
        UserWarning,
        stacklevel=5,
    )
