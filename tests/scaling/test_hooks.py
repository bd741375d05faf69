"""The multiplier that wrapping leaves on a module, and the class that makes the compiler see it."""

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


def wrapped() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(*[dm.Residual(branch()) for _ in range(4)])
    dm.parametrize(model, depth_multiplier=4, example_inputs=torch.randn(3, 8), how="wrap")
    return model


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_wrapped_model_copies_and_pickles(copied) -> None:
    model, x = wrapped(), torch.randn(3, 8)
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert dm.plan_of(other) == dm.plan_of(model)


def test_a_wrapped_model_keeps_its_state_dict() -> None:
    model, x = wrapped(), torch.randn(3, 8)
    plain = nn.Sequential(*[dm.Residual(branch()) for _ in range(4)])
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(x), model(x))  # the multiplier is in the module, not in the weights


def test_a_wrapped_model_exports_and_compiles_whole() -> None:
    model, x = wrapped(), torch.randn(3, 8)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x))


class Pair(nn.Module):
    """A branch that comes with something else, as attention with its weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.second(torch.tanh(self.first(x))), None


class Pairs(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.pairs = nn.ModuleList(Pair() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pair in self.pairs:
            value, _ = pair(x)
            x = x + value
        return x


class Plain(Pairs):
    """The like, with modules of torch's as branches."""

    def __init__(self, depth: int):
        nn.Module.__init__(self)
        self.branches = nn.ModuleList(branch() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for inner in self.branches:
            x = x + inner(x)
        return x


@pytest.mark.parametrize("make", [lambda n: nn.Sequential(*[dm.Residual(branch()) for _ in range(n)]), Plain, Pairs])
def test_a_wrapped_model_is_traced_by_fx(make) -> None:
    model, x = make(4), torch.randn(3, 8)
    dm.parametrize(model, depth_multiplier=4, example_inputs=x, how="wrap")
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_the_multiplier_scales_one_element_of_a_tuple() -> None:
    value = (torch.ones(2), None, torch.ones(2))
    changed = BranchMultiplier(0.5, 2)(nn.Identity(), (), value)
    assert changed[0] is value[0] and changed[1] is None and torch.equal(changed[2], torch.full((2,), 0.5))


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*[dm.Residual(branch()) for _ in range(4)])


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def block_by_block(model: nn.Module) -> nn.Module:
    for block in model:
        block.compile(backend="eager")
    return model


def multiplied_modules(model: nn.Module) -> nn.Module:
    for block in model:
        block.branch[2].compile(backend="eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("compiled", [whole, block_by_block, multiplied_modules])
@pytest.mark.parametrize("first", ["plain", "wrapped"])
def test_compiled_twins_with_and_without_multipliers_do_not_share_code(compiled, first: str) -> None:
    torch._dynamo.reset()
    x, makers = torch.randn(3, 8), {"plain": plain, "wrapped": wrapped}
    wanted = {name: make()(x) for name, make in makers.items()}
    for name in (first, *(set(makers) - {first})):
        assert torch.allclose(compiled(makers[name]())(x), wanted[name]), name


def test_a_multiplied_module_is_still_of_its_class_and_undone_exactly_so() -> None:
    model = wrapped()
    assert isinstance(model[0].branch, nn.Sequential) and "torch_depthmup" not in repr(model[0].branch)
    copied = copy.deepcopy(model)
    assert type(copied[0].branch) is type(model[0].branch)
    dm.undo(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain().modules()]
