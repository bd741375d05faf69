"""Saved optimizer states: matched by name, or refused with what differs."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import Stack
from optimizers import parametrized, rates, step

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError


def momenta(optimizer: torch.optim.Optimizer, net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: optimizer.state[p]["exp_avg"] for name, p in net.named_parameters()}


def test_state_follows_the_names_into_groups_of_another_order(model: Stack) -> None:
    optimizer = dm.AdamW(model, lr=0.1)
    step(model, optimizer)
    other = copy.deepcopy(model)
    resumed = dm.AdamW(list(other.named_parameters())[::-1], lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    wanted, found = momenta(optimizer, model), momenta(resumed, other)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert rates(resumed, other) == rates(optimizer, model)


def of_blocks() -> torch.optim.Optimizer:
    net = parametrized()
    return dm.AdamW(net.blocks.parameters())


def of_wrapped() -> torch.optim.Optimizer:
    net = parametrized("wrap")
    return dm.AdamW(net)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (lambda: torch.optim.AdamW(parametrized().parameters()), "saved by a plain AdamW"),
        (of_wrapped, "was saved with lr multiplier"),
        (of_blocks, "the saved state does not have"),
    ],
)
def test_a_state_of_another_kind_is_refused_and_changes_nothing(model: Stack, saved, message: str) -> None:
    optimizer = dm.AdamW(model, lr=0.1)
    before = rates(optimizer, model)
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_state_dict(saved().state_dict())
    assert rates(optimizer, model) == before


def test_the_advice_for_a_plain_state_works(model: Stack) -> None:
    plain = torch.optim.AdamW(copy.deepcopy(model).parameters(), lr=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer.load_state_dict(plain.state_dict())
    assert rates(dm.rescale(optimizer, model), model) == rates(dm.AdamW(model, lr=0.1), model)
