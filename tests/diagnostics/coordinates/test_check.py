"""Coordinate checks hold where the rule is carried out and name the mistake where it is not; findings in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import blocks
import numpy as np
import pytest
import torch
from canonical import Canonical, TwoLayers, samples
from torch import Tensor, nn
from trained import check

import torch_depthmup as dm
from torch_depthmup.diagnostics.coordinates.check import _of_the_network, coordinate_check
from torch_depthmup.errors import DepthMuPError, MeasurementError, PlanError

# Slopes of log size in log depth as the theory's simulations measured them; ranges by their middle.
THEORY = {
    "depth-mup": {"branch": -0.5, "inner": -0.5, "outer": -0.5, "stream": 0.0, "function": 0.0},
    "depth-mup-corrected": {"branch": -0.5, "inner": 0.0, "outer": -0.5, "stream": 0.42, "function": 0.43},
    "complete-p": {"branch": -1.0, "inner": 0.0, "outer": 0.0, "stream": 0.0, "function": 0.0},
}


WIDE = pytest.param((4, 8, 16, 32, 64, 128, 256), 256, marks=pytest.mark.evidence)


@pytest.mark.parametrize("depths, width", [((4, 8, 16, 32, 64), 64), WIDE])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", THEORY)
def test_the_check_reproduces_the_theorys_table(rule: str, optimizer: str, depths: tuple[int, ...], width: int) -> None:
    def only_branches_learn(depth: int) -> nn.Module:
        model = Canonical(depth, width)
        for parameter in (model.stem.weight, model.head.weight):
            parameter.requires_grad_(False)
        return model

    result = check(rule, optimizer, make=only_branches_learn, depths=depths, seeds=3)
    assert not result.mistakes
    assert result.verdict == "holds"
    assert {s.quantity: s.measured for s in result.slopes} == pytest.approx(THEORY[rule], abs=0.1)
    assert all(slope.low <= slope.measured <= slope.high for slope in result.slopes)


def test_slopes_are_least_squares_of_the_tidy_frame() -> None:
    result = check(depths=(2, 4, 8), seeds=3)
    frame = result.frame()
    assert {"width", "depth", "relative_depth", "seed", "step", "branch", "layer"} <= set(frame.columns)
    assert sorted(frame.step.unique()) == [0, 2]
    inner = frame[(frame.role == "inner") & (frame.step == 2)]
    own = inner.assign(square=inner.own**2).groupby(["seed", "depth"]).square.mean() ** 0.5
    fits = [np.polyfit(np.log([2, 4, 8]), np.log(own[seed].to_numpy()), 1)[0] for seed in range(3)]
    (slope,) = [s for s in result.slopes if s.quantity == "inner"]
    assert slope.measured == pytest.approx(np.mean(fits), rel=1e-9)
    half = 4.302652729911275 * np.std(fits, ddof=1) / math.sqrt(3)  # t quantile 0.975 with two degrees of freedom
    assert slope.high - slope.measured == pytest.approx(half, rel=1e-9)


def test_a_check_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    check(depths=(2, 4), seeds=1)
    assert torch.equal(torch.rand(3), wanted)


def test_too_few_points_cannot_tell() -> None:
    result = check(depths=(2, 4), seeds=1)
    assert {slope.verdict for slope in result.slopes} == {"cannot tell"} and result.verdict == "cannot tell"


@pytest.mark.filterwarnings("ignore:a plain")
def test_widths_are_checked_along_their_own_axis() -> None:
    class Wide(blocks.Stack):
        def __init__(self, depth: int, width: int):
            super().__init__(depth, blocks.PreNorm, width)

    x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
    result = coordinate_check(Wide, (x, y), depths=(2, 8), widths=(32, 64, 128), lr=1e-3, seeds=3, steps=1)
    in_width = [slope for slope in result.slopes if slope.axis == "width"]
    assert {slope.quantity for slope in in_width} == {"inner", "outer", "stream", "function"}
    points = set(result.frame()[["depth", "width", "seed"]].itertuples(index=False, name=None))
    assert points == {(d, w, s) for d in (2, 8) for w in (32, 64, 128) for s in range(3)}
    assert set(result.sizes("inner")) == points
    widths_apart = [
        coordinate_check(
            lambda depth, w=w: Wide(depth, w), (x, y), depths=(2, 8), lr=1e-3, steps=1, rule="sp", seeds=[0, 1]
        )
        for w in (32, 64, 128)
    ]
    together = coordinate_check(
        Wide, (x, y), depths=(2, 8), widths=(32, 64, 128), lr=1e-3, steps=1, rule="sp", seeds=[0, 1]
    )
    for slope in together.slopes:  # "sp" says nothing of widths: each is a line in depth of its own
        alone = [s.measured for check in widths_apart for s in check.slopes if s.quantity == slope.quantity]
        assert slope.axis == "depth" and slope.measured == pytest.approx(np.mean(alone))
    by_name = {slope.quantity: slope.measured for slope in in_width}
    assert abs(by_name["inner"]) < 0.25 and abs(by_name["outer"]) < 0.25
    # Under "sp" the same model's own updates grow with width: Adam's entries do not shrink.
    plain = coordinate_check(
        Wide,
        (x, y),
        depths=(2, 8),
        widths=(32, 64, 128),
        seeds=3,
        steps=1,
        prepare=lambda model, base: None,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
        family="adam",
        rule="mup",
    )
    sp = {slope.quantity: slope.measured for slope in plain.slopes if slope.axis == "width"}
    assert sp["inner"] - by_name["inner"] > 0.5


def test_batch_norm_networks_and_lists_of_batches_run() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 3, (4,), generator=generator)) for _ in range(2)
    ]
    result = coordinate_check(blocks.BottleneckNet, batches, depths=(2, 4), seeds=1, steps=2)
    assert {row["additions"] for row in result.rows if row["kind"] == "stream"} == {4, 8}


@pytest.mark.parametrize(
    "message, act",
    [
        (
            "it ignores depth",
            lambda data: coordinate_check(lambda depth: Canonical(3), data, depths=(2, 4), base_depth=1),
        ),
        ("at least two different", lambda data: coordinate_check(Canonical, data, depths=(4,))),
        (
            "optimizer='lion' is not known",
            lambda data: (
                check(optimizer="adam", depths=(2, 4))
                and coordinate_check(Canonical, data, depths=(2, 4), optimizer="lion")
            ),
        ),
        (
            "say which rule holds for it",
            lambda data: coordinate_check(
                Canonical, data, depths=(2, 4), optimizer=lambda m: torch.optim.SGD(m.parameters())
            ),
        ),
        (
            "the loss is nan in step 1",
            lambda data: coordinate_check(Canonical, (data[0], data[1] * math.nan), depths=(2, 4)),
        ),
        (
            "not finite on the probe",
            lambda data: coordinate_check(
                Canonical, (data[0] * math.inf, data[1]), depths=(2, 4), prepare=lambda model, base: None
            ),
        ),
        ("data must be a pair (inputs, targets)", lambda data: coordinate_check(Canonical, data[0], depths=(2, 4))),
        ("the list is empty", lambda data: coordinate_check(Canonical, [], depths=(2, 4))),
        (
            "equally many samples, not [4, 8]",
            lambda data: coordinate_check(Canonical, (data[0], data[1][:4]), depths=(2, 4)),
        ),
        ("depths must be positive integers", lambda data: check(depths=(2.0, 4))),
        ("seeds must be how many or which", lambda data: check(seeds=0)),
        ("steps must be a positive integer", lambda data: check(steps=0)),
        ("widths must be positive integers", lambda data: check(widths=(0, 4))),
        (
            "same shapes at width 8 and at width 16: it ignores width",
            lambda data: check(make=lambda depth, width: Canonical(depth), widths=(8, 16)),
        ),
        ("returned int at depth 2", lambda data: coordinate_check(lambda depth: depth, data, depths=(2, 4))),
        (
            "no residual branches",
            lambda data: coordinate_check(
                lambda depth: nn.Sequential(*[nn.Linear(16, 16) for _ in range(depth)]), data, depths=(2, 4)
            ),
        ),
    ],
)
def test_bad_input_is_one_clear_line(message: str, act: Callable[[Any], object]) -> None:
    with pytest.raises(DepthMuPError) as caught:
        act(samples())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def frozen(depth: int, names: str) -> nn.Module:
    """A network in which the parameters whose names contain one of these words do not learn."""
    model = Canonical(depth)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(word in name for word in names.split()))
    return model


@pytest.mark.parametrize(
    "names, loss, message",
    [
        ("weight", None, "every parameter of Canonical is frozen"),
        ("blocks", None, "all inner matrices of the branches blocks.# are frozen (requires_grad=False), blocks.0"),
        ("outer", None, "all outer matrices of the branches blocks.# are frozen"),
        ("-", lambda output, target: (output.detach() - target).square().mean(), "it was detached"),
        ("-", lambda output, target: (output - target).square().mean().item(), "the loss is a float"),
        ("-", lambda output, target: (output - target).square(), "the loss is a tensor of shape (8, 1)"),
    ],
)
def test_a_network_that_cannot_learn_is_one_clear_line(names: str, loss: Any, message: str) -> None:
    with pytest.raises(MeasurementError) as caught:
        check(make=lambda depth: frozen(depth, names), depths=(2, 4), loss=loss)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("names", ["stem head", "blocks.0."], ids=["the ends", "one block"])
def test_what_is_frozen_beside_is_no_matter(names: str) -> None:
    """The advice of the refusals is right: what learns in every kind of branches is checked."""
    slopes = check(make=lambda depth: frozen(depth, names), depths=(2, 4), seeds=1).slopes
    assert {slope.quantity for slope in slopes} == {"branch", "inner", "outer", "stream", "function"}


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(PlanError, match="no rule is called"):
        check("depth-mu")


# Findings


def test_seeds_are_added_until_they_tell_within_the_budget() -> None:
    """Two seeds have wide intervals."""
    data = (torch.randn(16, 8), torch.randint(0, 3, (16,)))
    few, more = (
        coordinate_check(
            lambda depth: blocks.Stack(depth, blocks.PreNorm), data, depths=(2, 4, 8), optimizer="sgd", lr=1e-2,
            seeds=2, most_seeds=most,
        )
        for most in (2, 16)
    )  # fmt: skip
    assert few.verdict == "cannot tell" and {slope.seeds for slope in few.slopes} == {2}
    assert max(slope.needed for slope in few.slopes) >= 4 and "about" in few.advice and few.advice in str(few)
    assert more.verdict == "holds" and more.slopes[0].seeds in (4, 8, 16) and more.advice == ""


class TwoKinds(nn.Module):
    """Two kinds of branches by turns; what is wrong with one of them must not hide behind the other."""

    def __init__(self, depth: int):
        super().__init__()
        self.stem, self.head = nn.Linear(16, 32), nn.Linear(32, 1)
        self.first = nn.ModuleList(TwoLayers(32) for _ in range(depth))
        self.second = nn.ModuleList(TwoLayers(32) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for first, second in zip(self.first, self.second, strict=True):
            h = second(first(h))
        return self.head(h)


@pytest.mark.filterwarnings("ignore:a plain")
def test_kinds_of_branches_are_judged_apart() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        plan = dm.plan_of(model)
        groups = []
        for name, parameter in model.named_parameters():
            factor = plan.multipliers(name, "adam").lr
            if "second" in name and plan[name].role == "inner":
                factor *= plan[name].depth_multiplier ** -0.5  # as if the correction had been forgotten there
            groups.append({"params": [parameter], "lr": 1e-4 * factor})
        return torch.optim.Adam(groups)

    result = check(optimizer=make, family="adam", make=TwoKinds, depths=(2, 4, 8, 16), base_depth=2, seeds=3)
    broken = [slope for slope in result.slopes if slope.verdict == "broken"]
    assert [(slope.quantity, slope.kind) for slope in broken] == [("inner", "second.#")]
    assert "the correction of the inner layers' learning rate is missing, in second.#" in result.mistakes[0]
    assert check(make=TwoKinds, depths=(2, 4, 8, 16), base_depth=2, seeds=3).verdict == "holds"


def test_a_whole_that_grows_by_itself_is_no_mistake_of_the_rule() -> None:
    """Branches are right, and the stream moves more than they say: exit code and verdict do not call that broken."""
    result = check("depth-mup", depths=(2, 4, 8))
    slopes = tuple(replace(s, verdict="broken") if s.quantity == "stream" else s for s in result.slopes)
    assert {s.quantity: s.verdict for s in _of_the_network(slopes)}["stream"] == "network"
    spoiled = tuple(replace(s, verdict="broken") if s.quantity in ("stream", "inner") else s for s in result.slopes)
    assert _of_the_network(spoiled) == spoiled


@pytest.mark.parametrize("quantity", ["branch", "inner", "outer"])
def test_the_whole_is_not_called_broken_while_a_branch_cannot_be_told(quantity: str) -> None:
    slopes = check("mup", seeds=2).slopes
    verdicts = {"stream": "broken", quantity: "cannot tell"}
    told = tuple(replace(s, verdict=verdicts.get(s.quantity, "holds")) for s in slopes)
    assert {s.quantity: s.verdict for s in _of_the_network(told)}["stream"] == "cannot tell"
    wrong = tuple(replace(s, verdict="broken") if s.quantity == quantity else s for s in told)
    assert _of_the_network(wrong) == wrong
