"""AdamW for another batch size and another length of training."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from blocks import PreNorm, Stack
from torch import nn

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError

WRITTEN = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Stack(4, PreNorm)
    dm.parametrize(model, depth_multiplier=4, example_inputs=torch.randn(4, 8))
    return model


@pytest.mark.parametrize(
    ("batch", "duration", "ratio"), [(4, 1, 4.0), (1, 4, 0.25), (8, 2, 4.0), (0.5, 1, 0.5), (3, 3, 1.0)]
)
def test_every_group_has_the_published_factors_besides_the_plans(model, batch, duration, ratio) -> None:
    plain = dm.AdamW(model, **WRITTEN)
    made = dm.AdamW(model, batch_multiplier=batch, duration_multiplier=duration, **WRITTEN)
    assert len(made.param_groups) == len(plain.param_groups) > 1
    for ours, theirs in zip(made.param_groups, plain.param_groups, strict=True):
        for key, factor in (("lr", ratio**0.5), ("weight_decay", ratio**0.5), ("eps", ratio**-0.5)):
            assert ours[key] == pytest.approx(factor * theirs[key])
            assert ours[f"{key}_multiplier"] == pytest.approx(factor * theirs[f"{key}_multiplier"])
        assert [1 - beta for beta in ours["betas"]] == pytest.approx([ratio * 0.1, ratio * 0.01])


def test_decay_takes_as_much_off_the_weights_over_the_run(model) -> None:
    """Steps times learning rate times decay, whatever the batch size and the duration."""
    plain = dm.AdamW(model, **WRITTEN).param_groups[0]
    made = dm.AdamW(model, batch_multiplier=2, duration_multiplier=5, **WRITTEN).param_groups[0]
    steps = 5 / 2
    assert made["lr"] * made["weight_decay"] * steps == pytest.approx(plain["lr"] * plain["weight_decay"])


def test_groups_with_options_of_their_own_and_groups_added_later_follow(model) -> None:
    names = dict(model.named_parameters())
    first, second, *rest = names.values()
    groups = [{"params": [first], "betas": (0.8, 0.9)}, {"params": [second], "lr": 1.0}]
    made = dm.AdamW(groups, batch_multiplier=4, **WRITTEN)
    assert made.param_groups[0]["betas"] == pytest.approx((0.2, 0.6))
    made.add_param_group({"params": rest[:1]})
    copied = copy.deepcopy(made)
    copied.add_param_group({"params": rest[1:2]})
    for group in made.param_groups[1:] + copied.param_groups[3:]:
        assert group["betas"] == pytest.approx((0.6, 0.96))
    unscaled = dm.AdamW(model, **WRITTEN)
    by_tensor = {id(p): group["lr"] for group in unscaled.param_groups for p in group["params"]}
    assert made.param_groups[2]["lr"] == pytest.approx(2 * by_tensor[id(rest[0])])
    assert pickle.loads(pickle.dumps(made)).param_groups[0]["lr"] == made.param_groups[0]["lr"]


def test_a_rate_that_is_set_later_is_that_of_the_tuned_run(model) -> None:
    made = dm.AdamW(model, batch_multiplier=4, **WRITTEN)
    before = [group["lr"] for group in made.param_groups]
    dm.set_lr(made, 0.02)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([2 * lr for lr in before])


@pytest.mark.parametrize("multiplier", [0, -1, math.inf, math.nan, "4", True, None])
@pytest.mark.parametrize("name", ["batch_multiplier", "duration_multiplier"])
def test_what_is_no_multiplier_is_refused(model, name, multiplier) -> None:
    with pytest.raises(OptimizerError, match=name):
        dm.AdamW(model, lr=0.1, **{name: multiplier})


def test_moments_cannot_forget_more_than_all(model) -> None:
    with pytest.raises(OptimizerError, match="allow at most 10. Take a smaller batch, or larger betas"):
        dm.AdamW(model, lr=0.1, batch_multiplier=16)
    assert dm.AdamW(model, lr=0.1, batch_multiplier=9.9).param_groups[0]["betas"][0] == pytest.approx(0.01)
    dm.AdamW(model, lr=0.1, betas=(0.95, 0.99), batch_multiplier=16)
