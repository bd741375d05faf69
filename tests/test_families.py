"""Families are measured: the table of classes, and what is refused and why."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from blocks import Stack
from optimizers import difference, parametrized, rates, step

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError
from torch_depthmup.families import measure_family

TABLE: list[tuple[str, dict[str, Any], str]] = [
    ("torch.optim.SGD", {}, "sgd"),
    ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True}, "sgd"),
    ("torch.optim.Adam", {}, "adam"),
    ("torch.optim.Adam", {"amsgrad": True}, "adam"),
    ("torch.optim.Adam", {"decoupled_weight_decay": True}, "adamw"),
    ("torch.optim.AdamW", {}, "adamw"),
    ("torch.optim.NAdam", {}, "adam"),
    ("torch.optim.NAdam", {"decoupled_weight_decay": True}, "adamw"),
    ("torch.optim.Adamax", {}, "adam"),
    ("torch.optim.RMSprop", {"momentum": 0.9, "centered": True}, "adam"),
    ("torch.optim.Adagrad", {}, "adam"),
    ("torch.optim.Muon", {}, "muon"),
    ("torch.optim.Adafactor", {}, "wrap"),
    ("torch.optim.RAdam", {}, "first step grows as gradient"),
    ("torch.optim.Adadelta", {}, "follow the size of eps"),
    ("torch.optim.Adagrad", {"initial_accumulator_value": 0.1}, "grow as gradient"),
    ("torch.optim.SparseAdam", {}, "does not run on a toy"),
    ("timm.optim.Lion", {}, "adamw"),
    ("timm.optim.NAdamW", {}, "adamw"),
    ("timm.optim.SGDW", {}, "sgd"),
    ("timm.optim.Adan", {}, "adamw"),
    ("timm.optim.LaProp", {}, "adamw"),
    ("timm.optim.Adopt", {}, "adam"),
    ("timm.optim.AdamP", {}, "adamw"),
    ("timm.optim.NvNovoGrad", {}, "adamw"),
    ("timm.optim.Mars", {}, "adamw"),
    ("timm.optim.Muon", {}, "muon"),
    ("timm.optim.Lamb", {}, "wrap"),
    ("timm.optim.Lars", {}, "wrap"),
    ("timm.optim.AdaBelief", {"rectify": False}, "wrap"),
    ("timm.optim.MADGRAD", {}, "grow as lr"),
    ("timm.optim.RMSpropTF", {}, "grow as gradient"),
    ("schedulefree.AdamWScheduleFree", {}, "adamw"),
    ("schedulefree.SGDScheduleFree", {}, "sgd"),
    ("lion_pytorch.Lion", {}, "adamw"),
    ("prodigyopt.Prodigy", {}, "different lr values"),
    ("pytorch_optimizer.AdaBelief", {"weight_decouple": False}, "wrap"),
    ("pytorch_optimizer.StableAdamW", {}, "adamw"),
    ("pytorch_optimizer.SOAP", {}, "adamw"),
    ("pytorch_optimizer.AdEMAMix", {}, "adam"),
    ("pytorch_optimizer.Lamb", {}, "wrap"),
    ("pytorch_optimizer.Fromage", {}, "wrap"),
]
"""A class, its options, and its family, ``wrap`` where a folded multiplier cannot be made up for, or why not at all."""

FAMILIES = ("sgd", "adam", "adamw", "muon")


def class_of(path: str) -> type[torch.optim.Optimizer]:
    module, _, name = path.rpartition(".")
    return getattr(pytest.importorskip(module), name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("path", "options", "wanted"), TABLE)
def test_the_table_of_classes(path: str, options: dict[str, Any], wanted: str) -> None:
    cls = class_of(path)

    def measured():
        muon = "Muon" in path
        return measure_family(lambda groups: cls(groups, **options), {}, label=cls.__name__, matrices=muon)

    if wanted in FAMILIES or wanted == "wrap":
        found = measured()
        assert found.family.foldable == (wanted != "wrap"), found.answers
        assert wanted == "wrap" or found.family.name == wanted
        if found.answers.weight > 0.1:  # no width rule is known for steps that follow the weight's size
            assert found.family.width is None
    else:
        with pytest.raises(OptimizerError, match=wanted):
            measured()


CLASSES = [
    ("torch.optim.NAdam", {"eps": 1e-2, "weight_decay": 0.1}),
    ("torch.optim.RMSprop", {"eps": 1e-2, "weight_decay": 0.1}),
    ("torch.optim.Adagrad", {"eps": 1e-2}),
    ("timm.optim.Adan", {"eps": 1e-2, "weight_decay": 0.1}),
    ("lion_pytorch.Lion", {"weight_decay": 0.1}),
    ("schedulefree.AdamWScheduleFree", {"eps": 1e-2, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("path", "options"), CLASSES)
def test_what_is_measured_trains_fold_and_wrap_alike_in_a_network(path: str, options: dict[str, Any]) -> None:
    trained = []
    for how in ("fold", "wrap"):
        net = parametrized(how, torch.float64)
        optimizer = dm.optimizer(class_of(path))(net, lr=0.01, **options)
        getattr(optimizer, "train", lambda: None)()
        for _ in range(6):
            step(net, optimizer)
        trained.append(net)
    # Wrap's eps and decay follow the depth, fold's besides the multiplier; the two are one training.
    assert difference(*trained) < 1e-9


class Trust(torch.optim.Optimizer):
    """A step as long as the weight."""

    def __init__(self, params, lr: float = 0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.norm() * p.grad / p.grad.norm())


@pytest.mark.parametrize("family", [None, "adamw"])
def test_a_step_that_follows_the_weights_size_is_refused_under_fold_and_works_under_wrap(family) -> None:
    with pytest.raises(OptimizerError, match="Trust does not train .*fold and wrap differ by 0.*how='wrap'"):
        dm.optimizer(Trust, family=family)(parametrized())
    net = parametrized("wrap")
    step(net, dm.optimizer(Trust, family=family)(net))


@pytest.mark.parametrize(
    ("cls", "family", "message"),
    [
        (torch.optim.SGD, "adam", "not of the family 'adam'"),
        (torch.optim.AdamW, "sgd", "not of the family 'sgd'"),
        (torch.optim.AdamW, "adam", "decoupled from the gradient"),
        (torch.optim.Adam, "adamw", "a penalty in the gradient"),
        (torch.optim.SGD, "lion", "no optimizer family is called 'lion'"),
    ],
)
def test_a_family_that_is_not_that_of_the_steps_is_refused(model: Stack, cls, family: str, message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        dm.optimizer(cls, family=family)(model, lr=0.1)


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.ASGD, torch.optim.Rprop])
def test_classes_that_fit_no_family_say_why(cls) -> None:
    with pytest.raises(OptimizerError, match=f"{cls.__name__} cannot be scaled: its"):
        dm.optimizer(cls)


def test_a_named_family_is_taken_at_its_word_where_the_class_does_not_run_on_the_toy(model: Stack) -> None:
    optimizer = dm.optimizer(torch.optim.SparseAdam, family="adam")(model, lr=0.1)
    assert rates(optimizer, model)["blocks.3.fc2.weight"] == 0.025


def test_measuring_draws_no_random_numbers_of_the_users(model: Stack) -> None:
    before = torch.random.get_rng_state()
    dm.optimizer(torch.optim.NAdam)(model, lr=0.1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_table_has_many_classes() -> None:
    assert len({path for path, _, _ in TABLE}) >= 25


@pytest.mark.parametrize(
    "other",
    ["adamw", functools.partial(torch.optim.AdamW, fused=True), torch.optim.AdamW([torch.ones(1)])],
    ids=["a name", "with options", "one that exists"],
)
def test_what_is_no_class_is_refused_with_what_to_write(other) -> None:
    with pytest.raises(
        OptimizerError, match=f"this is a {type(other).__name__}. Options are given to what dm.optimizer"
    ):
        dm.optimizer(other)
