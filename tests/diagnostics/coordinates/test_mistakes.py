"""A planted mistake is named; a network that is not what the rule takes it for is told from one."""

from __future__ import annotations

import blocks
import pytest
import torch
from canonical import SMALL, Canonical
from torch import nn
from trained import check

import torch_depthmup as dm
from torch_depthmup.diagnostics.coordinates.check import CoordinateCheck, coordinate_check


def by_hand(optimizer: str, multiplier: float, inner: float, outer: float) -> CoordinateCheck:
    """The rule written by hand with explicit multipliers: exponents in depth of m and of the learning rates."""

    def prepare(model: Canonical, base: Canonical) -> None:
        for block in model.blocks:
            block.multiplier = float(len(model.blocks)) ** multiplier

    def make(model: Canonical) -> torch.optim.Optimizer:
        lr, ratio = SMALL[optimizer], float(len(model.blocks))
        groups = [
            {"params": [b.inner.weight for b in model.blocks], "lr": lr * ratio**inner},
            {"params": [b.outer.weight for b in model.blocks], "lr": lr * ratio**outer},
            {"params": [model.stem.weight, model.head.weight], "lr": lr},
        ]
        return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](groups)

    return check("depth-mup-corrected", make, family=optimizer, prepare=prepare, seeds=3)


RIGHT = {"sgd": (-0.5, 0.5, 0.0), "adam": (-0.5, 0.0, -0.5)}


# What is planted: exponents of the branch multiplier, of the inner and of the outer learning rate; and its name.
PLANTED = {
    "multiplier forgotten, adam": ("adam", (0, 0, -0.5), "the branch multiplier is forgotten"),
    "multiplier forgotten, sgd": ("sgd", (0, 0.5, 0), "the branch multiplier is forgotten"),
    "multiplier twice": ("adam", (-1, 0, -0.5), "the branch multiplier is applied twice"),
    "no correction": ("adam", (-0.5, -0.5, -0.5), "the correction of the inner layers' learning rate is missing"),
    "correction twice": ("adam", (-0.5, 0.5, -0.5), "the correction is applied twice"),
    "correction on the outer layer, adam": ("adam", (-0.5, -0.5, 0), "outer layer instead of the inner"),
    "correction on the outer layer, sgd": ("sgd", (-0.5, 0, 0.5), "outer layer instead of the inner"),
    "correction on both": ("adam", (-0.5, 0, 0), "the correction is applied to the outer layer as well"),
    "rule of sgd under adam": ("adam", (-0.5, 0.5, 0), "the learning-rate rule is that of sgd, not adam"),
    "rule of adam under sgd": ("sgd", (-0.5, 0, -0.5), "the learning-rate rule is that of adam, not sgd"),
    "plain torch optimizer": ("adam", (-0.5, 0, 0), "not scaled with depth (a plain torch optimizer)"),
}


@pytest.mark.parametrize("optimizer", RIGHT)
def test_the_rule_written_by_hand_holds(optimizer: str) -> None:
    assert by_hand(optimizer, *RIGHT[optimizer]).verdict == "holds"


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named(name: str) -> None:
    optimizer, exponents, words = PLANTED[name]
    result = by_hand(optimizer, *exponents)
    assert result.verdict == "broken"
    assert result.mistakes[0].startswith("probably") and words in result.mistakes[0]
    assert f"wrong: {result.mistakes[0]}" in str(result)


@pytest.mark.filterwarnings("ignore:a plain")  # that is the mistake
def test_a_plain_optimizer_on_a_folded_model_is_named() -> None:
    result = check(optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-4), family="adam")
    assert result.verdict == "broken" and "a plain torch optimizer" in result.mistakes[0]


@pytest.mark.filterwarnings("ignore:a plain")  # that is the mistake
def test_the_other_familys_multipliers_on_a_folded_model_are_named() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        plan = dm.plan_of(model)
        groups = [
            {"params": [p], "lr": 1e-4 * plan.multipliers(name, "sgd").lr} for name, p in model.named_parameters()
        ]
        return torch.optim.Adam(groups)

    result = check(optimizer=make, family="adam")
    assert result.verdict == "broken" and "that of sgd, not adam" in result.mistakes[0]


def test_a_network_whose_gradients_grow_with_depth_is_told_from_a_wrong_rule() -> None:
    """Post-activation bottlenecks with few channels: the gradient grows towards the input, and SGD follows it."""
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 3, (16,), generator=generator))
    options = {"depths": (2, 4, 8, 16), "steps": 1, "seeds": 2}
    result = coordinate_check(blocks.BottleneckNet, data, optimizer="sgd", lr=1e-4, **options)
    assert result.verdict == "broken"
    assert result.mistakes[0].startswith("probably the network, not the rule")
    assert not coordinate_check(blocks.BottleneckNet, data, optimizer="adam", lr=1e-3, **options).mistakes
