"""The scaling rules as data: exponents in, multipliers out. The only place where a rule's numbers live.

A rule knows nothing of models, modules or tensors. It is asked for numbers with plain ones: a depth ratio
``r_L = depth / base_depth``, a parameter's role in its branch, an optimizer family and, for width, the
dimensions of a parameter beside those of its base.

Sources: arXiv 2310.02244 (depth-muP), arXiv 2512.21075 (the depth-aware correction of the inner learning
rate), arXiv 2505.01618 (CompleteP), arXiv 2203.03466 and the package ``mup`` (width), arXiv 2512.22382 (batch size and
length of training).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch_depthmup.errors import OptimizerError, PlanError

__all__ = [
    "FAMILIES",
    "MUON_SHAPES",
    "RULES",
    "UNIT",
    "Family",
    "Horizon",
    "Multipliers",
    "Role",
    "Rule",
    "Width",
    "depth_multipliers",
    "fold_multipliers",
    "get_family",
    "get_rule",
    "predicted_slopes",
    "readout_multiplier",
    "scores_multiplier",
    "width_multipliers",
]

Role = Literal["outside", "inner", "outer", "trunk"]
"""Where a parameter stands: outside every branch, before the branch's outer weight operation, from it on, or on the
trunk between two residual additions, as the norms of a post-norm network do, and what scales a skip."""

TRUNK = -1.0
"""Exponent of the lr multiplier of trunk parameters in the depth ratio, for every family and every rule that scales
depth. There are L of them, none behind a branch multiplier. With g the gradient of one of them, O(1) in L, a step moves
the function by lr * |g|**2 (SGD) or lr * |g|_1 (Adam), always downhill, so the L of them add up to O(L * lr)."""


@dataclass(frozen=True)
class Rule:
    """How branch multiplier and learning rates scale with the depth ratio ``r = depth / base_depth``.

    The branch multiplier is ``m = r ** -alpha``. The learning rate of a parameter in a branch is multiplied by
    ``r ** sgd`` (SGD) or ``r ** adam`` (optimizers that normalise the gradient's scale), and by a further
    ``r ** correction`` where it stands before the branch's outer weight operation.

    Args:
        name: what the plan calls the rule.
        alpha: exponent of the branch multiplier, finite and not negative.
        correction: extra learning-rate exponent of the inner parameters; 1/2 restores what depth-muP lets vanish.
        sgd: learning-rate exponent of SGD; ``None`` takes ``2 * alpha - 1``, which keeps the function's update O(1).
        adam: learning-rate exponent of Adam-like optimizers; ``None`` takes ``alpha - 1``, likewise.
        width: whether ``mup``'s width multipliers apply too.
        eps_width: exponent of Adam's eps in the width multiplier, for all parameters: the gradient falls as 1 / width.
            ``mup`` leaves eps alone (0), CompleteP does not (-1).

    >>> Rule("mine", alpha=0.75).branch_multiplier(16)
    0.125

    Raises:
        PlanError: an exponent is not a finite number, ``alpha`` is negative, or the name is empty.

    Source: arXiv 2310.02244, section 4; arXiv 2512.21075, depth-aware learning rate; arXiv 2505.01618, table 1.
    """

    name: str
    alpha: float = 0.5
    correction: float = 0.0
    sgd: float | None = None
    adam: float | None = None
    width: bool = True
    eps_width: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PlanError(f"a Rule needs a name, a non-empty string, not {self.name!r}")
        for label in ("alpha", "correction", "sgd", "adam", "eps_width"):
            value = getattr(self, label)
            if value is None and label in ("sgd", "adam"):
                value = 2 * self.alpha - 1 if label == "sgd" else self.alpha - 1
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise PlanError(f"Rule({self.name!r}): {label} must be a finite number, not {value!r}")
            object.__setattr__(self, label, float(value))
        if self.alpha < 0:
            raise PlanError(
                f"Rule({self.name!r}): alpha must not be negative (branches would grow with depth): {self.alpha}"
            )

    @property
    def label(self) -> str:
        """The name, and all digits of the exponents where it is not known: ``mine (alpha 0.75, correction 0.25)``."""
        if RULES.get(self.name) == self:
            return self.name
        plain = Rule(self.name, self.alpha)
        told = [f"alpha {self.alpha!r}"]
        for field in ("correction", "sgd", "adam", "eps_width"):
            if getattr(self, field) != getattr(plain, field):
                told.append(f"{field} {getattr(self, field)!r}")
        return f"{self.name} ({', '.join(told)}{'' if self.width else ', no width'})"

    @property
    def scales_depth(self) -> bool:
        """Whether any multiplier of the rule depends on depth."""
        return any((self.alpha, self.correction, self.sgd, self.adam))

    def lr_exponent(self, family: Family, role: Role) -> float:
        """The exponent of a learning rate in the depth ratio."""
        if role == "outside":
            return 0.0
        if role == "trunk":
            return TRUNK if self.scales_depth else 0.0
        assert self.sgd is not None and self.adam is not None
        return (self.adam if family.normalised else self.sgd) + (self.correction if role == "inner" else 0.0)

    def branch_multiplier(self, depth_ratio: float) -> float:
        """``m = r ** -alpha``, the factor on a branch's value at depth ratio ``r``."""
        return _power(depth_ratio, -self.alpha)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("sp", alpha=0.0, sgd=0.0, adam=0.0, width=False),
        Rule("mup", alpha=0.0, sgd=0.0, adam=0.0),
        Rule("depth-mup", alpha=0.5),
        Rule("depth-mup-corrected", alpha=0.5, correction=0.5),
        Rule("complete-p", alpha=1.0, eps_width=-1.0),
    )
}
"""The rules that are known by name."""

