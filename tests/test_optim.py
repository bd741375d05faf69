"""The constructors take what torch's take, return what torch's return, and scale what the plan says."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from blocks import PreNorm, Stack
from torch import nn
from torch.optim import lr_scheduler

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Stack:
    """Ratio 4, m = 1/2: AdamW multiplies inner by 1 (eps by 1/2), carriers by 1/4."""
    net = Stack(8, PreNorm)
    dm.parametrize(net, depth_multiplier=4, example_inputs=X)
    return net


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def test_every_way_to_pass_parameters_gives_the_same_rates(model: Stack) -> None:
    wanted = rates(dm.AdamW(model.parameters(), lr=0.1), model)
    assert wanted["blocks.3.fc1.weight"] == 0.1 and wanted["blocks.3.fc2.weight"] == 0.025
    for params in (model, list(model.parameters()), model.named_parameters(), [{"params": model.parameters()}]):
        assert rates(dm.AdamW(params, 0.1), model) == wanted
    reversed_order = rates(dm.AdamW(list(model.parameters())[::-1], lr=0.1), model)
    assert reversed_order == wanted


def test_the_result_is_torchs_own_class_with_few_groups(model: Stack) -> None:
    for make, cls in ((dm.SGD, torch.optim.SGD), (dm.Adam, torch.optim.Adam), (dm.AdamW, torch.optim.AdamW)):
        optimizer = make(model.parameters(), lr=0.1)
        assert type(optimizer) is cls and len(optimizer.param_groups) <= 3
        step(model, optimizer)


def test_group_options_override_and_stay_with_their_group(model: Stack) -> None:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": decayed, "weight_decay": 0.4},
        {"params": plain, "lr": 0.2, "weight_decay": 0.0, "tag": "plain"},
    ]
    optimizer = dm.AdamW(groups, lr=0.1)
    found = rates(optimizer, model)
    assert found["blocks.0.fc2.weight"] == 0.025 and found["blocks.0.fc2.bias"] == 0.05
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert by_id[id(model.blocks[0].fc2.weight)]["weight_decay"] == pytest.approx(1.6)
    assert by_id[id(model.blocks[0].fc2.bias)]["tag"] == "plain"
    assert len(groups[0]) == 2 and len(groups[0]["params"]) == len(decayed)


def test_names_stay_in_the_groups(model: Stack) -> None:
    optimizer = dm.SGD(model.named_parameters(), lr=0.1)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_tensor_rates_get_tensors_of_their_own(model: Stack) -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = dm.AdamW(model, lr=lr, capturable=False, foreach=False)
    values = [group["lr"] for group in optimizer.param_groups]
    assert sorted(float(v) for v in values) == pytest.approx([0.025, 0.1, 0.1])
    assert all(v.dtype == torch.float64 for v in values) and float(lr) == 0.1
    step(model, optimizer)


def test_decoupled_decay_of_adam_is_adamws(model: Stack) -> None:
    adam = dm.Adam(model, lr=0.1, weight_decay=0.2, decoupled_weight_decay=True)
    adamw = dm.AdamW(model, lr=0.1, weight_decay=0.2)
    assert [g["weight_decay"] for g in adam.param_groups] == [g["weight_decay"] for g in adamw.param_groups]


def test_other_classes_by_family_and_unknown_ones_refused(model: Stack) -> None:
    class Lion(torch.optim.SGD):
        """A stand-in for an optimizer that torch does not have."""

    assert type(dm.optimizer(Lion, family="adamw")(model, lr=0.1)) is Lion

    class Own(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})

    with pytest.raises(OptimizerError, match="family of Own is not known.*'adamw'"):
        dm.optimizer(Own)
    assert rates(dm.optimizer(Own, family="adam")(model), model)["blocks.1.fc2.bias"] == 0.025
    with pytest.raises(OptimizerError, match="no optimizer family is called 'lion'"):
        dm.optimizer(Own, family="lion")
    for cls in (torch.optim.RAdam, torch.optim.LBFGS, torch.optim.Adadelta, torch.optim.ASGD):
        with pytest.raises(OptimizerError, match="cannot be scaled"):
            dm.optimizer(cls, family="adam")
    with pytest.raises(OptimizerError, match="how='wrap'"):
        dm.optimizer(torch.optim.Adafactor)(model)


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


def test_unknown_and_repeated_parameters_are_refused(model: Stack) -> None:
    extra = nn.Linear(3, 2)
    with pytest.raises(
        OptimizerError, match=r"2 parameters of group 0 belong to no parametrized model: \(2, 3\), \(2,\)"
    ):
        dm.AdamW([*model.parameters(), *extra.parameters()])
    with pytest.raises(OptimizerError, match="stem.weight is listed twice, in group 0"):
        dm.AdamW([*model.parameters(), model.stem.weight])
    with pytest.raises(OptimizerError, match="stem.weight is listed twice, in groups 0 and 1"):
        dm.AdamW([{"params": [model.stem.weight]}, {"params": [model.stem.weight]}])
    with pytest.raises(TypeError, match="one of these is of type int"):
        dm.AdamW([model.stem.weight, 3])
    with pytest.raises(OptimizerError, match="belong to no parametrized model"):
        dm.AdamW(extra)
    with pytest.raises(ValueError, match="empty parameter list"):
        dm.AdamW([])
    with pytest.raises(TypeError, match="single tensor"):
        dm.AdamW(model.stem.weight)
    with pytest.raises(TypeError, match="learning_rate"):
        dm.AdamW(model, learning_rate=0.1)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch older than 2.9 has no Muon")
def test_muon_takes_matrices_and_names_what_is_none(model: Stack) -> None:
    with pytest.raises(OptimizerError, match="stem.bias.*dm.AdamW"):
        dm.Muon(model)
    optimizer = dm.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    assert rates(optimizer, model)["blocks.0.fc2.weight"] == 0.025


def test_copies_of_the_model_train_with_the_plan_too(model: Stack) -> None:
    wanted = rates(dm.AdamW(model, lr=0.1), model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.compile(copy.deepcopy(model))):
        inner = getattr(other, "_orig_mod", other)
        assert rates(dm.AdamW(other.parameters(), lr=0.1), inner) == wanted
    parent = nn.Sequential(copy.deepcopy(model))
    assert set(rates(dm.AdamW(parent, lr=0.1), parent).values()) == set(wanted.values())


def test_groups_added_later_are_scaled_or_refused(model: Stack) -> None:
    late = [model.blocks[7].fc1.weight, model.blocks[7].fc2.weight]
    optimizer = dm.AdamW([p for p in model.parameters() if all(p is not q for q in late)], lr=0.1)
    optimizer.add_param_group({"params": late, "lr": 0.4})
    assert rates(optimizer, model)["blocks.7.fc1.weight"] == 0.4
    assert rates(optimizer, model)["blocks.7.fc2.weight"] == 0.1
    groups = [dict(group) for group in optimizer.param_groups]
    for refused in ([*late, *nn.Linear(2, 2).parameters()], late):
        with pytest.raises(OptimizerError, match="belong to no parametrized model|listed twice"):
            optimizer.add_param_group({"params": refused})
    assert optimizer.param_groups == groups, "what is refused leaves nothing behind"


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("name", sorted(COPIES))
def test_copies_scale_what_is_added_and_watch_the_rates(model: Stack, name: str) -> None:
    optimizer = dm.AdamW(model.stem.parameters(), lr=0.1)
    net, copied = COPIES[name]((model, optimizer))
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


def test_optimizers_copy_pickle_and_reload(model: Stack) -> None:
    optimizer = dm.AdamW(model, lr=0.1)
    step(model, optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    fresh = dm.AdamW(model, lr=0.5)
    fresh.load_state_dict(optimizer.state_dict())
    assert rates(fresh, model) == rates(optimizer, model)


# Schedulers


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
    assert len(told) == 1 and "max_lr=dm.per_group" in told[0]


def test_per_group_asks_for_a_scaled_optimizer(model: Stack) -> None:
    with pytest.raises(OptimizerError, match="dm.rescale"):
        dm.per_group(torch.optim.SGD(model.parameters(), lr=0.1), 0.1)


# rescale


def test_rescale_gives_the_groups_of_the_constructor_and_keeps_state(model: Stack) -> None:
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    step(model, optimizer)
    moments = {id(p): state["exp_avg"].clone() for p, state in optimizer.state.items()}
    assert dm.rescale(optimizer, model) is optimizer
    assert rates(optimizer, model) == rates(dm.AdamW(model, lr=0.1), model)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moments[id(p)]) for p in model.parameters())
    step(model, optimizer)


def test_rescale_refuses_what_it_cannot_do_and_changes_nothing(model: Stack) -> None:
    with pytest.raises(OptimizerError, match="scaled already"):
        dm.rescale(dm.AdamW(model), model)
    scheduled = torch.optim.AdamW(model.parameters())
    lr_scheduler.StepLR(scheduled, 2)
    with pytest.raises(OptimizerError, match="scheduler"):
        dm.rescale(scheduled, model)
    for other in (nn.Linear(2, 2), copy.deepcopy(model)):  # without a plan, and with one that is not this model's
        foreign = torch.optim.AdamW([*model.parameters(), *other.parameters()])
        with pytest.raises(OptimizerError, match="are not parameters of this parametrized model"):
            dm.rescale(foreign, model)
        assert len(foreign.param_groups) == 1 and "lr_multiplier" not in foreign.param_groups[0]
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


def test_an_accumulator_that_does_not_start_at_zero_is_refused(model: Stack) -> None:
    adagrad = dm.optimizer(torch.optim.Adagrad, family="adam")
    assert rates(adagrad(model, lr=0.1), model)["blocks.3.fc2.weight"] == 0.025
    with pytest.raises(OptimizerError, match="leave it at 0"):
        adagrad(model, lr=0.1, initial_accumulator_value=0.1)
