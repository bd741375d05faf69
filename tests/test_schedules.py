"""Schedulers and loops: rates stay the base model's times their multipliers, or a warning names the fix."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from blocks import Stack
from optimizers import backward, rates, step
from torch.optim import lr_scheduler

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError

RATIOS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (i + 1)),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "one-cycle, per group": lambda o: lr_scheduler.OneCycleLR(o, max_lr=dm.per_group(o, 0.1), total_steps=9),
    "cyclic, per group": lambda o: lr_scheduler.CyclicLR(
        o, dm.per_group(o, 0.01), dm.per_group(o, 0.1), step_size_up=3, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("name", sorted(RATIOS))
def test_schedulers_that_work_by_ratios_keep_them_without_a_word(model: Stack, name: str) -> None:
    optimizer = dm.AdamW(model, lr=0.1)
    scheduler = RATIOS[name](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(6):
            step(model, optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SequentialLR's own
                scheduler.step()
            found = rates(optimizer, model)
            assert found["blocks.0.fc2.weight"] == pytest.approx(found["blocks.0.fc1.weight"] / 4)


OVERWRITE = {
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    "cosine with a floor": lambda o: lr_scheduler.CosineAnnealingLR(o, 9, eta_min=0.05),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
}


@pytest.mark.parametrize("name", sorted(OVERWRITE))
def test_schedulers_that_overwrite_the_rates_are_reported_once(model: Stack, name: str) -> None:
    optimizer = dm.AdamW(model, lr=0.1)
    scheduler = OVERWRITE[name](optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            step(model, optimizer)
            scheduler.step()
    told = [str(warning.message) for warning in caught if "planned ratio" in str(warning.message)]
    assert len(told) == 1 and "dm.unscaled(optimizer)" in told[0]


def test_per_group_asks_for_a_scaled_optimizer(model: Stack) -> None:
    with pytest.raises(OptimizerError, match="dm.rescale"):
        dm.per_group(torch.optim.SGD(model.parameters(), lr=0.1), 0.1)


LATE = {
    **OVERWRITE,
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=0.08),
    "one after the other": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 9, eta_min=0.05)],
        milestones=[2],
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The epoch parameter", "ignore:Detected call")
@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("name", sorted(LATE))
def test_a_scheduler_over_the_unscaled_view_writes_the_base_models_rates(model: Stack, name: str, kind) -> None:
    optimizer, plain = dm.AdamW(model, lr=kind(0.1)), torch.optim.AdamW(copy.deepcopy(model).parameters(), lr=0.1)
    scheduler, wanted = LATE[name](dm.unscaled(optimizer)), LATE[name](plain)
    for _ in range(6):
        step(model, optimizer)
        plain.step()
        for one in (scheduler, wanted):
            one.step(*([1.0] if name == "plateau" else []))
        base = plain.param_groups[0]["lr"]
        found = [float(group["lr"]) / group["lr_multiplier"] for group in optimizer.param_groups]
        assert found == pytest.approx([base] * len(found), rel=1e-5)


def test_set_lr_writes_every_group_and_keeps_tensors(model: Stack) -> None:
    optimizer = dm.AdamW(model, lr=torch.tensor(0.1))
    tensors = [group["lr"] for group in optimizer.param_groups]
    dm.set_lr(optimizer, 0.4)
    assert rates(optimizer, model)["blocks.0.fc2.weight"] == pytest.approx(0.1)
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))
    with pytest.raises(OptimizerError, match="dm.rescale"):
        dm.set_lr(torch.optim.SGD(model.parameters(), lr=0.1), 0.1)


def by_kind(net: Stack) -> list[dict]:
    branches = [(n, p) for n, p in net.blocks.named_parameters()]
    return [
        {"params": list(net.stem.parameters()) + list(net.head.parameters())},
        {"params": [p for n, p in branches if "fc2" in n]},
        {"params": [p for n, p in branches if "fc2" not in n]},
    ]


WRITTEN: dict[str, Callable[[Stack], torch.optim.Optimizer]] = {
    "one group": lambda net: dm.AdamW(net, lr=0.1),
    "a tensor": lambda net: dm.AdamW(net, lr=torch.tensor(0.1)),
    "decay and no decay": lambda net: dm.AdamW(
        [
            {"params": [p for p in net.parameters() if p.ndim > 1]},
            {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.1,
    ),
    "a group for each parameter": lambda net: dm.AdamW([{"params": [p]} for p in net.parameters()], lr=0.1),
    "groups by kind": lambda net: dm.AdamW(by_kind(net), lr=0.1),
    "layer decay": lambda net: dm.AdamW(
        [{"params": [p], "lr_scale": 0.9**i} for i, p in enumerate(net.parameters())], lr=0.1
    ),
    "a copy": lambda net: copy.deepcopy(dm.AdamW(net, lr=0.1)),
}


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_loop_that_writes_one_rate_is_told_of_set_lr_once(model: Stack, name: str, late: int) -> None:
    optimizer = WRITTEN[name](model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(4):
            backward(model)
            for group in optimizer.param_groups if i >= late else ():
                value = 0.1 * 0.9**i * group.get("lr_scale", 1.0)
                group["lr"] = torch.tensor(value) if name == "a tensor" else value
            optimizer.step()
    assert ["dm.set_lr" in str(w.message) for w in caught] == [True]


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_loop_with_set_lr_is_told_nothing(model: Stack, name: str) -> None:
    optimizer = WRITTEN[name](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(4):
            dm.set_lr(optimizer, 0.1 * 0.9**i)
            step(model, optimizer)


def test_a_pickled_optimizer_is_watched_too(model: Stack) -> None:
    net, optimizer = pickle.loads(pickle.dumps((model, dm.AdamW(model, lr=0.1))))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    with pytest.warns(UserWarning, match="no longer in the planned ratio"):
        step(net, optimizer)


def decayed(model: Stack) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not; of the matrices, inner and outer ones have different multipliers."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    return dm.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.1, weight_decay=0.04)


def one_decay_for_all_that_decay(groups, i: int) -> None:
    for group in groups:
        if group["weight_decay"] > 0:
            group["weight_decay"] = 0.04 + 0.1 * i


def the_first_group_only(groups, i: int) -> None:
    groups[0]["weight_decay"] = 0.04 + 0.1 * (i + 1)


def by_a_list_of_the_users(groups, i: int) -> None:
    for group, decay in zip(groups, [0.05] * len(groups), strict=True):
        group["weight_decay"] = decay


def by_a_factor(groups, i: int) -> None:
    for group in groups:
        group["weight_decay"] *= 1.1


def over_the_rate(groups, i: int) -> None:
    """Decay that does not follow the learning rate: lr * decay is the same everywhere."""
    for group in groups:
        if group["weight_decay"] > 0:
            group["weight_decay"] = 1e-3 / group["lr"]


def none_at_all(groups, i: int) -> None:
    for group in groups[1:]:
        group["weight_decay"] = 0.0


@pytest.mark.parametrize("write", [one_decay_for_all_that_decay, the_first_group_only, by_a_list_of_the_users])
def test_a_decay_that_is_written_without_multipliers_is_told_once(model: Stack, write) -> None:
    optimizer = decayed(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(4):
            write(optimizer.param_groups, i)
            step(model, optimizer)
    assert ["weight decays" in str(w.message) and "dm.unscaled(optimizer)" in str(w.message) for w in caught] == [True]


@pytest.mark.parametrize("write", [by_a_factor, over_the_rate, none_at_all])
def test_a_decay_that_keeps_its_ratios_is_told_nothing(model: Stack, write) -> None:
    optimizer = decayed(model)
    for i in range(4):
        write(optimizer.param_groups, i)
        step(model, optimizer)  # warnings are errors


def test_a_decay_that_is_written_into_the_unscaled_groups_is_the_base_models(model: Stack) -> None:
    optimizer = decayed(model)
    for i in range(3):
        one_decay_for_all_that_decay(dm.unscaled(optimizer).param_groups, i)
        step(model, optimizer)  # warnings are errors
        found = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
        decay = 0.04 + 0.1 * i
        assert found["stem.weight"] == pytest.approx(decay) and found["stem.bias"] == 0
        assert found["blocks.0.fc2.weight"] == pytest.approx(4 * decay)