SPELLINGS = {"completep": "complete-p"}
"""Other ways to write a rule's name, as in its paper."""


def get_rule(rule: str | Rule) -> Rule:
    """The rule of that name, or the rule itself.

    Raises:
        PlanError: no rule has that name.
    """
    if isinstance(rule, Rule):
        return rule
    name = SPELLINGS.get(str(rule), str(rule))
    if name not in RULES:
        near = difflib.get_close_matches(str(rule), [*RULES, *SPELLINGS], 1)
        meant = f"Did you mean {near[0]!r}? " if near else ""
        raise PlanError(
            f"no rule is called {rule!r}. {meant}Write one of {', '.join(map(repr, RULES))}, or a dm.Rule(...)"
        )
    return RULES[name]


@dataclass(frozen=True)
class Family:
    """What the rules need to know of an optimizer: how its update depends on the gradient's and the weight's scale.

    Args:
        name: what plans and messages call the family.
        normalised: whether the update is divided by the gradient's scale (Adam-like), or not (SGD-like).
        decoupled: whether weight decay bypasses the gradient (AdamW), or is an L2 penalty in it.
        foldable: whether a multiplier folded into a weight can be made up for exactly in its options.
        width: which width rule holds: that of MuSGD, of MuAdam, the spectral one of Muon, or none.
    """

    name: str
    normalised: bool
    decoupled: bool
    foldable: bool = True
    width: Literal["sgd", "adam", "muon"] | None = "adam"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sgd", normalised=False, decoupled=False, width="sgd"),
        Family("adam", normalised=True, decoupled=False),
        Family("adamw", normalised=True, decoupled=True),
        Family("muon", normalised=True, decoupled=True, width="muon"),
        # Adafactor's step is relative to the weight's own size down to a floor, and `mup` has no rule for it.
        Family("adafactor", normalised=True, decoupled=True, foldable=False, width=None),
    )
}
"""The optimizer families by name. ``adam`` has an L2 penalty, ``adamw`` decoupled decay."""


