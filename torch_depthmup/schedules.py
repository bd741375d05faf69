"""Learning rates of scaled groups: read and written as those of the base model, and checked for being overwritten."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch_depthmup.errors import OptimizerError

__all__ = ["overwritten", "per_group", "set_lr", "unscaled"]

RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lr")
"""What schedulers keep in groups that is a learning rate."""

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
    """The optimizer as a scheduler should see it: with the base model's learning rates in its groups.

    A scheduler made with it writes the base model's rates, floors and warm-up starts; the optimizer's own groups get
    them times their lr multipliers. For schedulers that do not work by ratios, such as
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
    """A group whose learning rates are read and written without its multiplier."""

    def __init__(self, group: dict[str, Any]):
        self.group = group

    def __getitem__(self, key: str) -> Any:
        value = self.group[key]
        return float(value) / self.group["lr_multiplier"] if key in RATES else value

    def __setitem__(self, key: str, value: Any) -> None:
        if key in RATES:
            _write(self.group, key, float(value) * self.group["lr_multiplier"])
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
    groups: Sequence[dict[str, Any]], rates: Sequence[float], one_rate: bool, scheduled: bool
) -> str | None:
    """What is wrong where learning rates are no longer the base model's times their multipliers; None if nothing is.

    Args:
        groups: an optimizer's, with multipliers.
        rates: their learning rates as numbers.
        one_rate: whether all groups were meant to have one and the same rate; then one in all of them says nothing.
        scheduled: whether a scheduler of torch's is attached.
    """
    base = [
        rate / group["lr_multiplier"] / group.get("lr_scale", 1.0) for group, rate in zip(groups, rates, strict=True)
    ]
    first: dict[Any, int] = {}
    for i, group in enumerate(groups):
        j = first.setdefault(group.get("user_group", i), i)
        if abs(base[i] - base[j]) > DRIFT * max(abs(base[i]), abs(base[j])):
            return _told(j, i, groups, rates, scheduled)
    live = [i for i, rate in enumerate(rates) if rate]
    written = [rates[i] / groups[i].get("lr_scale", 1.0) for i in live]
    multipliers = [groups[i]["lr_multiplier"] for i in live]
    if one_rate or not live or max(multipliers) - min(multipliers) <= DRIFT * max(multipliers):
        return None
    if max(written) - min(written) <= SAME * max(written):
        other = next(i for i in live if abs(groups[i]["lr_multiplier"] - multipliers[0]) > DRIFT * multipliers[0])
        return _told(live[0], other, groups, rates, scheduled)
    return None


def _told(i: int, j: int, groups: Sequence[dict[str, Any]], rates: Sequence[float], scheduled: bool) -> str:
    ratio = groups[i]["lr_multiplier"] / groups[j]["lr_multiplier"]
    if scheduled:
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
    return (
        f"the learning rates of groups {i} and {j} are {rates[i]:.4g} and {rates[j]:.4g}, and no longer in the planned "
        f"ratio {ratio:.4g}: something wrote rates without the lr multipliers. {fix}"
    )
