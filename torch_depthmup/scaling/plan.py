"""The plan: what will be scaled by how much, and why. Data that prints, compares, and goes to JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from torch_depthmup import rules
from torch_depthmup.errors import DepthMuPError, OptimizerError, PlanError
from torch_depthmup.rules import Family, Multipliers, Role, Rule, Width
from torch_depthmup.running import normalise_name
from torch_depthmup.tables import Table, columns, fold_names
from torch_depthmup.tracing.additions import Reason
from torch_depthmup.tracing.branches import Branch, LeftAlone

__all__ = [
    "Copy",
    "Hook",
    "How",
    "InitialSize",
    "Plan",
    "PlannedBranch",
    "PlannedParameter",
    "Stream",
    "branch_rows",
    "parameter_rows",
    "table",
]

How = Literal["fold", "wrap"]
FORMAT = 3


@dataclass(frozen=True)
class Stream:
    """A residual stream's number of residual additions beside that of its base.

    Args:
        additions: of the model's stream.
        depth_multiplier: ``additions`` over those of the base, the depth ratio r of the rules.
    """

    additions: int
    depth_multiplier: float

    @property
    def base_additions(self) -> int:
        """The number of residual additions of the base's stream."""
        return round(self.additions / self.depth_multiplier)


@dataclass(frozen=True)
class PlannedBranch:
    """A branch with its multiplier, and what of it is there already.

    Args:
        branch: what was found.
        multiplier: the factor m on the branch's value that the rule asks for, relative to the base.
        initial: the factor that its last weights were initialized with, relative to the base, as in GPT-2. It is taken
            out of their values when the multiplier comes in.
        forward: the factor that the forward pass has already, relative to the base, as in ``x + f(x) / sqrt(L)``.
    """

    branch: Branch
    multiplier: float
    initial: float = 1.0
    forward: float = 1.0

    @property
    def supplied(self) -> float:
        """The factor that the forward pass lacks: folded into the branch's carrier, or hung on a module."""
        return 1.0 if self.forward == self.multiplier else self.multiplier / self.forward


@dataclass(frozen=True)
class InitialSize:
    """A root mean square that values start with.

    Args:
        size: the root mean square.
        error: standard error of its logarithm, since the values are random.
        exact: the size of what they were drawn from, where they look like PyTorch's default.
    """

    size: float
    error: float
    exact: float | None = None


@dataclass(frozen=True)
class Hook:
    """A multiplier on what a module returns: of a branch under ``how="wrap"``, or of a readout with shared weights.

    Args:
        module: its name.
        output: which element to multiply where it returns a tuple; of a single tensor, 0.
        multiplier: the factor.
        branch: index of the branch that it multiplies (of the first, where one module returns several), or ``None`` for
            a readout.
        is_copy: whether it is on a copy that the gradient does not reach.
    """

    module: str
    output: int
    multiplier: float
    branch: int | None = None
    is_copy: bool = False


@dataclass(frozen=True)
class Copy:
    """A part of the model that trains nothing and follows another part, as a momentum teacher does.

    Args:
        name: its module.
        of: the module whose values it holds.
    """

    name: str
    of: str


@dataclass(frozen=True)
class PlannedParameter:
    """What a plan says of one parameter.

    Args:
        name: the parameter's name in the model.
        role: ``"outside"`` of every branch, ``"inner"``, ``"outer"``, or ``"trunk"``.
        branch: name of its branch, or ``None``.
        depth_multiplier: that of its stream; 1 outside.
        folded: the forward multiplier that its value contains once the plan is carried out, 1 where there is none.
        scale: the factor on its value at initialization; ``None`` where the model had no values when it was planned
            (on ``meta``), so that `apply` finds it.
        width: its dimensions beside its base's, or ``None`` without width scaling.
        reason: the role in words.
        initial: the size that its value should start with, before what of ``folded`` is not there yet; ``None`` where
            the base does not tell.
        kind: what parameters that are compared with the same of the base share; empty without a base.
        scale_reason: the factor on its value in words; empty where that is 1.
        present: what the forward pass multiplies it with, relative to the base, as in ``W @ x / sqrt(width)``. Its
            value contains the inverse, which is a part of ``folded``.
        rows_scale: a further factor at initialization on the rows that ``width.unnormalised`` says.
    """

    name: str
    role: Role
    branch: str | None
    depth_multiplier: float
    folded: float
    scale: float | None
    width: Width | None
    reason: str
    initial: InitialSize | None = None
    kind: str = ""
    scale_reason: str = ""
    present: float = 1.0
    rows_scale: float = 1.0

    @property
    def size_factor(self) -> float:
        """The factor on its value's size at initialization, if all its rows are drawn alike."""
        scale = 1.0 if self.scale is None else self.scale
        if self.rows_scale == 1.0 or self.width is None or self.width.summed is None:
            return scale
        rows = sum(end - start for start, end in self.width.unnormalised) / self.width.dims[1 - self.width.summed]
        return scale * math.sqrt(1 - rows + rows * self.rows_scale**2)


