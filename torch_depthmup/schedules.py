"""Learning rates and decays of scaled groups: read and written as the base model's, and checked for overwriting."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch_depthmup.errors import OptimizerError

__all__ = ["overwritten", "per_group", "set_lr", "unscaled"]

MULTIPLIED = dict.fromkeys(("lr", "initial_lr", "max_lr", "min_lr", "base_lr"), "lr_multiplier") | dict.fromkeys(
    ("weight_decay", "initial_weight_decay"), "weight_decay_multiplier"
)
"""What schedulers keep in groups that is a learning rate or a decay, and what it is multiplied by."""

DRIFT = 0.01  # how far ratios of learning rates may move before they are taken to have been overwritten
SAME = 1e-6


def per_group(optimizer: Optimizer, value: float) -> list[float]:
    """One value for each group, scaled as its learning rate is: for ``OneCycleLR(max_lr=...)`` and the like.

    Args:
        optimizer: made by this package.
        value: a learning rate of the base model.

    Raises:
        OptimizerError: the optimizer carries no multipliers.
    """
    return [value * group["lr_multiplier"] for group in _scaled_groups(optimizer)]


def set_lr(optimizer: Optimizer, lr: float | Tensor) -> None:
    """Writes a learning rate of the base model into all groups, each times its lr multiplier.

    In place of ``for group in optimizer.param_groups: group["lr"] = lr``. Where a group has an ``lr_scale`` (layer
    decay), its rate is multiplied by that too. Learning rates that are tensors keep their tensors.

    Args:
        optimizer: made by this package.
        lr: the base model's learning rate.

    Raises:
        OptimizerError: the optimizer carries no multipliers.

    >>> import torch, torch_depthmup as dm
    >>> block = lambda: dm.Residual(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)))
    >>> model = torch.nn.Sequential(*[block() for _ in range(8)])
    >>> _ = dm.parametrize(model, depth_multiplier=4, example_inputs=torch.randn(2, 4))
    >>> optimizer = dm.AdamW(model, lr=0.1)
    >>> dm.set_lr(optimizer, 0.2)
    >>> sorted(group["lr"] for group in optimizer.param_groups)
    [0.05, 0.2]
    """
    for group in _scaled_groups(optimizer):
        value = float(lr) * group["lr_multiplier"] * group.get("lr_scale", 1.0)
        _write(group, "lr", value)


def unscaled(optimizer: Optimizer) -> Optimizer:
    """The optimizer as a scheduler should see it: with the base model's learning rates and decays in its groups.

    A scheduler made with it writes the base model's rates, floors and warm-up starts; the optimizer's own groups get
    them times their multipliers. For schedulers that do not work by ratios, such as
    ``CosineAnnealingLR(dm.unscaled(optimizer), 100, eta_min=1e-5)``. Train and save with the optimizer itself.

    Args:
        optimizer: made by this package.

    Raises:
        OptimizerError: the optimizer carries no multipliers.
    """
    _scaled_groups(optimizer)
    view = vars(optimizer).get("_unscaled_view")
    if view is None:  # one view an optimizer: SequentialLR asks for one and the same
        view = vars(optimizer)["_unscaled_view"] = _Unscaled(optimizer)
    return view


def _scaled_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    if any("lr_multiplier" not in group for group in optimizer.param_groups):
        raise OptimizerError(f"{type(optimizer).__name__} was not made by dm; call dm.rescale(optimizer, model) first")
    return optimizer.param_groups


def _write(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


class _UnscaledGroup(MutableMapping[str, Any]):
    """A group whose learning rates and decays are read and written without its multipliers."""

    def __init__(self, group: dict[str, Any]):
        self.group = group

    def __getitem__(self, key: str) -> Any:
        value = self.group[key]
        return value if key not in MULTIPLIED or value is None else float(value) / self.group[MULTIPLIED[key]]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in MULTIPLIED and value is not None:
            _write(self.group, key, float(value) * self.group[MULTIPLIED[key]])
        else:
            self.group[key] = value

    def __delitem__(self, key: str) -> None:
        del self.group[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.group)

    def __len__(self) -> int:
        return len(self.group)


class _Unscaled(Optimizer):
    """A view of an optimizer; what is not a group is the optimizer's own."""

    _opt_called = True  # the optimizer's own step is the one that is called

    def __init__(self, optimizer: Optimizer):
        vars(self)["optimizer"] = optimizer

    def __eq__(self, other: object) -> bool:
        # Trainers ask whether a scheduler's optimizer is the one that they were given.
        return other is self or other is self.optimizer

    def __hash__(self) -> int:
        return hash(self.optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["optimizer"], name)

    @property
    def param_groups(self) -> list[_UnscaledGroup]:  # type: ignore[override]
        return [_UnscaledGroup(group) for group in self.optimizer.param_groups]

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure) if closure else self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"unscaled({self.optimizer!r})"


