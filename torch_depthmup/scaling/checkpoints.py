"""What a state_dict says of the multipliers in its values, and how values of one model become another's.

A state_dict has the keys and values that it has without this package. Which multipliers they contain is noted in its
metadata, beside the versions of modules that torch keeps there. ``torch.save`` keeps the note; a dict that was copied
key by key, or a file of safetensors, has none, and nothing is checked then.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torch_depthmup.errors import PlanError
from torch_depthmup.running import normalise_name
from torch_depthmup.scaling.plan import Plan

__all__ = ["converted", "load_count", "note_in_checkpoints", "take_off_notes"]

KEY = "torch_depthmup"
Note = dict[str, Any]
"""``how``, the multiplier ``folded`` into each parameter, and that of each of the ``branches``; without ones."""


def note_of(plan: Plan) -> Note | None:
    """What is noted of a plan; None where values and modules contain no multiplier."""
    multipliers = {entry.name: entry.folded * entry.present for entry in plan.entries}
    folded = {name: multiplier for name, multiplier in multipliers.items() if multiplier != 1.0}
    if not folded and not plan.hooks:
        return None
    branches = {planned.branch.name: planned.supplied for planned in plan.planned_branches if planned.supplied != 1.0}
    return {"how": plan.how, "folded": folded, "branches": branches}


def note_in_checkpoints(model: nn.Module, plan: Plan) -> None:
    """Has a model's state_dicts noted, and those that it loads compared with the plan."""
    note = note_of(plan)
    hooks: dict[str, Any] = {"_state_dict_hooks": _Noting, "_load_state_dict_pre_hooks": _Comparing}
    for name, hook in hooks.items():
        present = vars(model).get(name)
        # Handles of the user's own hooks are to the dictionary that is there: it is left.
        if note is not None and present is not None and not present:
            vars(model)[name] = _Hooks({KEY: hook(note)})


def take_off_notes(model: nn.Module) -> None:
    """Ends what `note_in_checkpoints` began."""
    for name in ("_state_dict_hooks", "_load_state_dict_pre_hooks"):
        vars(model).get(name, {}).pop(KEY, None)


def load_count(model: nn.Module) -> int:
    """How many state_dicts the model has been given to load."""
    hook = vars(model).get("_load_state_dict_pre_hooks", {}).get(KEY)
    return hook.loads if hook else 0


class _Hooks(OrderedDict[Any, Any]):
    """A module's hooks with one of ours, which copies keep and pickles leave out: they load without this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter([item for item in self.items() if item[0] != KEY])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        copied = memo[id(self)] = _Hooks()
        for key, hook in self.items():
            copied[key] = copy.deepcopy(hook, memo)
        return copied


class _Noting:
    """Writes the note of a plan into a state_dict."""

    def __init__(self, note: Note):
        self.note = note

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any]) -> None:
        metadata[KEY] = self.note


class _Comparing:
    """Refuses a state_dict whose note is another."""

    def __init__(self, note: Note):
        self.note, self.loads = note, 0

    def __call__(self, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *rest: Any) -> None:
        self.loads += 1
        saved: Note | None = metadata.get(KEY)
        if saved is None:
            return
        _refuse_other_branches(saved, self.note)
        if name := _first_difference(saved["folded"], self.note["folded"]):
            values = [note["folded"].get(name, 1.0) for note in (saved, self.note)]
            raise PlanError(
                f"{name} contains a multiplier of {values[0]:.6g} in this state_dict (how={saved['how']!r}) and of "
                f"{values[1]:.6g} in this model (how={self.note['how']!r}). Write "
                "model.load_state_dict(dm.convert_state_dict(state_dict, model))"
            )


def _refuse_other_branches(saved: Note, note: Note) -> None:
    if name := _first_difference(saved["branches"], note["branches"]):
        values = [one["branches"].get(name, 1.0) for one in (saved, note)]
        raise PlanError(
            f"the branch {name} had the multiplier {values[0]:.6g} where this state_dict was saved and has "
            f"{values[1]:.6g} in this model: another base or rule. Call dm.parametrize as in the run that saved it"
        )


def _first_difference(one: Mapping[str, float], other: Mapping[str, float]) -> str | None:
    for name in [*one, *other]:
        if not math.isclose(one.get(name, 1.0), other.get(name, 1.0), rel_tol=1e-6):
            return name
    return None


def converted(state_dict: Mapping[str, Any], plan: Plan, saved: Plan | None, prefix: str = "") -> dict[str, Any]:
    """A state_dict with the folded multipliers of another plan in its values; see `convert_state_dict`.

    Args:
        state_dict: of a model with the plan ``saved``.
        plan: that of the model which is to load it.
        saved: the plan of the run that saved it; ``None`` reads the state_dict's note.
        prefix: of the planned module inside the model that loads, with a dot at the end.

    Raises:
        PlanError: nothing tells what the values contain, or their branches had other multipliers.
    """
    metadata: dict[str, dict[str, Any]] = copy.deepcopy(getattr(state_dict, "_metadata", {}))
    places = [path for path, of_module in metadata.items() if KEY in of_module]
    if saved is None and len(places) != 1:
        raise PlanError(
            "this state_dict does not say which multipliers its values contain: it was copied key by key, or saved by "
            "a model without any. Pass the plan of the run that saved it, plan=dm.Plan.from_json(text)"
        )
    empty: Note = {"how": plan.how, "folded": {}, "branches": {}}
    theirs = metadata[places[0]][KEY] if saved is None else note_of(saved) or empty
    ours = note_of(plan) or empty
    _refuse_other_branches(theirs, ours)
    before, after = ({normalise_name(n): m for n, m in note["folded"].items()} for note in (theirs, ours))
    result: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        name = normalise_name(key).removeprefix(prefix)
        factor = after.get(name, 1.0) / before.get(name, 1.0)
        result[key] = value * factor if factor != 1.0 and isinstance(value, Tensor) else value
    for path in places:
        metadata[path][KEY] = ours
    if metadata:
        result._metadata = metadata  # type: ignore[attr-defined]
    return result
