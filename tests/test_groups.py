"""Groups: what the user wrote stays, what the plan scales is scaled, in whatever number type it was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blocks import PreNorm, Stack
from optimizers import rates, step
from torch import nn

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError, PlanError


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


def _foreign(model: Stack) -> list[nn.Parameter]:
    return [*model.parameters(), *nn.Linear(3, 2).parameters()]


NOT_PARAMETERS = {
    "foreign": (
        _foreign,
        OptimizerError,
        r"2 parameters of group 0 belong to no parametrized model: \(2, 3\), \(2,\)",
    ),
    "twice": (
        lambda model: [*model.parameters(), model.stem.weight],
        OptimizerError,
        "stem.weight is listed twice, in group 0",
    ),
    "twice over groups": (
        lambda model: [{"params": [model.stem.weight]}, {"params": [model.stem.weight]}],
        OptimizerError,
        "stem.weight is listed twice, in groups 0 and 1",
    ),
    "a number": (lambda model: [model.stem.weight, 3], TypeError, "one of these is of type int"),
    "another model": (lambda model: nn.Linear(3, 2), OptimizerError, "belong to no parametrized model"),
    "none": (lambda model: [], ValueError, "empty parameter list"),
    "a tensor": (lambda model: model.stem.weight, TypeError, "single tensor"),
}


@pytest.mark.parametrize("case", NOT_PARAMETERS)
def test_what_is_no_list_of_the_models_parameters_is_refused(model: Stack, case: str) -> None:
    params, error, told = NOT_PARAMETERS[case]
    with pytest.raises(error, match=told):
        dm.AdamW(params(model))


def test_unknown_options_are_refused_by_torch(model: Stack) -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        dm.AdamW(model, learning_rate=0.1)


def test_groups_added_later_are_scaled(model: Stack) -> None:
    late = [model.blocks[7].fc1.weight, model.blocks[7].fc2.weight]
    optimizer = dm.AdamW([p for p in model.parameters() if all(p is not q for q in late)], lr=0.1)
    optimizer.add_param_group({"params": late, "lr": 0.4})
    assert rates(optimizer, model)["blocks.7.fc1.weight"] == 0.4
    assert rates(optimizer, model)["blocks.7.fc2.weight"] == 0.1


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (lambda model: [*model.blocks.parameters(), *nn.Linear(2, 2).parameters()], "belong to no parametrized model"),
        (lambda model: [model.stem.weight], "stem.weight is listed twice"),
    ],
)
def test_a_group_that_is_refused_later_leaves_nothing_behind(model: Stack, refused, told: str) -> None:
    optimizer = dm.AdamW(model.stem, lr=0.1)
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(OptimizerError, match=told):
        optimizer.add_param_group({"params": refused(model)})
    assert optimizer.param_groups == groups


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16, np.array, torch.tensor])
def test_numbers_of_every_kind_are_scaled(model: Stack, kind) -> None:
    optimizer = dm.SGD(model, lr=kind(0.5), weight_decay=float(kind(0.5)))
    assert float(rates(optimizer, model)["blocks.0.fc2.weight"]) == 0.125
    decayed = dm.AdamW(model, lr=0.1, weight_decay=kind(0.5) if kind is not torch.tensor else 0.5)
    assert max(float(group["weight_decay"]) for group in decayed.param_groups) == 2.0


def test_a_tensor_rate_is_one_tensor_a_group(model: Stack) -> None:
    optimizer = dm.AdamW(model, lr=torch.tensor(0.1))
    assert len({id(group["lr"]) for group in optimizer.param_groups}) == len(optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"].mul_(0.5)
    assert [float(g["lr"]) / g["lr_multiplier"] for g in optimizer.param_groups] == pytest.approx([0.05] * 3)


def test_initial_rates_of_a_resume_recipe_are_scaled(model: Stack) -> None:
    optimizer = dm.AdamW([{"params": list(model.parameters()), "initial_lr": 0.1}], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0, last_epoch=5)
    assert [g["lr"] / g["lr_multiplier"] for g in optimizer.param_groups] == pytest.approx([0.1] * 3)


def test_parts_of_a_named_group_have_names_of_their_own(model: Stack) -> None:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "name": "decay"},
        {"params": [p for p in model.parameters() if p.ndim < 2], "name": "rest", "weight_decay": 0.0},
    ]
    names = [group["name"] for group in dm.AdamW(groups, lr=0.1).param_groups]
    assert len(set(names)) == len(names) and {"decay", "decay.1", "rest"} <= set(names)


def test_a_replaced_branch_weight_is_refused_and_a_replaced_head_is_not(model: Stack) -> None:
    model.head = nn.Linear(12, 7)
    assert rates(dm.AdamW(model, lr=0.1), model)["head.weight"] == 0.1
    model.blocks[0].fc2 = nn.Linear(24, 12)
    with pytest.raises(PlanError, match="blocks.0.fc2.weight was replaced after dm.parametrize"):
        dm.AdamW(model)


class Reader(Stack):
    """Embeds words and reads them out, with one weight or two."""

    def __init__(self, depth: int, width: int, tied: bool = False):
        super().__init__(depth, PreNorm, width)
        self.stem, self.head = nn.Embedding(20, width), nn.Linear(width, 20, bias=False)
        if tied:
            self.head.weight = self.stem.weight


def readout_takes_the_embedding(model: Stack) -> None:
    model.head.weight = model.stem.weight


def embedding_takes_the_readout(model: Stack) -> None:
    model.stem.weight = model.head.weight


def layers_share_a_weight(model: Stack) -> None:
    model.blocks[2].fc1.weight = model.blocks[0].fc1.weight


def layers_are_one_module(model: Stack) -> None:
    model.blocks[3] = model.blocks[1]


def with_another_model(model: Stack) -> None:
    other = Reader(4, 12)
    dm.parametrize(other, base=Reader(2, 12), example_inputs=torch.arange(20))
    model.blocks[0].fc2.weight = other.blocks[1].fc2.weight = model.blocks[0].fc2.weight
    model.other = [other]  # out of torch's sight, and alive


TIED = [
    readout_takes_the_embedding,
    embedding_takes_the_readout,
    layers_share_a_weight,
    layers_are_one_module,
    with_another_model,
]


@pytest.mark.parametrize(
    "make", [dm.AdamW, lambda model, lr: dm.rescale(torch.optim.SGD(model.parameters(), lr), model)]
)
@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("tie", TIED)
def test_weights_that_are_tied_later_are_refused(tie, how: str, make) -> None:
    model = Reader(4, 24)
    dm.parametrize(model, base=Reader(2, 12), example_inputs=torch.arange(20), how=how)
    tie(model)
    with pytest.raises(PlanError, match="were tied after dm.parametrize.*Tie them first"):
        make(model, lr=0.1)


def test_weights_that_are_tied_first_or_are_not_scaled_are_taken() -> None:
    model = Reader(4, 24, tied=True)
    dm.parametrize(model, base=Reader(2, 12, tied=True), example_inputs=torch.arange(20))
    assert rates(dm.AdamW(model, lr=0.1), model)["stem.weight"] == 0.1
    for depth, tie in ((4, readout_takes_the_embedding), (2, layers_share_the_first_weight)):
        model = Reader(depth, 12)
        dm.parametrize(model, base=Reader(2, 12), example_inputs=torch.arange(20))
        tie(model)
        assert rates(dm.AdamW(model, lr=0.1), model)["stem.weight"] == 0.1


def layers_share_the_first_weight(model: Stack) -> None:
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight


def test_a_folded_weight_that_is_reparametrized_later_is_refused(model: Stack) -> None:
    nn.utils.parametrizations.spectral_norm(model.blocks[0].fc2)
    with pytest.raises(PlanError, match="was reparametrized.*after a multiplier had been folded"):
        dm.AdamW(model)


def test_each_group_may_have_a_family_of_its_own(model: Stack) -> None:
    class Both(torch.optim.AdamW):
        """Stands for Muon with an Adam for the rest in one class."""

    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizer = dm.optimizer(Both)([{"params": matrices}, {"params": rest, "family": "adamw"}], lr=0.1)
    assert rates(optimizer, model) == rates(dm.AdamW(model, lr=0.1), model)
    assert all("family" not in group for group in optimizer.param_groups)
    with pytest.raises(OptimizerError, match="not of the family 'sgd'"):
        dm.optimizer(Both)([{"params": matrices}, {"params": rest, "family": "sgd"}], lr=0.1)
