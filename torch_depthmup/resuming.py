"""An optimizer's saved state beside the groups it is loaded into: matched by name, or refused."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from torch_depthmup.errors import OptimizerError

__all__ = ["matched_by_name"]

MULTIPLIERS = ("lr_multiplier", "weight_decay_multiplier", "eps_multiplier")
SAME = 1e-6


def matched_by_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """The state with its parameters in the optimizer's order; None where the orders agree or names are missing.

    Raises:
        OptimizerError: the state was saved without multipliers, or with others, or holds other parameters.
    """
    saved, groups = state_dict["param_groups"], optimizer.param_groups
    if any(group["lr_multiplier"] != 1.0 for group in groups) and any("lr_multiplier" not in group for group in saved):
        raise OptimizerError(
            f"this state was saved by a plain {type(optimizer).__name__}, without the plan's multipliers, and would "
            "overwrite them. Load it into a plain one, and call dm.rescale(optimizer, model) after that"
        )
    theirs, ours = _by_name(saved), _by_name(groups)
    if theirs is None or ours is None:
        return None
    if missing := [name for name in ours if name not in theirs] or [name for name in theirs if name not in ours]:
        where = "the saved state does not have" if missing[0] in ours else "this optimizer does not have"
        raise OptimizerError(f"{where} {len(missing)} parameters of the other: {', '.join(missing[:3])}")
    for name, (group, _) in ours.items():
        other = theirs[name][0]
        for key in MULTIPLIERS:
            if key in other and abs(other[key] - group[key]) > SAME * abs(group[key]):
                raise OptimizerError(
                    f"{name}: the state was saved with {key.replace('_', ' ')} {other[key]:.6g}, and this optimizer "
                    f"has {group[key]:.6g}: another base, rule, or how. Call dm.parametrize as in the run that saved it"
                )
    if [list(group["param_names"]) for group in saved] == [list(group["param_names"]) for group in groups]:
        return None
    reordered = [
        {
            **theirs[group["param_names"][0]][0],
            "params": [theirs[name][1] for name in group["param_names"]],
            "param_names": list(group["param_names"]),
        }
        for group in groups
    ]
    return {**state_dict, "param_groups": reordered}


def _by_name(groups: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], Any]] | None:
    """Each parameter's group and saved number by its name; None without names, or where one is used twice."""
    found: dict[str, tuple[dict[str, Any], Any]] = {}
    for group in groups:
        names = group.get("param_names")
        if names is None or not group["params"]:
            return None
        for name, item in zip(names, group["params"], strict=True):
            if name in found:
                return None
            found[name] = group, item
    return found