@dataclass(frozen=True)
class Plan:
    """Every branch and every parameter of a model with its multipliers and the reason. Made by `parametrize`.

    ``print(plan)`` gives a table; `explain` a parameter's story; `multipliers` its numbers; `to_json` and `from_json`
    carry a plan between runs.

    >>> import torch, torch_depthmup as dm
    >>> blocks = [dm.Residual(torch.nn.Linear(8, 8)) for _ in range(4)]
    >>> plan = dm.plan(torch.nn.Sequential(*blocks), depth_multiplier=4, example_inputs=torch.ones(1, 8))
    >>> plan["0.branch.weight"].scale, plan.multipliers("0.branch.weight", "adamw").lr
    (0.5, 0.25)
    """

    rule: Rule
    how: How
    streams: tuple[Stream, ...]
    planned_branches: tuple[PlannedBranch, ...]
    entries: tuple[PlannedParameter, ...]
    hooks: tuple[Hook, ...] = ()
    copies: tuple[Copy, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """The branches as they were found."""
        return tuple(planned.branch for planned in self.planned_branches)

    @cached_property
    def parameters(self) -> Mapping[str, PlannedParameter]:
        """The planned parameters by name."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def _normalised(self) -> dict[str, PlannedParameter]:
        return {normalise_name(entry.name): entry for entry in self.entries}

    def branch_multiplier(self, branch: Branch) -> float:
        """The factor m on the branch's value that the rule asks for; part of it may be there already."""
        return self.rule.branch_multiplier(self.streams[branch.stream].depth_multiplier)

    def __getitem__(self, name: str) -> PlannedParameter:
        """The planned parameter of that name; wrappers' and parametrizations' prefixes do not matter.

        Raises:
            PlanError: the plan has no such parameter.
        """
        found = self.parameters.get(name) or self._normalised.get(normalise_name(name))
        if found is None:
            close = [known for known in self.parameters if known.rpartition(".")[0] == name][:3]
            hint = f". Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise PlanError(
                f"the plan has no parameter {name!r}{hint or '. See plan.parameters'}. One that was added after "
                "dm.parametrize has no plan: add it before"
            )
        return found

    def multipliers(self, name: str, family: str | Family, *, adjust_lr: str | None = None) -> Multipliers:
        """Factors on learning rate, weight decay and eps of one parameter under one optimizer family.

        Args:
            name: the parameter.
            family: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"muon"``, ``"adafactor"``, or a `Family`.
            adjust_lr: Muon's ``adjust_lr_fn``.

        Raises:
            PlanError: the plan has no such parameter.
            OptimizerError: the family is unknown, or cannot train what the plan did.
        """
        entry, family = self[name], rules.get_family(family)
        if entry.present != 1.0 and not family.foldable:
            raise OptimizerError(
                f"the forward pass multiplies {entry.name} by {entry.present:.4g} relative to the base, and an "
                "optimizer whose steps depend on a weight's or a gradient's scale in a way of their own "
                f"({family.name}) cannot make up for it. Initialize the weight with this factor instead"
            )
        return (
            rules.depth_multipliers(self.rule, family, entry.role, entry.depth_multiplier)
            * rules.fold_multipliers(family, entry.folded)
            * rules.width_multipliers(self.rule, family, entry.width, adjust_lr=adjust_lr)
        )

    def explain(self, name: str) -> str:
        """A parameter's role, its reason and its multipliers, in a few lines.

        Raises:
            PlanError: the plan has no such parameter.
        """
        entry = self[name]
        lines = [f"{entry.name}: {entry.role}", f"  {entry.reason}"]
        if entry.scale is None:
            lines.append("  its value at initialization is multiplied by what dm.apply finds, once it has values")
        elif entry.scale != 1.0 or entry.scale_reason:
            reason = f": {entry.scale_reason}" if entry.scale_reason else ""
            lines.append(f"  its value at initialization is multiplied by {entry.scale:.6g}{reason}")
        if entry.rows_scale != 1.0 and entry.width is not None:
            rows = ", ".join(f"{start} to {end - 1}" for start, end in entry.width.unnormalised)
            lines.append(f"  its rows {rows}, which no norm follows, read out of a width: {entry.rows_scale:.6g} more")
        if entry.present != 1.0:
            lines.append(f"  the forward pass multiplies it by {entry.present:.6g}, relative to the base")
        if entry.folded != 1.0:
            lines.append(
                f"  it contains a forward multiplier of {entry.folded:.6g}; the numbers below make up for that"
            )
        if entry.width is not None and entry.width.widths:
            lines.append(
                f"  width ({entry.width.kind}): shape {entry.width.dims}, base {entry.width.base}, "
                f"width_mult {entry.width.multiplier:g}"
            )
        for family in ("sgd", "adam", "adamw"):
            m = self.multipliers(entry.name, family)
            lines.append(f"  {family:<6} lr x {m.lr:<10.6g} weight_decay x {m.weight_decay:<10.6g} eps x {m.eps:.6g}")
        return "\n".join(lines)

    def to_json(self, *, indent: int | None = 1) -> str:
        """The plan as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=indent, default=lambda reason: reason.name)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the text is not such a plan.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(f"this plan has format {data['format']}, this version of torch_depthmup reads {FORMAT}")
            return cls(
                rule=Rule(**data["rule"]),
                how=data["how"],
                streams=tuple(Stream(**stream) for stream in data["streams"]),
                planned_branches=tuple(_planned_branch(branch) for branch in data["planned_branches"]),
                entries=tuple(_planned_parameter(entry) for entry in data["entries"]),
                hooks=tuple(Hook(**hook) for hook in data["hooks"]),
                copies=tuple(Copy(**copy) for copy in data["copies"]),
                left_alone=tuple(LeftAlone(**{**s, "reason": Reason[s["reason"]]}) for s in data.get("left_alone", ())),
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a plan written by Plan.to_json: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return table(self)


def _planned_branch(data: dict[str, Any]) -> PlannedBranch:
    branch: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data["branch"].items()
    }
    return PlannedBranch(**{**data, "branch": Branch(**branch)})


def _planned_parameter(data: dict[str, Any]) -> PlannedParameter:
    width, initial = data["width"], data["initial"]
    if width is not None:
        rows = tuple(map(tuple, width.get("unnormalised", ())))
        width = Width(**{**width, "dims": tuple(width["dims"]), "base": tuple(width["base"]), "unnormalised": rows})
    return PlannedParameter(**{**data, "width": width, "initial": initial and InitialSize(**initial)})


def table(plan: Plan) -> str:
    """The plan's streams, branches and parameters."""
    lines = [
        f"Plan: rule {plan.rule.name}, how={plan.how!r}, {len(plan.branches)} branches, {len(plan.entries)} parameters"
    ]
    for i, stream in enumerate(plan.streams):
        m = plan.rule.branch_multiplier(stream.depth_multiplier)
        lines.append(
            f"stream {i}: {stream.additions} additions, {stream.base_additions} in the base, depth multiplier "
            f"{stream.depth_multiplier:g}, branch multiplier {m:.4g}"
        )
    lines += [
        f"a readout has shared weights: {hook.module or 'the model'} is multiplied by {hook.multiplier:.4g}"
        for hook in plan.hooks
        if hook.branch is None and not hook.is_copy
    ]
    lines += [f"{copy.name} is a copy of {copy.of} and is scaled as it is" for copy in plan.copies]
    return "\n".join([*lines, "", *columns(*branch_rows(plan)), "", *columns(*parameter_rows(plan))])