def overwritten(
    groups: Sequence[dict[str, Any]], values: Sequence[float], key: str, one_value: bool, scheduled: bool
) -> str | None:
    """What is wrong where values are no longer the base model's times their multipliers; None if nothing is.

    Args:
        groups: an optimizer's, with multipliers.
        values: their learning rates or weight decays as numbers. A decay of 0 is one of any group.
        key: ``"lr"`` or ``"weight_decay"``.
        one_value: whether all groups were meant to have one and the same value; then one in all of them says nothing.
        scheduled: whether a scheduler of torch's is attached.
    """
    multipliers = [group[f"{key}_multiplier"] for group in groups]
    scales = [group.get("lr_scale", 1.0) if key == "lr" else 1.0 for group in groups]
    written = [value / scale for value, scale in zip(values, scales, strict=True)]
    base = [value / multiplier for value, multiplier in zip(written, multipliers, strict=True)]
    live = [i for i, value in enumerate(values) if value]
    first: dict[Any, int] = {}
    for i in range(len(groups)) if key == "lr" else live:
        j = first.setdefault(groups[i].get("user_group", i), i)
        if abs(base[i] - base[j]) > DRIFT * max(abs(base[i]), abs(base[j])):
            return _told(j, i, groups, values, key, scheduled)
    factors = [multipliers[i] for i in live]
    if one_value or not live or max(factors) - min(factors) <= DRIFT * max(factors):
        return None
    if max(written[i] for i in live) - min(written[i] for i in live) <= SAME * max(written[i] for i in live):
        other = next(i for i in live if abs(multipliers[i] - factors[0]) > DRIFT * factors[0])
        return _told(live[0], other, groups, values, key, scheduled)
    return None


def _told(i: int, j: int, groups: Sequence[dict[str, Any]], values: Sequence[float], key: str, scheduled: bool) -> str:
    ratio = groups[i][f"{key}_multiplier"] / groups[j][f"{key}_multiplier"]
    if key == "weight_decay":
        fix = "Write base values, into the groups of dm.unscaled(optimizer)"
    elif scheduled:
        fix = (
            "Make the scheduler with dm.unscaled(optimizer) in place of the optimizer and with the base model's rates, "
            "floors and warm-up starts"
        )
        if "max_lr" in groups[i]:
            fix += ", or write max_lr=dm.per_group(optimizer, ...)"
    else:
        fix = (
            "Write dm.set_lr(optimizer, lr) in place of a loop over param_groups, and make schedulers with "
            "dm.unscaled(optimizer)"
        )
    name, short = ("learning rates", "rates") if key == "lr" else ("weight decays", "decays")
    return (
        f"the {name} of groups {i} and {j} are {values[i]:.4g} and {values[j]:.4g}, and no longer in the planned "
        f"ratio {ratio:.4g}: something wrote {short} without the {key} multipliers. {fix}"
    )
