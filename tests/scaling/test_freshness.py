"""A model that was trained or loaded before it is parametrized is told so; a fresh one is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from blocks import PreNorm, Stack
from optimizers import X, parametrized, step
from torch import nn

import torch_depthmup as dm


class BatchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.n(self.a(x))))


def test_a_checkpoint_before_parametrize_is_told() -> None:
    trained = parametrized()
    step(trained, dm.AdamW(trained, lr=0.1))
    fresh = Stack(8, PreNorm)
    fresh.load_state_dict(trained.state_dict())
    with pytest.warns(UserWarning, match="looks trained or loaded: the gains of blocks.0.norm differ"):
        dm.parametrize(fresh, depth_multiplier=4, example_inputs=X)


def test_counted_batches_are_told() -> None:
    model = nn.Sequential(*[BatchNormed() for _ in range(4)])
    for _ in range(20):
        model(X)
    with pytest.warns(UserWarning, match="0.n has counted 20 batches"):
        dm.parametrize(model, depth_multiplier=4, example_inputs=X)


def test_fresh_models_and_bases_are_told_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parametrized()
        trained = Stack(4, PreNorm)
        nn.init.normal_(trained.blocks[0].norm.weight)
        dm.parametrize(trained, depth_multiplier=1, example_inputs=X)


class Bare(nn.Module):
    """A block without norms."""

    def __init__(self, biases: bool, normal: bool):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32, bias=biases), nn.Linear(32, 32, bias=biases)
        for layer in (self.a, self.b) if normal else ():
            nn.init.normal_(layer.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(x)))


def bare(biases: bool, normal: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), *[Bare(biases, normal) for _ in range(8)], nn.Linear(32, 4))


@pytest.mark.parametrize(("biases", "normal"), [(True, False), (False, False), (False, True)])
def test_training_is_told_from_weights_alone(biases: bool, normal: bool) -> None:
    model = bare(biases, normal)
    dm.parametrize(model, depth_multiplier=4, example_inputs=X)  # fresh, and told nothing: warnings are errors here
    optimizer = dm.AdamW(model, lr=3e-3)
    x, y = torch.randn(64, 8), torch.arange(64) % 4
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    resumed = bare(biases, normal)
    resumed.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="looks trained or loaded: the largest singular value of"):
        dm.parametrize(resumed, depth_multiplier=4, example_inputs=X)


def _apply_an_init(model: Stack) -> None:
    model.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear) else None)


def _reset_every_layer(model: Stack) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()


def _write_one_weight(model: Stack) -> None:
    with torch.no_grad():
        model.blocks[0].fc2.weight.copy_(torch.randn_like(model.blocks[0].fc2.weight))


@pytest.mark.parametrize("again", [_apply_an_init, _reset_every_layer, _write_one_weight])
@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_a_weight_that_is_initialized_after_folding_is_told(how: str, again) -> None:
    model = parametrized(how)
    again(model)
    if how == "wrap":  # the multiplier is on the module
        dm.AdamW(model)
        return
    with pytest.warns(UserWarning, match="blocks.0.fc2.weight was written to after dm.parametrize"):
        dm.AdamW(model)
    dm.AdamW(model)  # told once


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_checkpoint_of_another_way_is_told_by_its_sizes_too(how: str, trained: bool) -> None:
    other = Stack(8, PreNorm) if how == "fold" else parametrized("fold")
    if trained:
        step(other, torch.optim.SGD(other.parameters(), lr=1e-3) if how == "fold" else dm.SGD(other, lr=1e-3))
    model = parametrized(how)
    model.load_state_dict(dict(other.state_dict()))
    with pytest.warns(UserWarning, match="blocks.0.fc2.weight was loaded with values of a model whose multipliers"):
        dm.AdamW(model)


def test_values_of_another_process_are_told_nothing() -> None:
    """DDP writes the first process's values, which were scaled as well, into the others' modules."""
    model, first = parametrized(), Stack(8, PreNorm)
    dm.parametrize(first, depth_multiplier=4, example_inputs=X)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), first.parameters(), strict=True):
            mine.copy_(theirs)
    dm.AdamW(model)


@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_a_checkpoint_of_the_same_run_is_told_nothing(how: str) -> None:
    trained = parametrized(how)
    step(trained, dm.AdamW(trained, lr=0.1))
    model = parametrized(how)
    model.load_state_dict(dict(trained.state_dict()))
    optimizer = dm.AdamW(model, lr=0.1)
    step(model, optimizer)
    dm.AdamW(model, lr=0.1)  # after training
