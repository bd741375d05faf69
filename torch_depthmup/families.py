"""Optimizer families, measured: how do the steps of a class answer to the gradient's scale, the weight's and the decay?

A class is run, with the options that the user wrote, on a toy of two small tensors in float64. Knows rules and no plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_depthmup.errors import OptimizerError
from torch_depthmup.rules import FAMILIES, MUON_SHAPES, Family, fold_multipliers, get_family

__all__ = ["Answers", "MeasuredFamily", "measure_family", "refuse_unsuited"]

Make = Callable[[list[dict[str, Any]]], Optimizer]
"""Makes an optimizer from groups."""

UNSUITED = {
    "LBFGS": "its step does not scale with the learning rate of a group",
    "Rprop": "its step sizes are its own after the first step, whatever the learning rate",
    "ASGD": "its decay term lambd also sets its learning-rate schedule, so the two cannot be scaled apart",
}
"""Classes that a few steps do not tell apart from suitable ones, and why they are not."""

STEPS = 10  # RAdam changes its rule at the sixth
EXPONENT = 0.05  # how far a measured exponent may be from a whole number
EQUAL = 1e-3  # relative difference below which two runs are the same: some classes compute in bfloat16
SCALE = 4.0  # powers of two, so that scaling adds no rounding
FOLDED = 0.25
TOY = {"lr": 0.01, "weight_decay": 0.1, "eps": 0.05}  # eps of the gradient's size, so that it is seen to act
TINY = 1e-30
SHAPES = ((12, 4), (4, 12), (4, 6))  # the known ways to follow the shape differ on these by 0.34 or more
NEAR = 0.15  # largest difference of log step sizes: Newton-Schulz leaves singular values scattered


@dataclass(frozen=True)
class Answers:
    """What the toy runs gave.

    Args:
        gradient: exponent of the last step in the gradient's scale: 1 for SGD, 0 for Adam.
        early: that of the first step that moves.
        lr: exponent of the step in the learning rate.
        weight: relative change of the step where the weights are four times as large.
        fold: relative difference between training with a folded multiplier and with an explicit one.
        fold_without_eps: the same with an eps that is too small to act.
        orthogonal: whether the steps of a matrix have equal singular values, as Muon's.
    """

    gradient: float
    early: float
    lr: float
    weight: float
    fold: float
    fold_without_eps: float
    orthogonal: bool

    def __str__(self) -> str:
        return (
            f"step ~ gradient^{self.gradient:.2f}, ~ lr^{self.lr:.2f}, changes by {self.weight:.2g} where the weights "
            f"are {SCALE:g} times as large; fold and wrap differ by {self.fold:.2g}"
        )


@dataclass(frozen=True)
class MeasuredFamily:
    """A family, the measurements it rests on, and how Muon's step follows the shape."""

    family: Family
    answers: Answers | None = None
    adjust_lr: str | None = None


def refuse_unsuited(cls: type) -> None:
    """Raises OptimizerError for classes that are known to fit no family, and for what is no class."""
    if not isinstance(cls, type):
        raise OptimizerError(
            f"an optimizer class is wanted, such as torch.optim.NAdam, and this is a {type(cls).__name__}. Options are "
            "given to what dm.optimizer(cls) returns, and dm.rescale(optimizer, model) scales an optimizer that exists"
        )
    for name in (c.__name__ for c in cls.__mro__ if c.__module__.startswith("torch.optim")):
        if name in UNSUITED:
            raise OptimizerError(f"{name} cannot be scaled: {UNSUITED[name]}. Use dm.AdamW, dm.Adam or dm.SGD")


