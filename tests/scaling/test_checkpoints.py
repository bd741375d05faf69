"""Checkpoints of folded and wrapped models: told apart, converted, refused by name; the keys stay as they are."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from blocks import PreNorm, Stack
from optimizers import X, difference, parametrized, step
from torch import nn

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError, PlanError

HOW = [("fold", "wrap"), ("wrap", "fold")]


def trained(how: str) -> Stack:
    model = parametrized(how)
    step(model, dm.AdamW(model, lr=0.01))
    return model


def through_a_file(state_dict):
    saved = io.BytesIO()
    torch.save(state_dict, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=True)


@pytest.mark.parametrize("saved", [lambda s: s, through_a_file, copy.deepcopy])
@pytest.mark.parametrize(("one", "other"), HOW)
def test_a_checkpoint_of_the_other_way_is_refused_and_the_advice_works(one: str, other: str, saved) -> None:
    source, model = trained(one), parametrized(other)
    state_dict, before = saved(source.state_dict()), copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=re.escape("blocks.0.fc2.weight contains a multiplier of")):
        model.load_state_dict(state_dict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict(dm.convert_state_dict(state_dict, model))
    assert difference(model, source) < 1e-6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
@pytest.mark.parametrize(("one", "other"), HOW)
def test_copies_compare_what_they_load_too(one: str, other: str, copied) -> None:
    model = copied(parametrized(other))
    dm.plan_of(model)
    with pytest.raises(PlanError, match="dm.convert_state_dict"):
        model.load_state_dict(trained(one).state_dict())


@pytest.mark.parametrize(("one", "other"), HOW)
def test_inside_a_parent_and_under_a_compiler_too(one: str, other: str) -> None:
    source, parent = nn.ModuleDict({"net": trained(one)}), nn.ModuleDict({"net": parametrized(other)})
    with pytest.raises(PlanError, match="dm.convert_state_dict"):
        parent.load_state_dict(source.state_dict())
    parent.load_state_dict(dm.convert_state_dict(source.state_dict(), parent))
    assert difference(parent["net"], source["net"]) < 1e-6
    compiled = torch.compile(parametrized(other))
    with pytest.raises(PlanError, match="dm.convert_state_dict"):
        compiled.load_state_dict(torch.compile(trained(one)).state_dict())
    compiled.load_state_dict(dm.convert_state_dict(torch.compile(source["net"]).state_dict(), compiled))
    assert difference(compiled._orig_mod, source["net"]) < 1e-6


@pytest.mark.parametrize(("one", "other"), HOW)
def test_a_checkpoint_without_a_note_is_converted_by_its_plan(one: str, other: str) -> None:
    source, model = trained(one), parametrized(other)
    bare = dict(source.state_dict())
    with pytest.raises(PlanError, match="does not say which multipliers"):
        dm.convert_state_dict(bare, model)
    model.load_state_dict(dm.convert_state_dict(bare, model, dm.Plan.from_json(dm.plan_of(source).to_json())))
    assert difference(model, source) < 1e-6


@pytest.mark.parametrize("load", [nn.Module.load_state_dict, lambda model, s: dm.convert_state_dict(s, model)])
@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_another_base_is_refused(how: str, load) -> None:
    model = Stack(8, PreNorm)
    dm.parametrize(model, depth_multiplier=2, example_inputs=X, how=how)
    with pytest.raises(PlanError, match="blocks.0.* had the multiplier 0.5 .*another base or rule"):
        load(model, trained(how).state_dict())


@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_the_same_way_loads_and_keys_are_those_of_the_plain_model(how: str) -> None:
    source, model, plain = trained(how), parametrized(how), Stack(8, PreNorm)
    assert list(source.state_dict()) == list(plain.state_dict())
    model.load_state_dict(through_a_file(source.state_dict()))
    assert difference(model, source) == 0
    plain.load_state_dict(source.state_dict())
    assert (difference(plain, source) == 0) == (how == "fold")
    assert "torch_depthmup" not in plain.state_dict()._metadata[""]


def _base() -> Stack:
    base = Stack(2, PreNorm)
    dm.parametrize(base, depth_multiplier=1, example_inputs=X)
    return base


def _undone() -> Stack:
    model = parametrized()
    dm.undo(model)
    return model


@pytest.mark.parametrize("make", [_base, _undone, lambda: dm.bake(parametrized("wrap"))])
def test_models_without_multipliers_note_nothing(make) -> None:
    assert "torch_depthmup" not in make().state_dict()._metadata[""]


def test_moments_of_the_other_way_are_refused_by_name() -> None:
    folded, wrapped = parametrized("fold"), parametrized("wrap")
    optimizer = dm.AdamW(folded, lr=0.01)
    step(folded, optimizer)
    with pytest.raises(OptimizerError, match="blocks.0.*another base, rule, or how"):
        dm.AdamW(wrapped, lr=0.01).load_state_dict(optimizer.state_dict())
