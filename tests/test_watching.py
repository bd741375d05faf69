"""One look before each step: plain optimizers over scaled weights, groups without multipliers."""

from __future__ import annotations

import pickle
import re
import warnings

import mup
import pytest
import torch
from blocks import PreNorm, Stack
from optimizers import X, backward, parametrized, step
from torch import nn

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError


def told(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(net, optimizer)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_a_plain_optimizer_over_scaled_weights_is_told_once(cls, how: str) -> None:
    net = parametrized(how)
    (message,) = told(net, cls(net.parameters(), lr=1e-3))
    assert "a plain " + cls.__name__ in message and "dm.rescale(optimizer, model)" in message


def test_optimizers_that_are_right_are_told_nothing(model: Stack) -> None:
    assert not told(model, dm.AdamW(model, lr=1e-3))
    assert not told(model, dm.rescale(torch.optim.AdamW(model.parameters(), lr=1e-3), model))
    base = Stack(2, PreNorm)
    dm.parametrize(base, depth_multiplier=1, example_inputs=X)
    assert not told(base, torch.optim.AdamW(base.parameters()))
    assert not told(Stack(2, PreNorm), torch.optim.AdamW(Stack(2, PreNorm).parameters()))


def test_a_group_without_multipliers_beside_scaled_ones_is_told(model: Stack) -> None:
    net, optimizer = pickle.loads(pickle.dumps((model, dm.AdamW(model.blocks.parameters(), lr=0.1))))
    optimizer.add_param_group({"params": list(net.stem.parameters()), "param_names": ["a", "b"]})
    assert any("has no multipliers while others have" in message for message in told(net, optimizer))


def _added_and_taken_off(weights, perturbed) -> None:
    moves = [1e-3 * torch.ones_like(w) for w in weights]
    torch._foreach_add_(weights, moves)
    perturbed()
    torch._foreach_sub_(weights, moves)


def _behind_autograds_back(weights, perturbed) -> None:
    for weight in weights:
        weight.data.add_(0.05 * weight.grad / weight.grad.norm())
    moves = [0.05 * weight.grad / weight.grad.norm() for weight in weights]
    perturbed()
    for weight, move in zip(weights, moves, strict=True):
        weight.data.sub_(move)


def _saved_and_put_back(weights, perturbed) -> None:
    saved = [weight.data.clone() for weight in weights]
    for weight in weights:
        weight.data = weight.data + 1e-3
    perturbed()
    for weight, value in zip(weights, saved, strict=True):
        weight.data = value


def _clamped(weights, perturbed) -> None:
    for weight in weights:
        weight.clamp_(-0.05, 0.05)


def _nothing(weights, perturbed) -> None:
    perturbed()


@pytest.mark.parametrize(
    ("between", "how", "notices"),
    [
        (_added_and_taken_off, "fold", 1),
        (_behind_autograds_back, "fold", 1),
        (_saved_and_put_back, "fold", 1),
        (_clamped, "fold", 1),
        (_clamped, "wrap", 0),
        (_nothing, "fold", 0),
    ],
)
def test_writes_to_folded_weights_between_steps_are_told(between, how: str, notices: int) -> None:
    net = parametrized(how)
    optimizer = dm.AdamW(net, lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            backward(net)
            with torch.no_grad():
                between(list(net.parameters()), torch.enable_grad()(lambda: backward(net)))
            optimizer.step()
    assert sum("writes to folded weights" in str(w.message) for w in caught) == notices == len(caught)


class EpsInside(torch.optim.Optimizer):
    """Adam without moments, and with eps inside of the root, where no factor on it makes up for folding."""

    def __init__(self, params, lr: float = 1e-3, eps: float = 1e-4):
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / (p.grad.square() + group["eps"]).sqrt())


def _clipped_by_torch(weights, perturbed) -> None:
    nn.utils.clip_grad_norm_(weights, 0.05)


class Wide(Stack):
    """A network with a readout of mup's or not, and with heads that grow with the width or without."""

    def __init__(self, depth: int, width: int, readout: str, heads: int | None = None):
        super().__init__(depth, PreNorm if heads is None else lambda n: Attention(n, heads), width)
        self.head = mup.MuReadout(width, 3) if readout == "mup's" else nn.Linear(width, 3)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.q, self.k, self.v, self.o = heads, *(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(1, len(x), self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).reshape(x.shape))


def _complaint(
    how: str, between, make=dm.AdamW, base: int = 12, readout: str = "plain", heads: int | None = None
) -> str:
    """What is said of four steps of a network of width 24; empty where nothing is."""
    torch.manual_seed(0)
    net = Wide(4, 24, readout, heads)
    dm.parametrize(net, base=Wide(2, base, readout, heads), example_inputs=X, how=how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            optimizer = make(net, lr=1e-3)
            for _ in range(6):
                backward(net)
                with torch.no_grad():
                    between(list(net.parameters()), lambda: None)
                optimizer.step()
        except OptimizerError as error:
            return str(error)
    return "".join(str(w.message) for w in caught)


@pytest.mark.parametrize(
    "told",
    [{"between": _clipped_by_torch}, {"between": _clamped}, {"between": _nothing, "make": dm.optimizer(EpsInside)}],
)
def test_the_way_out_of_folding_leaves_no_factor_of_width_in_the_weights(told) -> None:
    way = r"how=.wrap.\) with a mup.MuReadout for the readout of model and base, or with a base as wide"
    for how in ("fold", "wrap"):
        assert re.search(way, _complaint(how, **told))
    for followed in ({"readout": "mup's"}, {"base": 24}):
        assert _complaint("wrap", **told, **followed) == ""
    assert _complaint("fold", **told, base=24).endswith("dm.parametrize(..., how='wrap')")
    heads = _complaint("wrap", **told, readout="mup's", heads=2)  # 1 / head size is folded into what makes the queries
    assert "how='wrap') with a base as wide as the model: width's factor is in blocks.0.q." in heads


def test_what_looks_in_the_first_steps_leaves_nothing_behind(model: Stack) -> None:
    optimizer = dm.AdamW(model, lr=1e-3)
    for _ in range(12):
        step(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_overwritten_rates_are_told_where_groups_are_stepped_one_at_a_time(model: Stack) -> None:
    optimizer = dm.AdamW(model, lr=1e-3)
    groups = optimizer.param_groups
    for group in groups:
        group["lr"] = 1e-3
    backward(model)
    with pytest.warns(UserWarning, match="no longer in the planned ratio"):
        for group in groups:  # as DeepSpeed's ZeRO does
            optimizer.param_groups = [group]
            optimizer.step()


def test_master_weights_that_are_copied_back_after_the_step_are_told_nothing(model: Stack) -> None:
    optimizer = dm.AdamW(model, lr=1e-3)
    masters = {}
    for group in optimizer.param_groups:
        copies = [p.detach().clone().requires_grad_() for p in group["params"]]
        masters.update(zip(copies, group["params"], strict=True))
        group["params"] = copies
    for _ in range(6):
        backward(model)
        for master, weight in masters.items():
            master.grad = weight.grad
        optimizer.step()
        with torch.no_grad():
            for master, weight in masters.items():
                weight.copy_(master)  # warnings are errors
