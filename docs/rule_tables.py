"""Tables of docs/reference/rules.md, read off `torch_depthmup.rules`: exponents of what each rule multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch_depthmup.errors import OptimizerError
from torch_depthmup.rules import (
    FAMILIES,
    RULES,
    Family,
    Role,
    Width,
    depth_multipliers,
    fold_multipliers,
    readout_multiplier,
    scores_multiplier,
    width_multipliers,
)


def rules() -> str:
    """A row for each rule: the exponents of r, the depth over that of the base."""
    rows = []
    for name, rule in RULES.items():
        numbers = [-rule.alpha, rule.sgd, rule.sgd + rule.correction, rule.adam, rule.adam + rule.correction]
        rows.append([f'`"{name}"`', *map(_power, numbers), "yes" if rule.width else "no"])
    header = ["`rule=`", "branch", "SGD outer", "SGD inner", "Adam-like outer", "Adam-like inner", "mup's width"]
    return table(header, rows)


def _power(exponent: float, base: str = "r") -> str:
    return "1" if exponent == 0 else base if exponent == 1 else f"{base}^{exponent:g}"


def alphas() -> str:
    """The exponents that each rule is made of."""
    rows = [[f'`"{name}"`', *map(_number, (r.alpha, r.correction, r.eps_width))] for name, r in RULES.items()]
    return table(["`rule=`", "`alpha`", "`correction`", "`eps_width`"], rows)


def _number(value: float) -> str:
    return f"{value + 0.0:g}"


ROLES: tuple[Role, ...] = ("inner", "outer", "trunk", "outside")
RATIO = 2.0  # at which a multiplier is taken, to read its exponent off


def in_depth(quantity: str) -> str:
    """Factors on a learning rate, decay or eps in depth: a row for families and role, a column for each rule."""

    def of(family: Family, role: Role) -> list[str]:
        found = [getattr(depth_multipliers(rule, family, role, RATIO), quantity) for rule in RULES.values()]
        return [_power(math.log2(value)) for value in found]

    return table(["optimizer", "parameters", *map("`{}`".format, RULES)], _of_families(of, ROLES))


def in_width() -> str:
    """Factors on learning rate and decay in width: a row for families and kind of parameter."""

    def of(family: Family, kind: str) -> list[str]:
        width = KINDS[kind]
        if family.width == "muon" and len(width.dims) == 1:  # it takes matrices alone
            return ["–", "–"]
        try:
            found = {width_multipliers(rule, family, width) for rule in RULES.values() if rule.width}
        except OptimizerError:
            return ["refused", "refused"]
        lr, decay = {(each.lr, each.weight_decay) for each in found}.pop()  # one for all rules
        return [_power(math.log2(value), "w") for value in (lr, decay)]

    return table(["optimizer", "parameters", "learning rate", "decay"], _of_families(of, list(KINDS)))


KINDS = {
    "hidden matrices": Width((8, 8), (4, 4), 1),
    "embeddings": Width((3, 8), (None, 4), None),
    "biases, gains": Width((8,), (4,), None),
    "readouts": Width((3, 8), (None, 4), 1),
}
"""Of each kind one that is twice as wide as its base."""


def _of_families(of: Callable[[Family, Any], list[str]], kinds: Any) -> list[list[str]]:
    """Rows of kinds of parameters, families that have the same for all of them together."""
    alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for name, family in FAMILIES.items():
        alike.setdefault(tuple(tuple(of(family, kind)) for kind in kinds), []).append(name)
    return [
        [", ".join(names), kind, *cells]
        for rows, names in alike.items()
        for kind, cells in zip(kinds, rows, strict=True)
    ]


def starts() -> str:
    """The factors on what a base would have that are there at initialization, in depth and in width."""
    m = [_power(-rule.alpha) for rule in RULES.values()]
    rows = [["value of a branch, in depth", *m]]
    sizes = {
        "standard deviation of hidden matrices": KINDS["hidden matrices"].size_exponent,
        "standard deviation of all others": KINDS["readouts"].size_exponent,
        "product of a readout": math.log2(readout_multiplier(RATIO)),
        "scores of larger heads, beside the base's factor": math.log2(scores_multiplier(2, 1)),
    }
    for name, exponent in sizes.items():
        rows.append([name, *(_power(exponent if rule.width else 0.0, "w") for rule in RULES.values())])
    return table(["what", *map("`{}`".format, RULES)], rows)


def folds() -> str:
    """What a multiplier m that is folded into a weight asks of the optimizer."""
    rows = []
    for name, family in FAMILIES.items():
        try:
            found = fold_multipliers(family, RATIO)
        except OptimizerError:
            rows.append([name, *["refused: wrap"] * 3])
            continue
        rows.append([name, *(_power(math.log2(v), "m") for v in (found.lr, found.weight_decay, found.eps))])
    return table(["optimizer", "learning rate", "decay", "eps"], rows)


def table(header: Any, rows: Any) -> str:
    """A table in Markdown."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
