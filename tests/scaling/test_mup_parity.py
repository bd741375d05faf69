"""At depth ratio 1 our groups and trajectories are those of the package ``mup``, without its traps."""

from __future__ import annotations

import copy

import mup
import pytest
import torch
from torch import Tensor, nn

import torch_depthmup as dm


def branch(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


class Net(nn.Module):
    """Embedding, convolution, two residual blocks, MuReadout: every kind of shape that mup tells apart."""

    def __init__(self, width: int):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.conv = nn.Conv1d(width, 2 * width, 3, padding=1)
        self.down = nn.Linear(2 * width, width)
        self.blocks = nn.ModuleList([dm.Residual(branch(width)) for _ in range(2)])
        self.head = mup.MuReadout(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.down(torch.relu(self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)))
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def net(width: int, base: int = 8) -> Net:
    torch.manual_seed(1)
    model = Net(width)
    return mup.set_base_shapes(model, Net(base), delta=Net(2 * base)).double()


TOKENS = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(2))
PAIRS = {"sgd": (dm.SGD, mup.MuSGD), "adam": (dm.Adam, mup.MuAdam), "adamw": (dm.AdamW, mup.MuAdamW)}


def settings_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (float(group["lr"]), float(group["weight_decay"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def parametrized(width: int, rule: str = "depth-mup-corrected") -> Net:
    model = net(width)
    dm.parametrize(model, depth_multiplier=1, example_inputs=TOKENS, rule=rule)
    return model


@pytest.mark.parametrize("kind", sorted(PAIRS))
@pytest.mark.parametrize("width", [8, 16, 24, 40])
@pytest.mark.parametrize("rule", ["mup", "depth-mup-corrected", "complete-p"])
def test_groups_equal_those_of_mup(kind: str, width: int, rule: str) -> None:
    model, reference = parametrized(width, rule), net(width)
    ours, theirs = (make(m.parameters(), lr=0.1, weight_decay=0.02) for make, m in zip(
        PAIRS[kind], (model, reference), strict=True))  # fmt: skip
    wanted = settings_of(theirs, reference)
    for name, found in settings_of(ours, model).items():
        assert found == pytest.approx(wanted[name], rel=1e-15), name


@pytest.mark.parametrize("kind", sorted(PAIRS))
def test_trajectories_are_identical(kind: str) -> None:
    outputs = []
    for make, model in zip(PAIRS[kind], (parametrized(32), net(32)), strict=True):
        optimizer = make(model.parameters(), lr=0.01, weight_decay=0.02)
        for _ in range(20):
            optimizer.zero_grad()
            (model(TOKENS) - 1).square().mean().backward()
            optimizer.step()
        outputs.append(model(TOKENS))
    assert torch.equal(*outputs)


def test_depth_and_width_compose() -> None:
    model = net(32)
    plan = dm.parametrize(model, depth_multiplier=2, example_inputs=TOKENS, how="wrap")
    width = plan.multipliers("conv.weight", "adam").lr
    assert width == 1 / 4
    assert plan.multipliers("blocks.0.branch.1.weight", "adam").lr == 1 / 4  # inner: 1 in depth
    assert plan.multipliers("blocks.0.branch.3.weight", "adam").lr == pytest.approx(2**-0.5 / 4)


@pytest.mark.parametrize("loses", ["deepcopy", "to_empty", "assign"])
def test_widths_survive_what_makes_mup_forget(loses: str) -> None:
    model = parametrized(32)
    wanted = settings_of(dm.AdamW(model, lr=0.1), model)
    copied = copy.deepcopy(model)
    if loses == "to_empty":
        copied = copied.to_empty(device="cpu")
    if loses == "assign":
        copied.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert settings_of(dm.AdamW(copied.parameters(), lr=0.1), copied) == wanted


def test_tensor_learning_rates_and_users_groups_are_left_alone() -> None:
    model, lr = parametrized(32), torch.tensor(0.1)
    groups = [{"params": [model.head.weight]}, {"params": list(model.blocks.parameters()), "weight_decay": 0.5}]
    before = copy.deepcopy([{key: value for key, value in group.items() if key != "params"} for group in groups])
    optimizer = dm.Adam(groups, lr)
    assert lr.item() == pytest.approx(0.1)
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == before
    assert {round(float(group["lr"]), 6) for group in optimizer.param_groups} == {0.1, 0.025}


def test_equal_base_and_target_change_nothing() -> None:
    model = Net(8)
    mup.set_base_shapes(model, None)
    dm.parametrize(model, depth_multiplier=1, example_inputs=TOKENS)
    assert len(dm.SGD(model.parameters(), lr=0.1).param_groups) == 1
