"""The constructors take what torch's take, return what torch's return, and scale what the plan says."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
from collections.abc import Callable

import pytest
import torch
from blocks import Stack
from optimizers import X, rates, step
from torch import nn
from torch.optim import lr_scheduler

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError

PARAMS = {
    "the model": lambda model: model,
    "a list": lambda model: list(model.parameters()),
    "pairs": lambda model: model.named_parameters(),
    "groups": lambda model: [{"params": model.parameters()}],
    "another order": lambda model: list(model.parameters())[::-1],
}


@pytest.mark.parametrize("params", PARAMS)
def test_every_way_to_pass_parameters_gives_the_same_rates(model: Stack, params: str) -> None:
    wanted = rates(dm.AdamW(model.parameters(), lr=0.1), model)
    assert wanted["blocks.3.fc1.weight"] == 0.1 and wanted["blocks.3.fc2.weight"] == 0.025
    assert rates(dm.AdamW(PARAMS[params](model), 0.1), model) == wanted


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_the_result_is_torchs_own_class_with_few_groups(model: Stack, name: str) -> None:
    optimizer = getattr(dm, name)(model.parameters(), lr=0.1)
    assert type(optimizer) is getattr(torch.optim, name) and len(optimizer.param_groups) <= 3
    step(model, optimizer)


def test_decoupled_decay_of_adam_is_adamws(model: Stack) -> None:
    adam = dm.Adam(model, lr=0.1, weight_decay=0.2, decoupled_weight_decay=True)
    adamw = dm.AdamW(model, lr=0.1, weight_decay=0.2)
    assert [g["weight_decay"] for g in adam.param_groups] == [g["weight_decay"] for g in adamw.param_groups]


class Keywords(torch.optim.AdamW):
    def __init__(self, params, **rest):
        super().__init__(params, **rest)


class Positional(torch.optim.AdamW):
    def __init__(self, params, *rest, **others):
        super().__init__(params, *rest, **others)


class Fixed(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=lr, weight_decay=0.1, eps=1e-4)


@pytest.mark.parametrize(
    ("cls", "args", "options", "spelled"),
    [
        (Keywords, (), {}, {}),
        (Keywords, (), {"lr": 0.1}, {"lr": 0.1}),
        (Positional, (0.1, (0.8, 0.9)), {"eps": 1e-3}, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}),
        (Fixed, (), {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-4}),
    ],
)
def test_options_that_a_class_fills_in_by_itself_are_scaled(model: Stack, cls, args, options, spelled) -> None:
    found, wanted = dm.optimizer(cls)(model, *args, **options), dm.AdamW(model, **spelled)
    keys = ("lr", "weight_decay", "eps", "betas")
    assert [[g[k] for k in keys] for g in found.param_groups] == [[g[k] for k in keys] for g in wanted.param_groups]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch older than 2.9 has no Muon")
def test_muon_takes_matrices_and_names_what_is_none(model: Stack) -> None:
    with pytest.raises(OptimizerError, match="stem.bias.*dm.AdamW"):
        dm.Muon(model)
    optimizer = dm.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    assert rates(optimizer, model)["blocks.0.fc2.weight"] == 0.025


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.compile": lambda model: torch.compile(copy.deepcopy(model)),
    "inside a parent": lambda model: nn.Sequential(copy.deepcopy(model)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_the_model_train_with_the_plan_too(model: Stack, way: str) -> None:
    wanted, other = rates(dm.AdamW(model, lr=0.1), model), COPIES[way](model)
    found = rates(dm.AdamW(other.parameters(), lr=0.1), other)
    assert {name.removeprefix("_orig_mod.").removeprefix("0."): rate for name, rate in found.items()} == wanted


def test_copies_scale_what_is_added_and_watch_the_rates(model: Stack) -> None:
    optimizer = dm.AdamW(model.stem.parameters(), lr=0.1)
    net, copied = copy.deepcopy((model, optimizer))
    assert type(copied) is torch.optim.AdamW
    copied.add_param_group({"params": list(net.blocks.parameters())})
    assert len(optimizer.param_groups) == 1
    wanted = rates(dm.AdamW(net, lr=0.1), net)
    assert rates(copied, net).items() <= wanted.items() and "blocks.0.fc2.weight" in rates(copied, net)
    step(net, copied)
    for group in copied.param_groups:
        group["lr"] = 0.1
    with pytest.warns(UserWarning, match="no longer in the planned ratio"):
        step(net, copied)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_optimizers_copy_and_pickle(model: Stack, way: str) -> None:
    optimizer = dm.AdamW(model, lr=0.1)
    step(model, optimizer)
    other = COPIES[way](optimizer)
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_optimizers_reload(model: Stack) -> None:
    optimizer = dm.AdamW(model, lr=0.1)
    step(model, optimizer)
    fresh = dm.AdamW(model, lr=0.5)
    fresh.load_state_dict(optimizer.state_dict())
    assert rates(fresh, model) == rates(optimizer, model)


def test_rescale_gives_the_groups_of_the_constructor_and_keeps_state(model: Stack) -> None:
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="a plain AdamW"):
        step(model, optimizer)
    moments = {id(p): state["exp_avg"].clone() for p, state in optimizer.state.items()}
    assert dm.rescale(optimizer, model) is optimizer
    assert rates(optimizer, model) == rates(dm.AdamW(model, lr=0.1), model)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moments[id(p)]) for p in model.parameters())
    step(model, optimizer)


def _scheduled(model: Stack) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    lr_scheduler.StepLR(optimizer, 2)
    return optimizer


def _with_others(other) -> Callable[[Stack], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW([*model.parameters(), *other(model).parameters()])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (dm.AdamW, "scaled already"),
        (_scheduled, "scheduler"),
        (_with_others(lambda model: nn.Linear(2, 2)), "are not parameters of this parametrized model"),
        (_with_others(copy.deepcopy), "are not parameters of this parametrized model"),  # their plan is another's
    ],
)
def test_rescale_refuses_what_it_cannot_do_and_changes_nothing(model: Stack, make, told: str) -> None:
    optimizer = make(model)
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(OptimizerError, match=told):
        dm.rescale(optimizer, model)
    assert optimizer.param_groups == groups


def test_rescale_refuses_a_model_without_a_plan() -> None:
    with pytest.raises(dm.DepthMuPError, match="no plan"):
        dm.rescale(torch.optim.SGD(nn.Linear(2, 2).parameters()), nn.Linear(2, 2))


def test_a_compiled_step_follows_the_plan(model: Stack) -> None:
    reference, copied = copy.deepcopy(model), copy.deepcopy(model)
    for net, compiled in ((reference, False), (copied, True)):
        optimizer = dm.AdamW(net, lr=0.01)
        run = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            run()
    for ours, theirs in zip(copied.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Muon"])
def test_help_and_signature_show_torchs_own_arguments(name: str) -> None:
    ours, torchs = getattr(dm, name), getattr(torch.optim, name)
    own = ["batch_multiplier", "duration_multiplier"] if name == "AdamW" else []
    assert list(inspect.signature(ours).parameters) == [*inspect.signature(torchs).parameters, *own]
    text = pydoc.render_doc(ours, renderer=pydoc.plaintext)
    assert f"{name}(params" in text and "weight_decay" in text and "OptimizerError" in text


def test_a_pickled_optimizer_needs_nothing_of_this_package(model: Stack) -> None:
    optimizer = dm.AdamW(model, lr=0.1)
    step(model, optimizer)
    assert b"torch_depthmup" not in pickle.dumps(optimizer)


def test_constructors_pickle(model: Stack) -> None:
    made = pickle.loads(pickle.dumps(dm.optimizer(torch.optim.NAdam)))(model, lr=0.1)
    assert type(made) is torch.optim.NAdam and pickle.loads(pickle.dumps(dm.AdamW)) is dm.AdamW
