"""Which live modules have which plan: copies, pickles with and without the package, parents and children."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import PreNorm, Stack
from optimizers import X, parametrized, rates
from torch import nn

import torch_depthmup as dm
from torch_depthmup.errors import PlanError


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4)


def test_a_folded_model_loads_where_the_package_is_not_installed(tmp_path: Path) -> None:
    model, x = encoder().eval(), torch.randn(1, 3, 16)
    dm.parametrize(model, depth_multiplier=4, example_inputs=x)
    optimizer = dm.AdamW(model, lr=0.1)
    torch.save((model, optimizer, x, model(x)), tmp_path / "saved.pt")
    program = (
        "import sys; sys.modules['torch_depthmup'] = None; import torch;"
        f"model, _, x, y = torch.load({str(tmp_path / 'saved.pt')!r}, weights_only=False);"
        "print(torch.equal(model(x), y))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr


def test_a_folded_model_loads_with_weights_only_where_its_own_classes_are_allowed() -> None:
    model = nn.Sequential(*[dm.Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))) for _ in range(4)])
    dm.parametrize(model, depth_multiplier=4, example_inputs=torch.randn(2, 4))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    with torch.serialization.safe_globals([*{type(module) for module in model.modules()}]):
        assert dm.plan_of(torch.load(saved)) == dm.plan_of(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_a_copys_parameters_are_found_without_naming_the_copy(model: Stack, copied) -> None:
    other = copied(model)
    assert rates(dm.AdamW(list(other.parameters()), lr=0.1), other) == rates(dm.AdamW(model, lr=0.1), model)


@pytest.mark.parametrize("inner", [lambda parent: parent[0], lambda parent: parent[0].blocks[0]])
def test_parent_and_child_are_not_scaled_both(inner) -> None:
    parent = nn.Sequential(Stack(8, PreNorm))
    dm.parametrize(parent, depth_multiplier=4, example_inputs=X)
    before = copy.deepcopy(parent.state_dict())
    with pytest.raises(PlanError, match="was scaled already"):
        dm.parametrize(inner(parent), depth_multiplier=1, example_inputs=X)
    assert all(torch.equal(parent.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(PlanError, match="parametrized before"):
        dm.parametrize(nn.Sequential(parent), depth_multiplier=4, example_inputs=X)


def test_assigned_and_moved_parameters_keep_their_plan() -> None:
    model = parametrized()
    wanted = rates(dm.AdamW(model, lr=0.1), model)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert rates(dm.AdamW(model, lr=0.1), model) == wanted
    model.to_empty(device="cpu")
    assert rates(dm.AdamW(model, lr=0.1), model) == wanted