def branch_rows(plan: Plan) -> Table:
    """The plan's branches, repeated blocks folded."""
    branches: dict[str, tuple[str, ...]] = {
        p.branch.name: (
            f"{p.branch.stream}",
            p.branch.skip,
            f"{p.branch.levels}",
            f"{p.multiplier:.4g}",
            f"{p.initial * p.forward:.4g}",
        )
        for p in plan.planned_branches
    }
    return ("branch", "stream", "skip", "levels", "multiplier", "there"), fold_names(branches)


def parameter_rows(plan: Plan) -> Table:
    """The plan's parameters with their multipliers, repeated blocks folded."""
    rows = {}
    for entry in plan.entries:
        value = "at apply" if entry.scale is None else f"{entry.scale:.4g}"
        if entry.scale is not None and entry.rows_scale != 1.0:
            value += f", {entry.scale * entry.rows_scale:.4g}"
        try:
            sgd, adam, adamw = (plan.multipliers(entry.name, family) for family in ("sgd", "adam", "adamw"))
            numbers = (sgd.lr, sgd.weight_decay, adam.lr, adamw.weight_decay, adam.eps)
            rows[entry.name] = (entry.role, value, *(f"{number:.4g}" for number in numbers))
        except DepthMuPError:  # more widths than mup knows: the optimizer will refuse, the table still prints
            rows[entry.name] = (entry.role, value, *["-"] * 5)
    return ("parameter", "role", "value", "SGD lr", "SGD wd", "Adam lr", "AdamW wd", "Adam eps"), fold_names(rows)