def measure_family(
    make: Make, group: dict[str, Any], *, label: str, named: Family | None = None, matrices: bool = False
) -> MeasuredFamily:
    """The family of an optimizer class under given options.

    Args:
        make: makes the optimizer from groups, with all other arguments filled in.
        group: the options of one group, without parameters.
        label: what messages call the class.
        named: a family that the user wrote; the measurement has to agree.
        matrices: whether the group holds nothing but matrices.

    Raises:
        OptimizerError: the steps follow no family, or not the named one, or the class does not run on the toy.
    """
    toy = _Toy(make, group, matrices)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            toy.probe()
            answers, decoupled, adjust = toy.measure()
    except OptimizerError as error:
        raise OptimizerError(f"{label}: {error}. Use dm.AdamW, dm.Adam or dm.SGD") from None
    except Exception as error:  # any class, with any demands of its own
        if named is not None:
            return MeasuredFamily(_without_shapes(named))
        if not matrices:  # classes for matrices alone do not take the vector
            with suppress(OptimizerError):
                return measure_family(make, group, label=label, matrices=True)
        raise OptimizerError(
            f"{label} does not run on a toy of two tensors ({type(error).__name__}: {error}), so how its steps answer "
            f"to the gradient is not known. If you know, write family= with one of {', '.join(map(repr, FAMILIES))}. "
            "What trains by two rules in one group cannot be scaled: make two, dm.Muon and dm.AdamW"
        ) from error
    return _judge(answers, decoupled, adjust, label, named)


def _judge(
    answers: Answers, decoupled: bool | None, adjust: str | None, label: str, named: Family | None
) -> MeasuredFamily:
    if abs(answers.lr - 1) > EXPONENT:
        raise OptimizerError(
            f"{label}: its steps grow as lr^{answers.lr:.2f} and not in proportion to the learning rate, so a "
            "multiplier on the learning rate is none on the step. Use dm.AdamW, dm.Adam or dm.SGD"
        )
    if answers.early != answers.gradient and abs(answers.early - answers.gradient) > 0.5:
        raise OptimizerError(
            f"{label}: its first step grows as gradient^{answers.early:.2f} and its tenth as "
            f"gradient^{answers.gradient:.2f}, so no one rule holds for both. Use dm.AdamW, dm.Adam or dm.SGD"
        )
    whole = round(answers.gradient)
    furthest = max(answers.early, answers.gradient, key=lambda exponent: abs(exponent - whole))
    if whole not in (0, 1) or (named is None and not abs(furthest - whole) <= EXPONENT):
        raise OptimizerError(
            f"{label}: its steps grow as gradient^{furthest:.2f}; the rules know steps in proportion to the "
            "gradient (SGD) and steps that do not follow its scale (Adam). Use dm.AdamW, dm.Adam or dm.SGD. If it is "
            "one of the two after more steps, name it, family='sgd' or 'adamw'"
        )
    normalised = whole == 0
    if named is not None:
        _agree(named, normalised, decoupled, answers, label)
        family = replace(named, foldable=named.foldable and answers.fold <= EQUAL)
    elif answers.orthogonal:
        family = replace(get_family("muon"), foldable=answers.fold <= EQUAL)
    else:
        family = get_family("sgd" if not normalised else "adam" if decoupled is False else "adamw")
        if answers.weight > EQUAL or answers.fold_without_eps > EQUAL:
            # mup has no rule for steps that follow the weight's size.
            family = Family(label, normalised, family.decoupled, foldable=False, width=None)
        elif answers.fold > EQUAL:
            family = replace(family, foldable=False)
    return MeasuredFamily(family if adjust else _without_shapes(family), answers, adjust)


def _without_shapes(family: Family) -> Family:
    """The family where it is not known how steps follow a matrix's shape, which Muon's width rule has to know."""
    return replace(family, width=None) if family.width == "muon" else family


def _agree(named: Family, normalised: bool, decoupled: bool | None, answers: Answers, label: str) -> None:
    if named.normalised != normalised:
        raise OptimizerError(
            f"{label} is not of the family {named.name!r}: {answers}. Leave family= out, and it is measured"
        )
    if (named.name == "muon") != answers.orthogonal:
        found = "are orthogonal, as Muon's" if answers.orthogonal else "are not orthogonal"
        raise OptimizerError(
            f"{label} is not of the family {named.name!r}: its steps on matrices {found}. Leave family= out, and each "
            "group is measured"
        )
    if normalised and decoupled is not None and named.decoupled != decoupled:
        found = "decoupled from the gradient" if decoupled else "a penalty in the gradient"
        raise OptimizerError(
            f"{label} is not of the family {named.name!r}: its weight decay, as configured, is {found}. Write "
            f"family={'adamw' if decoupled else 'adam'!r}, or leave it out, and it is measured"
        )


