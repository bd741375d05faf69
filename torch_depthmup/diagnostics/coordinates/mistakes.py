"""What a failed coordinate check probably means: mistakes that people make, each known by the slopes that it leaves.

Knows the rules and how they are carried out wrongly; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch_depthmup.diagnostics.coordinates.slopes import Slope
from torch_depthmup.rules import Family, Rule, get_family

__all__ = ["named"]

NEAR = 0.2  # how far from a mistake's deviations the measured ones may be


def named(slopes: Sequence[Slope], rule: Rule, family: Family, gradient: float) -> list[str]:
    """The probable cause first, then each broken slope in words; nothing where no slope is broken.

    Args:
        slopes: of one check.
        rule: what they were held against.
        family: of the optimizer.
        gradient: the slope in depth of the residual stream's gradient at initialization, nan where it is not known.
    """
    broken = [slope for slope in slopes if slope.verdict == "broken"]
    kinds = dict.fromkeys(slope.kind for slope in broken if slope.kind) or {"": None}
    heads = []
    for kind in kinds:
        mine = [slope for slope in slopes if slope.kind in ("", kind)]
        heads += [f"{head}{f', in {kind}' if kind else ''}" for head in _causes(mine, rule, family, gradient)]
    return heads + [_in_words(slope) for slope in broken]


def _causes(slopes: Sequence[Slope], rule: Rule, family: Family, gradient: float) -> list[str]:
    """The probable cause of what is broken in one kind of branches."""
    off = {s.quantity: s.measured - s.predicted for s in slopes if s.axis == "depth"}
    broken = [slope for slope in slopes if slope.verdict == "broken"]
    in_depth = {slope.quantity for slope in broken if slope.axis == "depth"}
    causes: list[str] = []
    if "branch" in in_depth:
        # Everything else hangs on the multiplier; learning rates cannot be judged beside a wrong one.
        causes = _of_the_multiplier(off["branch"], rule)
    elif in_depth & {"inner", "outer"}:
        causes = _of_learning_rates(off, rule, family)
    head = [f"probably {', or '.join(causes)}"] if causes else []
    sides = [off[name] for name in ("inner", "outer") if name in off]
    if not causes and not family.normalised and abs(gradient) > NEAR and all(s * gradient > 0 for s in sides):
        head = [
            f"probably the network, not the rule: at initialization the gradient in the residual stream goes as "
            f"depth^{gradient:+.2f}, and the rule takes it to be constant"
        ]
    return head


def _of_the_multiplier(off: float, rule: Rule) -> list[str]:
    twice = "applied twice (by an initialization that shrinks with depth, perhaps, as GPT-2's)"
    known = (("forgotten", rule.alpha), (twice, -rule.alpha))
    return [f"the branch multiplier is {text}" for text, d in known if d and abs(off - d) <= NEAR]


def _of_learning_rates(off: dict[str, float], rule: Rule, family: Family) -> list[str]:
    """The mistakes of the catalogue that come nearest to how far the inner and outer updates are off."""
    distances = [
        (max(abs(off[side] - d) for side, d in zip(("inner", "outer"), deviation, strict=True) if side in off), text)
        for text, deviation in _catalogue(rule, family)
        if any(deviation)
    ]
    nearest = min((distance for distance, _ in distances), default=math.inf)
    return list(dict.fromkeys(text for distance, text in distances if distance <= min(NEAR, nearest + 0.05)))


def _in_words(slope: Slope) -> str:
    off = slope.measured - slope.predicted
    return (
        f"the {slope.words} goes as {slope.axis}^{slope.measured:+.2f} where the rule says "
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