def get_family(family: str | Family) -> Family:
    """The family of that name, or the family itself.

    Raises:
        OptimizerError: no family has that name.
    """
    if isinstance(family, Family):
        return family
    if family not in FAMILIES:
        raise OptimizerError(f"no optimizer family is called {family!r}. Write one of {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[family]


@dataclass(frozen=True)
class Multipliers:
    """Factors on the learning rate, weight decay and eps that the user wrote. They compose by ``*``."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0

    def __mul__(self, other: Multipliers) -> Multipliers:
        return Multipliers(self.lr * other.lr, self.weight_decay * other.weight_decay, self.eps * other.eps)


UNIT = Multipliers()
"""The multipliers that change nothing."""


@dataclass(frozen=True)
class Horizon:
    """Batch size and length of training, in units of those that the learning rate was tuned with; for AdamW.

    The rule keeps the stochastic differential equation that AdamW follows, and its horizon. With ``batch / duration``
    times as few steps, each is the square root of that larger and forgets so much more of the moments; eps shrinks as
    the gradient's noise does, and decay takes as much off the weights over the whole run.

    Args:
        batch: batch size, divided by that of the tuned run.
        duration: number of samples (or tokens) seen in the whole run, divided by that of the tuned run.

    Source: arXiv 2205.10287, definition 5.1 (batch size); arXiv 2512.22382, table 1 (both).
    """

    batch: float = 1.0
    duration: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("batch_multiplier", self.batch), ("duration_multiplier", self.duration)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise OptimizerError(f"{name} is a positive number, such as 4 for four times as much; it is {value!r}")

    @property
    def ratio(self) -> float:
        """How many times fewer steps there are."""
        return self.batch / self.duration

    def multipliers(self) -> Multipliers:
        """Factors on learning rate, decay and eps."""
        return Multipliers(lr=self.ratio**0.5, weight_decay=self.ratio**0.5, eps=self.ratio**-0.5)

    def betas(self, betas: tuple[Any, ...]) -> tuple[Any, ...]:
        """Decay rates of the moments that forget as much per sample, and per run, as ``betas`` did.

        Raises:
            OptimizerError: a step would have to forget more than all.
        """
        if self.ratio == 1:
            return betas
        found = tuple(1 - self.ratio * (1 - beta) for beta in betas)
        if min(found) < 0:
            raise OptimizerError(
                f"with batch_multiplier / duration_multiplier = {self.ratio:.4g} a step would have to forget more than "
                f"all of the moments: betas={betas} allow at most {1 / (1 - min(betas)):.4g}. Take a smaller batch, or "
                "larger betas"
            )
        return found


def depth_multipliers(rule: Rule, family: Family, role: Role, depth_ratio: float) -> Multipliers:
    """Multipliers in depth of a parameter, with an explicit branch multiplier in the forward pass.

    Decoupled decay and the L2 penalty of SGD keep ``lr * weight_decay`` fixed. What enters a normalised update
    together with the gradient - Adam's eps, and an L2 penalty under Adam - follows the gradient's scale, which in a
    branch is that of the branch multiplier.

    Args:
        rule: the exponents.
        family: the optimizer's family.
        role: where the parameter stands.
        depth_ratio: ``depth / base_depth`` of the parameter's stream.

    Source: arXiv 2310.02244, section 4; arXiv 2512.21075 (``correction``); arXiv 2505.01618 (eps).
    """
    if role == "outside" or not rule.scales_depth:
        return UNIT
    exponent = rule.lr_exponent(family, role)
    gradient = 1.0 if role == "trunk" else _power(depth_ratio, -rule.alpha)
    penalised = family.normalised and not family.decoupled
    return Multipliers(
        lr=_power(depth_ratio, exponent),
        weight_decay=gradient if penalised else _power(depth_ratio, -exponent),
        eps=gradient if family.normalised else 1.0,
    )


def fold_multipliers(family: Family, multiplier: float) -> Multipliers:
    """Multipliers that make training a weight scaled by ``multiplier`` equal to training with it in the forward pass.

    With ``W' = m W`` the gradient is ``g / m``. SGD needs ``lr * m**2``, an update that does not see the gradient's
    scale needs ``lr * m``; an L2 penalty needs ``weight_decay / m**2``, decoupled decay keeps ``lr * weight_decay``;
    eps follows the gradient.

    Raises:
        OptimizerError: the family cannot make up for a folded multiplier.

    Source: the reparametrization ``W' = m W`` (abc-symmetry), arXiv 2011.14522, section 3.
    """
    if multiplier == 1.0:
        return UNIT
    if not family.foldable:
        raise OptimizerError(
            f"{family.name}: its step depends on the weight's own size, so a multiplier folded into a weight cannot be "
            "made up for. Write dm.parametrize(..., how='wrap')"
        )
    if not family.normalised:
        return Multipliers(lr=multiplier**2, weight_decay=multiplier**-2)
    return Multipliers(
        lr=multiplier, weight_decay=1 / multiplier if family.decoupled else multiplier**-2, eps=1 / multiplier
    )


@dataclass(frozen=True)
class Width:
    """A parameter's dimensions beside those of its base, as in ``mup``'s ``InfShape``.

    Args:
        dims: the parameter's shape.
        base: for each dimension its size in the base model where it is a width, or ``None`` where it is not.
        summed: index of the width that the parameter's operation sums over (the fan-in of a hidden or readout weight);
            ``None`` where it sums over none, as an embedding, a bias or a gain.
        normalised: whether a norm follows the operation, so that the size of the weight does not matter.
        unnormalised: of a weight that makes several values, the rows (of the dimension that is no width) whose values
            no norm follows, as (start, end), where one follows the others.
    """

    dims: tuple[int, ...]
    base: tuple[int | None, ...]
    summed: int | None = None
    normalised: bool = False
    unnormalised: tuple[tuple[int, int], ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The indices of the dimensions that are widths."""
        return tuple(index for index, base in enumerate(self.base) if base is not None)

    @property
    def kind(self) -> Literal["fixed", "vector", "readout", "hidden"]:
        """What ``mup`` calls it: no width, one width that is kept, one that is summed over, or both.

        A readout that a norm follows counts as hidden: the norm sets the size of what it reads out.
        """
        if not self.widths:
            return "fixed"
        if self.summed is None:
            return "vector"
        return "hidden" if len(self.widths) > 1 or self.normalised else "readout"

    @property
    def multiplier(self) -> float:
        """``mup``'s ``width_mult``: the ratio of the width that is summed over, or of the last, to its base."""
        if not self.widths:
            return 1.0
        return self.ratio(self.widths[-1] if self.summed is None else self.summed)

    def ratio(self, index: int) -> float:
        """Ratio of one dimension to its base; 1 where it is not a width."""
        base = self.base[index]
        return 1.0 if base is None else self.dims[index] / base

    @property
    def size_exponent(self) -> float:
        """How the size of a value at initialization goes with the width multiplier.

        Hidden weights start as 1 / sqrt(width); embeddings, biases, gains and readouts do not change with width.

        Source: arXiv 2203.03466, table 8.
        """
        return -0.5 if self.kind == "hidden" else 0.0

    @property
    def unnormalised_factor(self) -> float:
        """How much smaller the rows start that no norm follows: they are a readout's, the others a hidden weight's.

        The rates of both are the same, lr / width_mult for SGD and Adam, once a readout's multiplier is folded into
        it. So they may stand in one weight.

        Source: arXiv 2203.03466, table 8.
        """
        return readout_multiplier(self.multiplier) / self.multiplier**self.size_exponent if self.unnormalised else 1.0


def width_multipliers(rule: Rule, family: Family, width: Width | None, *, adjust_lr: str | None = None) -> Multipliers:
    """Multipliers in width: those of ``mup``'s MuSGD, MuAdam and MuAdamW; for Muon the spectral condition.

    Muon's update has spectral norm ``lr`` times a factor of its own for the shape; what is missing to
    ``sqrt(fan_out / fan_in)``, relative to the base, is the multiplier.

    Args:
        rule: whether width is scaled at all.
        family: the optimizer's family.
        width: the parameter's dimensions, ``None`` without width scaling.
        adjust_lr: how Muon's step follows the shape, a key of ``MUON_SHAPES``; ``None`` is ``"original"``, as in torch.

    Raises:
        OptimizerError: more than two dimensions are widths, or the family has no width rule.

    Source: arXiv 2203.03466, table 8, as in mup 1.0.0; arXiv 2505.01618, table 1 (eps); arXiv 2310.17813, condition 1
    (Muon).
    """
    if not rule.width or width is None or not width.widths:
        return UNIT
    if len(width.widths) > 2:
        raise OptimizerError(f"a parameter of shape {width.dims} has {len(width.widths)} widths; mup knows at most two")
    if family.width is None:
        if all(width.ratio(index) == 1.0 for index in width.widths):
            return UNIT
        shape = " for steps that follow a matrix's shape in a way that is not known" if family.name == "muon" else ""
        raise OptimizerError(
            f"{family.name} has no width rule{shape}. Keep the base as wide as the model, or write rule='sp'"
        )
    if family.width == "muon" and len(width.dims) != 2:
        raise OptimizerError(f"Muon takes matrices, and a parameter of shape {width.dims} is none")
    hidden = width.kind == "hidden"
    if family.width == "sgd":
        # A hidden weight: width_mult of the fan-out over that of the fan-in; any other: width_mult.
        kept = math.prod(width.ratio(index) for index in width.widths if index != width.summed)
        lr = kept / width.multiplier if hidden else width.multiplier
    elif family.width == "adam":
        lr = 1 / width.multiplier if hidden else 1.0
    else:
        lr = _muon_width(width, adjust_lr)
    eps = _power(width.multiplier, rule.eps_width) if family.normalised else 1.0
    return Multipliers(lr=lr, weight_decay=1 / lr, eps=eps)


def readout_multiplier(width_multiplier: float, power: float = 1.0) -> float:
    """What multiplies the product of a weight that reads out of a width; ``power`` of it is not there already.

    Source: arXiv 2203.03466, table 8.
    """
    return width_multiplier**-power


def scores_multiplier(head_size: int, base_head_size: int) -> float:
    """What attention scores are multiplied by, beside the base's factor, where heads are larger than the base's.

    Source: arXiv 2203.03466, definition 4.1 (1/d attention).
    """
    return base_head_size / head_size


MUON_SHAPES: dict[str, Callable[[float, float], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: math.sqrt(max(rows, columns)),
    "rms_to_rms": lambda rows, columns: math.sqrt(rows / columns),
    "none": lambda rows, columns: 1.0,
}
"""How the spectral norm of a step of Muon goes with the shape, by the names that torch and timm have for it."""


def _muon_width(width: Width, adjust_lr: str | None) -> float:
    """What is missing from Muon's own factor for the shape to ``sqrt(fan_out / fan_in)``, relative to the base.

    A readout's product is multiplied by ``1 / width_mult``, which its step makes up for.
    """
    # The dimension that is the fan-out: what is not summed over.
    kept = width.widths[0] if width.summed is None else 1 - width.summed
    given = MUON_SHAPES[adjust_lr or "original"]

    def wanted(dims: tuple[int, ...]) -> float:
        return math.sqrt(dims[kept] / dims[1 - kept])

    base = tuple(dim if base is None else base for dim, base in zip(width.dims, width.base, strict=True))
    forward = width.multiplier if width.kind == "readout" else 1.0
    return forward * (wanted(width.dims) / wanted(base)) / (given(*width.dims) / given(*base))


def predicted_slopes(rule: Rule, family: Family, *, inner_layers: bool = True) -> dict[str, float]:
    """Exponents in depth that the rule gives in the first steps at a small learning rate.

    Args:
        rule: a rule.
        family: of the optimizer.
        inner_layers: whether branches have inner layers; without, the correction has nothing to act on.

    Returns:
        ``inner`` and ``outer``: a layer's own update ``dW h`` in a branch, relative to its base; ``stream`` and
        ``function``: the update of the residual stream and of the function, the larger of what the two sides
        contribute coherently over ``L`` layers. Under the correction the last two are the slope at large depth, to
        which measured slopes rise from below.

    Source: the scaling argument of arXiv 2310.02244, section 3, applied to each side of the branch.
    """
    # A layer's own update dW h: SGD's gradient carries the branch multiplier, a normalised one does not.
    carried = 0.0 if family.normalised else -rule.alpha
    outer = rule.lr_exponent(family, "outer") + carried
    own = {"inner": rule.lr_exponent(family, "inner") + carried, "outer": outer} if inner_layers else {"outer": outer}
    total = 1 - rule.alpha + max(own.values())  # L branches, each times m
    return {**own, "stream": total, "function": total}


def _power(ratio: float, exponent: float) -> float:
    """``ratio ** exponent``, exactly 1 for a ratio or an exponent that says so."""
    if not ratio > 0:
        raise PlanError(f"a depth ratio must be positive, not {ratio}")
    return 1.0 if ratio == 1 or exponent == 0 else float(ratio) ** exponent