class _Toy:
    """Two tensors, fixed gradients or a small regression, and runs of one optimizer class over them."""

    def __init__(self, make: Make, group: dict[str, Any], matrices: bool):
        self.make, self.group = make, group
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.start = [draw(6, 4), draw(6, 3) if matrices else draw(6)]
        self.gradients = [[draw(*value.shape) for value in self.start] for _ in range(STEPS)]
        self.data = [(draw(8, 4), draw(8, 3) if matrices else draw(8)) for _ in range(STEPS)]
        self.keys: dict[str, bool] = {}  # which of the TOY options the class has, and whether as a tensor

    def probe(self) -> None:
        """Which of lr, weight decay and eps the class has as plain numbers."""
        made = self.make([{**self.group, "params": [value.clone().requires_grad_() for value in self.start]}])
        filled = made.param_groups[0]
        numbers = {key: filled.get(key) for key in TOY if isinstance(filled.get(key), int | float | Tensor)}
        self.keys = {key: isinstance(value, Tensor) for key, value in numbers.items()}
        if "lr" not in self.keys:
            raise OptimizerError(f"it has no learning rate that could be scaled (lr={filled.get('lr')!r})")

    def run(
        self, start: Sequence[Tensor], loss: Callable[[list[Tensor], int], Tensor], *options: dict[str, float]
    ) -> list[list[Tensor]]:
        """Where the tensors are after each step; one dictionary of options for both tensors, or one for each."""
        torch.manual_seed(0)  # the same draws in every run, for classes that draw
        params = [value.clone().requires_grad_() for value in start]
        each = options if len(options) == len(params) else options * len(params)
        optimizer = self.make(
            [{**self.group, **self.options(own), "params": [p]} for own, p in zip(each, params, strict=True)]
        )
        if callable(train := getattr(optimizer, "train", None)):
            train()  # schedule-free optimizers
        step: list[int] = [0]

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(params, step[0])
            value.backward()
            return value

        path = []
        for step[0] in range(STEPS):
            closure()
            try:
                optimizer.step()
            except (TypeError, RuntimeError, AssertionError):  # the step wants to compute the loss itself
                optimizer.step(closure)  # type: ignore[arg-type]
            path.append([p.detach().clone() for p in params])
        return path

    def options(self, wanted: dict[str, float]) -> dict[str, Any]:
        """Those of the options that the class has; tensors where it wants tensors."""
        return {
            key: torch.tensor(value) if self.keys[key] else value for key, value in wanted.items() if key in self.keys
        }

    def linear(self, scale: float) -> Callable[[list[Tensor], int], Tensor]:
        """A loss with gradients that do not depend on the weights."""

        def loss(params: list[Tensor], step: int) -> Tensor:
            terms = [(g * p).sum() for g, p in zip(self.gradients[step], params, strict=True)]
            return scale * torch.stack(terms).sum()

        return loss

    def regression(self, multiplier: float) -> Callable[[list[Tensor], int], Tensor]:
        """A two-layer network whose second layer has an explicit multiplier."""

        def loss(params: list[Tensor], step: int) -> Tensor:
            inputs, targets = self.data[step]
            outputs = torch.tanh(inputs @ params[0].T) @ (multiplier * params[1])
            return (outputs - targets).square().mean()

        return loss

    def steps(self, scale: float = 1.0, size: float = 1.0, **changes: float) -> list[list[Tensor]]:
        """Each step under fixed gradients, without decay."""
        start = [size * value for value in self.start]
        path = [start, *self.run(start, self.linear(scale), {**TOY, "weight_decay": 0.0, "eps": TINY, **changes})]
        return [_difference_of(after, before) for before, after in pairwise(path)]

    def measure(self) -> tuple[Answers, bool | None, str | None]:
        """The answers, whether decay is decoupled (None without one), and how Muon's step follows the shape."""
        moved = self.steps()
        at = next((i for i, step in enumerate(moved) if _size(step)), None)  # some classes rest at first
        if at is None:
            raise OptimizerError("its steps on a toy of two tensors are zero")
        first = moved[at]
        scaled = self.steps(scale=SCALE)
        early, late = _exponent(first, scaled[at]), _exponent(moved[-1], scaled[-1])
        lr = _exponent(first, self.steps(lr=SCALE * TOY["lr"])[at])
        if "eps" in self.keys and abs(_exponent(first, self.steps(eps=SCALE * TINY)[at])) > EXPONENT:
            raise OptimizerError("its steps follow the size of eps, however small eps is, and not lr alone")
        weight = _relative(first, self.steps(size=SCALE)[at])
        decoupled = self.is_decoupled() if "weight_decay" in self.keys else None
        normalised = abs(late) < 0.5
        family = get_family("sgd" if not normalised else "adam" if decoupled is False else "adamw")
        orthogonal, adjust = self.orthogonal() if normalised else (False, None)
        fold, fold_tiny = (self.fold_difference(family, {**TOY, "eps": eps}) for eps in (TOY["eps"], TINY))
        return Answers(late, early, lr, weight, fold, fold_tiny, orthogonal), decoupled, adjust

    def is_decoupled(self) -> bool:
        """Whether what decay adds to the first step is the same under gradients of another scale."""
        added = []
        for scale in (1.0, SCALE):
            with_decay, without = (
                self.run(self.start, self.linear(scale), {**TOY, "eps": TINY, "weight_decay": decay})[1]
                for decay in (TOY["weight_decay"], 0.0)
            )
            added.append(_difference_of(with_decay, without))
        return _relative(*added) < 0.01

    def fold_difference(self, family: Family, options: dict[str, float]) -> float:
        """Training with an explicit multiplier against training with a folded one, relative to how far both train."""
        m = fold_multipliers(replace(family, foldable=True), FOLDED)
        folded = {key: value * getattr(m, key) for key, value in options.items()}
        explicit = self.run(self.start, self.regression(FOLDED), options)[-1]
        inside = self.run([self.start[0], FOLDED * self.start[1]], self.regression(1.0), options, folded)[-1]
        moved = _difference_of(explicit, self.start)
        return _relative(moved, _difference_of([inside[0], inside[1] / FOLDED], self.start))

    def orthogonal(self) -> tuple[bool, str | None]:
        """Whether a matrix's step has equal singular values, and how its size follows the shape."""
        sizes = []
        for shape in SHAPES:
            # All entries positive: what normalises entry by entry makes a matrix of ones from it, of rank one.
            gradient = 1 + 0.3 * torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            weight = torch.ones(shape, dtype=torch.float64, requires_grad=True)
            optimizer = self.make([{**self.group, "params": [weight]}])
            if callable(train := getattr(optimizer, "train", None)):
                train()
            before = weight.detach().clone()
            for group in optimizer.param_groups:
                group.update(self.options({"lr": TOY["lr"], "weight_decay": 0.0}))
            weight.grad = gradient
            optimizer.step()
            values = torch.linalg.svdvals(weight.detach() - before)
            if not values[-1] > values[0] / 3:
                return False, None
            sizes.append(float(values.square().mean().sqrt()))
        return True, next((name for name, given in MUON_SHAPES.items() if _follows(sizes, given)), None)


def _follows(sizes: Sequence[float], given: Callable[[float, float], float]) -> bool:
    """Whether the steps of matrices of SHAPES follow them in the given way."""
    off = [math.log(size / given(*shape)) for size, shape in zip(sizes, SHAPES, strict=True)]
    return max(off) - min(off) < NEAR


def _size(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors]).norm())


def _exponent(once: Sequence[Tensor], scaled: Sequence[Tensor]) -> float:
    """The exponent of a step in what was multiplied by SCALE; of two tensors, what is further from a whole number."""
    found = [math.log(float(b.norm() / a.norm())) / math.log(SCALE) for a, b in zip(once, scaled, strict=True)]
    return max(found, key=lambda value: abs(value - round(value)))


def _difference_of(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _relative(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).norm() / a.norm()) for a, b in zip(one, other, strict=True))
