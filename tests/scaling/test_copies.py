"""Momentum teachers are scaled as their students are; what is frozen otherwise is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import PreNorm
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import torch_depthmup as dm

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def encoder(depth: int, width: int = 16) -> nn.Sequential:
    torch.manual_seed(depth)
    stem, head = nn.Linear(6, width), nn.Linear(width, 4)
    return nn.Sequential(stem, *[PreNorm(width) for _ in range(depth)], head)


class Twins(nn.Module):
    """A student and something that follows it."""

    def __init__(self, depth: int, width: int = 16):
        super().__init__()
        self.student = encoder(depth, width)
        self.follow()

    def follow(self) -> None:
        self.teacher: nn.Module = copy.deepcopy(self.student).requires_grad_(False)

    def taught(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.student(x), self.taught(x)


class Grown(Twins):
    """As BYOL: the online network has a predictor more than its target, whose gradient is cut off."""

    def __init__(self, depth: int, width: int = 16):
        super().__init__(depth, width)
        self.online = nn.ModuleDict({"encoder": self.student, "predictor": nn.Linear(4, 4)})
        self.target = nn.ModuleDict({"encoder": copy.deepcopy(self.student)})
        del self.student, self.teacher

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        student, taught = self.online["encoder"](x), self.target["encoder"](x).detach()
        return self.online["predictor"](torch.tanh(student)) * 0.0 + student.detach(), taught


class Listed(Twins):
    """As DINO: both in a list, the teacher frozen and yet a part of the graph."""

    def follow(self) -> None:
        self.nets = nn.ModuleList([self.student, copy.deepcopy(self.student).requires_grad_(False)])
        del self.student

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.nets[0](x), self.nets[1](x)


class Averaged(Twins):
    """torch's own average of weights."""

    def follow(self) -> None:
        self.teacher = AveragedModel(self.student)

    def taught(self, x: Tensor) -> Tensor:
        return self.teacher(x).detach()


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("kind", [Twins, Grown, Listed, Averaged])
def test_a_teacher_computes_what_its_student_does(kind: type[Twins], how) -> None:
    model = kind(8, 32)
    plan = dm.parametrize(model, base=kind(2), example_inputs=X, how=how)
    student, teacher = model(X)
    torch.testing.assert_close(student, teacher)
    assert "is a copy of" in str(plan) and dm.Plan.from_json(plan.to_json()) == plan
    if how == "wrap":
        dm.bake(model)
        baked = model(X)
        torch.testing.assert_close(baked, (student, teacher))
    else:
        dm.undo(model)
        torch.testing.assert_close(model(X), kind(8, 32)(X))


@pytest.mark.filterwarnings("ignore:the base is narrower and on the meta device")
@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_a_teacher_is_scaled_when_a_plan_made_on_meta_is_applied(how) -> None:
    with torch.device("meta"):
        model, base = Twins(8, 32), Twins(2)
    plan = dm.plan(model, base=base, example_inputs=X, how=how)
    direct = dm.plan(Twins(8, 32), base=base, example_inputs=X, how=how)
    assert plan.copies == direct.copies and plan.hooks == direct.hooks
    fresh = Twins(8, 32)
    dm.apply(fresh, plan)
    torch.testing.assert_close(*fresh(X))
    unlike = Twins(8, 32)
    nn.init.normal_(unlike.teacher[0].weight)
    with pytest.raises(dm.DepthMuPError, match="teacher was planned as a copy of student.*Load student's values"):
        dm.apply(unlike, plan)
    unlike.teacher.load_state_dict(unlike.student.state_dict())
    dm.apply(unlike, plan)
    torch.testing.assert_close(*unlike(X))


def test_a_frozen_twin_with_other_values_is_left_alone_and_told() -> None:
    model = Twins(8)
    nn.init.normal_(model.teacher[3].fc2.weight)
    before = copy.deepcopy(model.teacher.state_dict())
    with pytest.warns(UserWarning, match="teacher is built as student is.*left alone.*load student's values into it"):
        dm.parametrize(model, base=Twins(2), example_inputs=X)
    torch.testing.assert_close(model.teacher.state_dict(), before)


class Partly(nn.Module):
    """Some layers of a trunk are frozen; deep copies of each other, as torch's encoders make them."""

    def __init__(self, depth: int, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, width).requires_grad_(False), nn.Linear(width, 4)
        block = PreNorm(width)
        self.blocks = nn.ModuleList([copy.deepcopy(block) for _ in range(depth)])
        self.blocks[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_frozen_blocks_of_a_trunk_are_no_teachers() -> None:
    model = Partly(8)
    frozen = copy.deepcopy(model.blocks[0].state_dict())
    plan = dm.parametrize(model, base=Partly(2), example_inputs=X)
    assert not plan.copies
    torch.testing.assert_close(model.blocks[0].state_dict(), frozen)
    assert plan["blocks.1.fc2.weight"].scale == 0.5
    assert "frozen: its initial size is left alone" in plan.explain("blocks.0.fc2.weight")


@pytest.mark.parametrize("part", ["stem", "head", "blocks"])
def test_frozen_parts_keep_their_values_at_another_width(part: str) -> None:
    model = Partly(2, 64).requires_grad_(True)
    model.get_submodule(part).requires_grad_(False)
    before = copy.deepcopy(model.get_submodule(part).state_dict())
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # not at the base's size
    before = {name: 3 * value for name, value in before.items()}
    plan = dm.parametrize(model, base=Partly(2), example_inputs=X, rule="mup")
    torch.testing.assert_close(model.get_submodule(part).state_dict(), before)
    assert "left alone" in plan.explain(f"{part}.weight" if part != "blocks" else "blocks.1.fc1.weight")
