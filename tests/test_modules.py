"""dm.Residual and the multiplier that wrapping leaves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import torch_depthmup as dm
from torch_depthmup.scaling.hooks import BranchMultiplier


def branch() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def test_residual_adds_its_branch_to_its_shortcut() -> None:
    x, f, shortcut = torch.randn(3, 8), branch(), nn.Linear(8, 8)
    assert torch.equal(dm.Residual(f)(x), x + f(x))
    assert torch.equal(dm.Residual(f, shortcut)(x), shortcut(x) + f(x))


def test_residual_passes_arguments_on_and_tuples_through() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    value, weights = dm.Residual(attention)(x, memory, memory, need_weights=True)
    wanted, wanted_weights = attention(x, memory, memory)
    assert torch.equal(value, x + wanted) and torch.equal(weights, wanted_weights)


@pytest.mark.parametrize("shortcut", [None, nn.Sequential(nn.Linear(8, 8), nn.Tanh())])
@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_residual_is_scaled_whatever_its_shortcut(shortcut, how: str) -> None:
    model = nn.Sequential(*[dm.Residual(branch(), copy.deepcopy(shortcut)) for _ in range(4)])
    plan = dm.parametrize(model, depth_multiplier=4, example_inputs=torch.randn(3, 8), how=how)
    assert [b.name for b in plan.branches] == [f"{i}.branch" for i in range(4)]
    assert plan.branches[0].skip == ("identity" if shortcut is None else "projection")


@pytest.mark.parametrize("arguments", [(torch.relu,), (branch(), 3)])
def test_what_is_not_a_module_is_refused(arguments) -> None:
    with pytest.raises(TypeError, match="nn.Module"):
        dm.Residual(*arguments)


def wrapped() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(*[dm.Residual(branch()) for _ in range(4)])
    dm.parametrize(model, depth_multiplier=4, example_inputs=torch.randn(3, 8), how="wrap")
    return model


def test_a_wrapped_model_copies_pickles_and_keeps_its_state_dict() -> None:
    model, x = wrapped(), torch.randn(3, 8)
    plain = nn.Sequential(*[dm.Residual(branch()) for _ in range(4)])
    assert list(model.state_dict()) == list(plain.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert dm.plan_of(other) == dm.plan_of(model)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(x), model(x))  # the multiplier is in the module, not in the weights


def test_a_wrapped_model_exports_and_compiles_whole() -> None:
    model, x = wrapped(), torch.randn(3, 8)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x))


def test_the_multiplier_scales_one_element_of_a_tuple() -> None:
    value = (torch.ones(2), None, torch.ones(2))
    changed = BranchMultiplier(0.5, 2)(nn.Identity(), (), value)
    assert changed[0] is value[0] and changed[1] is None and torch.equal(changed[2], torch.full((2,), 0.5))
