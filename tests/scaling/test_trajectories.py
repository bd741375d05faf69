"""Folding a multiplier and writing it into the forward pass train the same network, step by step, in float64.

The oracle is a network written with its multiplier in the forward pass, trained by torch's own optimizer with groups
made by hand from the table of the papers. Fold and wrap must both follow it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_depthmup as dm

STEPS = 20
TOLERANCE = 1e-10


class Block(nn.Module):
    """``x + m * fc2(tanh(fc1(norm(x))))``."""

    def __init__(self, width: int, multiplier: float = 1.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        value = self.fc2(torch.tanh(self.fc1(self.norm(x))))
        return x + (value if self.multiplier == 1.0 else self.multiplier * value)


def network(depth: int, width: int, multiplier: float = 1.0) -> nn.Sequential:
    torch.manual_seed(7)
    blocks = [Block(width, multiplier) for _ in range(depth)]
    return nn.Sequential(nn.Linear(5, width), *blocks, nn.Linear(width, 2)).double()


def trajectory(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """The outputs on all batches after every step."""
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(STEPS, 6, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(STEPS, 6, 2, generator=generator, dtype=torch.float64)
    outputs = []
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            outputs.append(model(inputs.flatten(0, 1)))
    return torch.stack(outputs)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# rule: alpha, then exponents of the learning rate: SGD outer, SGD inner, Adam outer, Adam inner
EXPONENTS = {
    "depth-mup": (0.5, 0.0, 0.0, -0.5, -0.5),
    "depth-mup-corrected": (0.5, 0.0, 0.5, -0.5, 0.0),
    "complete-p": (1.0, 1.0, 1.0, 0.0, 0.0),
}


def by_hand(model: nn.Module, cls: type, rule: str, ratio: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    """torch's optimizer for the explicit network, with three groups written out."""
    alpha, sgd_outer, sgd_inner, adam_outer, adam_inner = EXPONENTS[rule]
    adam, coupled = cls is not torch.optim.SGD, cls is torch.optim.Adam
    exponents = {"outer": adam_outer if adam else sgd_outer, "inner": adam_inner if adam else sgd_inner, "rest": None}
    groups = []
    for part, exponent in exponents.items():
        members = [p for name, p in model.named_parameters() if place(name) == part]
        group: dict[str, Any] = {"params": members}
        if exponent is not None:
            group["lr"] = options["lr"] * ratio**exponent
            group["weight_decay"] = options["weight_decay"] * ratio ** (-alpha if coupled else -exponent)
            if adam:
                group["eps"] = options["eps"] * ratio**-alpha
        groups.append(group)
    return cls(groups, **options)


def place(name: str) -> str:
    return "outer" if ".fc2." in name else "inner" if ".fc1." in name or ".norm." in name else "rest"


shapes = st.tuples(st.integers(1, 3), st.integers(2, 4), st.sampled_from([4, 9]))
decays = st.sampled_from([0.0, 0.01, 0.3])
rates = st.floats(0.003, 0.03)


@st.composite
def optimizers(draw: st.DrawFn) -> tuple[type, Callable, dict[str, Any]]:
    options: dict[str, Any] = {"lr": draw(rates), "weight_decay": draw(decays)}
    kind = draw(st.sampled_from(["sgd", "adam", "adamw"]))
    if kind == "sgd":
        options["momentum"] = draw(st.sampled_from([0.0, 0.9]))
        options["nesterov"] = bool(options["momentum"]) and draw(st.booleans())
        return torch.optim.SGD, dm.SGD, options
    options["betas"] = draw(st.sampled_from([(0.9, 0.999), (0.8, 0.95)]))
    options["eps"] = draw(st.sampled_from([1e-8, 1e-3]))
    options["amsgrad"] = draw(st.booleans())
    return (torch.optim.Adam, dm.Adam, options) if kind == "adam" else (torch.optim.AdamW, dm.AdamW, options)


@given(shapes, st.sampled_from(sorted(EXPONENTS)), optimizers())
@pytest.mark.parametrize("how", ["fold", "wrap"])
@settings(max_examples=40)
def test_training_is_that_of_the_network_written_by_hand(how: str, shape, rule: str, optimizer) -> None:
    base_depth, times, width = shape
    cls, constructor, options = optimizer
    explicit = network(base_depth * times, width, times ** -EXPONENTS[rule][0])
    wanted = trajectory(explicit, by_hand(explicit, cls, rule, times, options))
    model = network(base_depth * times, width)
    dm.parametrize(model, depth_multiplier=times, example_inputs=torch.randn(3, 5).double(), rule=rule, how=how)
    assert error(trajectory(model, constructor(model.parameters(), **options)), wanted) < TOLERANCE


OTHERS = {
    "NAdam": (torch.optim.NAdam, {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-3}),
    "NAdam decoupled": (
        torch.optim.NAdam,
        {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-3, "decoupled_weight_decay": True},
    ),
    "Adamax": (torch.optim.Adamax, {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-3}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-3, "momentum": 0.5, "centered": True}),
    "SGD maximize": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "dampening": 0.1, "maximize": True}),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_torch_optimizers_fold_as_they_wrap(name: str) -> None:
    cls, options = OTHERS[name]
    outputs = {}
    for how in ("fold", "wrap"):
        model = network(6, 8)
        dm.parametrize(model, depth_multiplier=3, example_inputs=torch.randn(3, 5).double(), how=how)
        outputs[how] = trajectory(model, dm.optimizer(cls)(model, **options))
    assert error(outputs["fold"], outputs["wrap"]) < TOLERANCE


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch older than 2.9 has no Muon")
@pytest.mark.parametrize(("depth", "tolerance"), [(8, TOLERANCE), (6, 1e-2)])
def test_muon_folds_as_it_wraps(depth: int, tolerance: float) -> None:
    # Muon iterates in bfloat16: exact for m = 1/2 at depth 8, while a weight times 0.577 rounds differently.
    outputs = {}
    for how in ("fold", "wrap"):
        model = network(depth, 8)
        dm.parametrize(model, depth_multiplier=depth / 2, example_inputs=torch.randn(3, 5).double(), how=how)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        outputs[how] = trajectory(model, dm.Muon(matrices, lr=0.01, weight_decay=0.1))
    assert error(outputs["fold"], outputs["wrap"]) < tolerance


@given(
    st.integers(1, 4), st.sampled_from(["sgd", "adam", "adamw"]), st.sampled_from(["fold", "wrap"]),
    st.sampled_from(["sp", "mup", *EXPONENTS]),
)  # fmt: skip
@settings(max_examples=20)
def test_at_the_base_training_is_torchs_own_bit_for_bit(depth: int, kind: str, how: str, rule: str) -> None:
    ours, theirs = {
        "sgd": (dm.SGD, torch.optim.SGD), "adam": (dm.Adam, torch.optim.Adam), "adamw": (dm.AdamW, torch.optim.AdamW)
    }[kind]  # fmt: skip
    plain = network(depth, 8)
    model = copy.deepcopy(plain)
    dm.parametrize(model, depth_multiplier=1, example_inputs=torch.randn(3, 5).double(), rule=rule, how=how)
    options = {"lr": 0.01, "weight_decay": 0.1}
    wanted = trajectory(plain, theirs(plain.parameters(), **options))
    assert torch.equal(trajectory(model, ours(model.parameters(), **options)), wanted)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
