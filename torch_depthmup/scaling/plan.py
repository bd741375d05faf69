"""The plan: what will be scaled by how much, and why. Data that prints, compares, and goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from torch_depthmup import rules
from torch_depthmup.errors import DepthMuPError, PlanError
from torch_depthmup.rules import Family, Multipliers, Role, Rule, Width
from torch_depthmup.running import normalise_name
from torch_depthmup.tables import Table, columns, fold_names
from torch_depthmup.tracing.branches import Branch

__all__ = ["How", "Plan", "PlannedParameter", "Stream", "branch_rows", "parameter_rows", "table"]

How = Literal["fold", "wrap"]
FORMAT = 1


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
class PlannedParameter:
    """What a plan says of one parameter.

    Args:
        name: the parameter's name in the model.
        role: ``"outside"`` of every branch, ``"inner"`` or ``"outer"``.
        branch: name of its branch, or ``None``.
        depth_multiplier: that of its stream; 1 outside.
        folded: the forward multiplier that its value now contains, 1 where there is none.
        scale: the factor on its value at initialization.
        width: its dimensions beside its base's, or ``None`` without width scaling.
        reason: the role in words.
    """

    name: str
    role: Role
    branch: str | None
    depth_multiplier: float
    folded: float
    scale: float
    width: Width | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every branch and every parameter of a model with its multipliers and the reason. Made by `parametrize`.

    ``print(plan)`` gives a table; `explain` a parameter's story; `multipliers` its numbers; `to_json` and `from_json`
    carry a plan between runs.
    """

    rule: Rule
    how: How
    streams: tuple[Stream, ...]
    branches: tuple[Branch, ...]
    entries: tuple[PlannedParameter, ...]

    @cached_property
    def parameters(self) -> Mapping[str, PlannedParameter]:
        """The planned parameters by name."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def _normalised(self) -> dict[str, PlannedParameter]:
        return {normalise_name(entry.name): entry for entry in self.entries}

    def branch_multiplier(self, branch: Branch) -> float:
        """The factor m on the branch's value."""
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
        if entry.scale != 1.0:
            lines.append(f"  its value at initialization is multiplied by {entry.scale:.6g}")
        if entry.folded != 1.0:
            lines.append(
                f"  it contains a forward multiplier of {entry.folded:.6g}; the numbers below make up for that"
            )
        if entry.width is not None and entry.width.infinite:
            lines.append(
                f"  width: shape {entry.width.dims}, base {entry.width.base}, {entry.width.multiplier:g} x base"
            )
        for family in ("sgd", "adam", "adamw"):
            m = self.multipliers(entry.name, family)
            lines.append(f"  {family:<6} lr x {m.lr:<10.6g} weight_decay x {m.weight_decay:<10.6g} eps x {m.eps:.6g}")
        return "\n".join(lines)

    def to_json(self, *, indent: int | None = 1) -> str:
        """The plan as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=indent)

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
                branches=tuple(Branch(**{k: _tuples(v) for k, v in branch.items()}) for branch in data["branches"]),
                entries=tuple(
                    PlannedParameter(**{**entry, "width": _width(entry["width"])}) for entry in data["entries"]
                ),
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a plan written by Plan.to_json: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:

        return table(self)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _width(data: dict[str, Any] | None) -> Width | None:
    return None if data is None else Width(tuple(data["dims"]), tuple(data["base"]), data["main"])


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
    return "\n".join([*lines, "", *columns(*branch_rows(plan)), "", *columns(*parameter_rows(plan))])


def branch_rows(plan: Plan) -> Table:
    """The plan's branches, repeated blocks folded."""
    branches: dict[str, tuple[str, ...]] = {
        b.name: (f"{b.stream}", b.skip, f"{b.levels}", f"{plan.branch_multiplier(b):.4g}") for b in plan.branches
    }
    return ("branch", "stream", "skip", "levels", "multiplier"), fold_names(branches)


def parameter_rows(plan: Plan) -> Table:
    """The plan's parameters with their multipliers, repeated blocks folded."""
    rows = {}
    for entry in plan.entries:
        try:
            sgd, adam, adamw = (plan.multipliers(entry.name, family) for family in ("sgd", "adam", "adamw"))
            numbers = (sgd.lr, sgd.weight_decay, adam.lr, adamw.weight_decay, adam.eps)
            rows[entry.name] = (entry.role, f"{entry.scale:.4g}", *(f"{number:.4g}" for number in numbers))
        except DepthMuPError:  # more widths than mup knows: the optimizer will refuse, the table still prints
            rows[entry.name] = (entry.role, f"{entry.scale:.4g}", *["-"] * 5)
    return ("parameter", "role", "value", "SGD lr", "SGD wd", "Adam lr", "AdamW wd", "Adam eps"), fold_names(rows)
