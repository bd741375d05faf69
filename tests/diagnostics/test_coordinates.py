"""Coordinate checks hold where the rule is carried out and name the mistake where it is not; findings in words."""

from __future__ import annotations

import math
from collections.abc import Callable

import blocks
import numpy as np
import pytest
import torch
from canonical import SMALL, Canonical, samples
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.diagnostics.coordinates.check import CoordinateCheck, coordinate_check
from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.diagnostics.plots import coordinate_figure, monitor_figure
from torch_depthmup.errors import DepthMuPError, MeasurementError, PlanError
from torch_depthmup.optim import Adam

DEPTHS = (4, 16, 64)


def check(rule: str = "depth-mup-corrected", optimizer: str | Callable = "adam", **options) -> CoordinateCheck:
    given = {"depths": DEPTHS, "base_depth": 1, "steps": 2, "seeds": 2} | options
    lr = SMALL[optimizer] if isinstance(optimizer, str) else 1.0
    return coordinate_check(given.pop("make", Canonical), samples(), rule=rule, optimizer=optimizer, lr=lr, **given)


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


def by_hand(optimizer: str, multiplier: float, inner: float, outer: float) -> CoordinateCheck:
    """The rule written by hand with explicit multipliers: exponents in depth of m and of the learning rates."""

    def prepare(model: Canonical, base: Canonical) -> None:
        for block in model.blocks:
            block.multiplier = float(len(model.blocks)) ** multiplier

    def make(model: Canonical) -> torch.optim.Optimizer:
        lr, ratio = SMALL[optimizer], float(len(model.blocks))
        groups = [
            {"params": [b.inner.weight for b in model.blocks], "lr": lr * ratio**inner},
            {"params": [b.outer.weight for b in model.blocks], "lr": lr * ratio**outer},
            {"params": [model.stem.weight, model.head.weight], "lr": lr},
        ]
        return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](groups)

    return check("depth-mup-corrected", make, family=optimizer, prepare=prepare, seeds=3)


RIGHT = {"sgd": (-0.5, 0.5, 0.0), "adam": (-0.5, 0.0, -0.5)}

# What is planted: exponents of the branch multiplier, of the inner and of the outer learning rate; and its name.
PLANTED = {
    "multiplier forgotten, adam": ("adam", (0, 0, -0.5), "the branch multiplier is forgotten"),
    "multiplier forgotten, sgd": ("sgd", (0, 0.5, 0), "the branch multiplier is forgotten"),
    "multiplier twice": ("adam", (-1, 0, -0.5), "the branch multiplier is applied twice"),
    "no correction": ("adam", (-0.5, -0.5, -0.5), "the correction of the inner layers' learning rate is missing"),
    "correction twice": ("adam", (-0.5, 0.5, -0.5), "the correction is applied twice"),
    "correction on the outer layer, adam": ("adam", (-0.5, -0.5, 0), "outer layer instead of the inner"),
    "correction on the outer layer, sgd": ("sgd", (-0.5, 0, 0.5), "outer layer instead of the inner"),
    "correction on both": ("adam", (-0.5, 0, 0), "the correction is applied to the outer layer as well"),
    "rule of sgd under adam": ("adam", (-0.5, 0.5, 0), "the learning-rate rule is that of sgd, not adam"),
    "rule of adam under sgd": ("sgd", (-0.5, 0, -0.5), "the learning-rate rule is that of adam, not sgd"),
    "plain torch optimizer": ("adam", (-0.5, 0, 0), "not scaled with depth (a plain torch optimizer)"),
}


@pytest.mark.parametrize("optimizer", RIGHT)
def test_the_rule_written_by_hand_holds(optimizer: str) -> None:
    assert by_hand(optimizer, *RIGHT[optimizer]).verdict == "holds"


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named(name: str) -> None:
    optimizer, exponents, words = PLANTED[name]
    result = by_hand(optimizer, *exponents)
    assert result.verdict == "broken"
    assert result.mistakes[0].startswith("probably") and words in result.mistakes[0]
    assert f"wrong: {result.mistakes[0]}" in str(result)


def test_a_plain_optimizer_on_a_folded_model_is_named() -> None:
    result = check(optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-4), family="adam")
    assert result.verdict == "broken" and "a plain torch optimizer" in result.mistakes[0]


def test_the_other_familys_multipliers_on_a_folded_model_are_named() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        plan = dm.plan_of(model)
        groups = [
            {"params": [p], "lr": 1e-4 * plan.multipliers(name, "sgd").lr} for name, p in model.named_parameters()
        ]
        return torch.optim.Adam(groups)

    result = check(optimizer=make, family="adam")
    assert result.verdict == "broken" and "that of sgd, not adam" in result.mistakes[0]


def test_a_network_whose_gradients_grow_with_depth_is_told_from_a_wrong_rule() -> None:
    """Post-activation bottlenecks with few channels: the gradient grows towards the input, and SGD follows it."""
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 3, (16,), generator=generator))
    options = {"depths": (2, 4, 8, 16), "steps": 1, "seeds": 2}
    result = coordinate_check(blocks.BottleneckNet, data, optimizer="sgd", lr=1e-4, **options)
    assert result.verdict == "broken"
    assert result.mistakes[0].startswith("probably the network, not the rule")
    assert not coordinate_check(blocks.BottleneckNet, data, optimizer="adam", lr=1e-3, **options).mistakes


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
        coordinate_check(lambda depth, w=w: Wide(depth, w), (x, y), depths=(2, 8), lr=1e-3, steps=1, rule="sp")
        for w in (32, 64, 128)
    ]
    together = coordinate_check(Wide, (x, y), depths=(2, 8), widths=(32, 64, 128), lr=1e-3, steps=1, rule="sp")
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


def test_bad_input_is_one_clear_line() -> None:
    data = samples()
    cases: list[tuple[str, Callable[[], object]]] = [
        ("it ignores depth", lambda: coordinate_check(lambda depth: Canonical(3), data, depths=(2, 4), base_depth=1)),
        ("at least two different", lambda: coordinate_check(Canonical, data, depths=(4,))),
        (
            "optimizer='lion' is not known",
            lambda: (
                check(optimizer="adam", depths=(2, 4))
                and coordinate_check(Canonical, data, depths=(2, 4), optimizer="lion")
            ),
        ),
        (
            "say which rule holds for it",
            lambda: coordinate_check(
                Canonical, data, depths=(2, 4), optimizer=lambda m: torch.optim.SGD(m.parameters())
            ),
        ),
        (
            "the loss is nan in step 1",
            lambda: coordinate_check(Canonical, (data[0], data[1] * math.nan), depths=(2, 4)),
        ),
        (
            "not finite on the probe",
            lambda: coordinate_check(
                Canonical, (data[0] * math.inf, data[1]), depths=(2, 4), prepare=lambda model, base: None
            ),
        ),
        ("data must be a pair (inputs, targets)", lambda: coordinate_check(Canonical, data[0], depths=(2, 4))),
        ("the list is empty", lambda: coordinate_check(Canonical, [], depths=(2, 4))),
        (
            "equally many samples, not [4, 8]",
            lambda: coordinate_check(Canonical, (data[0], data[1][:4]), depths=(2, 4)),
        ),
        ("depths must be positive integers", lambda: check(depths=(2.0, 4))),
        ("seeds must be how many or which", lambda: check(seeds=0)),
        ("steps must be positive integers", lambda: check(steps=0)),
        ("widths must be positive integers", lambda: check(widths=(0, 4))),
        (
            "same shapes at width 8 and at width 16: it ignores width",
            lambda: check(make=lambda depth, width: Canonical(depth), widths=(8, 16)),
        ),
        ("returned int at depth 2", lambda: coordinate_check(lambda depth: depth, data, depths=(2, 4))),
        (
            "no residual branches",
            lambda: coordinate_check(
                lambda depth: nn.Sequential(*[nn.Linear(16, 16) for _ in range(depth)]), data, depths=(2, 4)
            ),
        ),
    ]
    for message, act in cases:
        with pytest.raises(DepthMuPError) as caught:
            act()
        assert message in str(caught.value) and "\n" not in str(caught.value), message
    with pytest.raises(PlanError, match="no rule is called"):
        check("depth-mu")


# Findings


def run(depth: int, rule: str, *, lr: float = 1e-3, steps: int = 5, optimizer: Callable = Adam) -> FeatureMonitor:
    torch.manual_seed(0)
    model, (x, y) = Canonical(depth), samples()
    dm.parametrize(model, base=Canonical(4), example_inputs=x, rule=rule)
    trained, monitor = optimizer(model.parameters(), lr=lr), FeatureMonitor(model, x)
    for step in range(steps):
        trained.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        trained.step()
        monitor.record(step)
    return monitor


def kinds(monitor: FeatureMonitor, **options) -> set[str]:
    return {finding.kind for finding in monitor.report(**options).findings}


def test_a_collapse_is_found_measured_and_explained() -> None:
    base, deep = run(4, "depth-mup"), run(64, "depth-mup")
    (stage,) = [stage for stage in deep.report(base).stages if stage.role == "inner"]

    def own(monitor: FeatureMonitor) -> float:
        rows = [r["own"] for r in monitor.rows if r["role"] == "inner" and r["step"] == 4]
        return math.sqrt(sum(value**2 for value in rows) / len(rows))

    assert stage.factor == pytest.approx(own(deep) / own(base)) and stage.predicted == pytest.approx(0.25)
    (finding,) = [f for f in deep.report(base).findings if f.kind == "collapse"]
    assert finding.where == "blocks"
    assert finding.text == (
        f"inner layers of blocks learn {1 / stage.factor:.2g}x less than at depth 4: collapse, as predicted for "
        "depth-mup (4x); rule depth-mup-corrected repairs it"
    )
    assert "healthy" not in kinds(deep, base=base)
    assert kinds(deep, base=base.frame()) == kinds(deep, base=base)


class TwoStreams(nn.Module):
    def __init__(self, first: int, second: int):
        super().__init__()
        self.one, self.two = blocks.Stack(first, blocks.PreNorm), blocks.Stack(second, blocks.PreNorm)
        self.join = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.join(self.one(x))))


@pytest.mark.parametrize("out, kept, depths", [("one", "two", (12, 3)), ("two", "one", (4, 2))])
def test_stages_that_a_plan_leaves_out_have_no_prediction(out: str, kept: str, depths: tuple[int, int]) -> None:
    model, x = TwoStreams(4, 12), torch.randn(4, 8)
    dm.parametrize(model, base=TwoStreams(2, 3), example_inputs=x, rule="depth-mup", exclude=[f"{out}.*"])
    monitor = FeatureMonitor(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    monitor.record(1)
    report = monitor.report()
    stages = {(stage.name, stage.role): stage for stage in report.stages}
    assert len(stages) == 4
    for role in ("inner", "outer"):
        left, scaled = stages[f"{out}.blocks", role], stages[f"{kept}.blocks", role]
        assert (left.exponent, left.base_additions, left.predicted) == (None, None, None)
        assert (scaled.exponent, scaled.additions, scaled.base_additions) == (-0.5, *depths)
    assert [finding.where for finding in report.findings if finding.kind == "collapse"] == [f"{kept}.blocks"]


def test_without_a_base_run_the_prediction_is_called_one() -> None:
    (finding,) = [f for f in run(64, "depth-mup").report().findings if f.kind == "collapse"]
    assert "predicted, not measured" in finding.text


def test_a_repaired_collapse_is_told_with_its_price() -> None:
    (finding,) = [
        f for f in run(64, "depth-mup-corrected").report(run(4, "depth-mup-corrected")).findings if f.kind == "repaired"
    ]
    assert "repaired by depth-mup-corrected" in finding.text
    assert "the price: the residual stream's update grows as depth^0.5, up to 4x here" in finding.text
    (finding,) = [f for f in run(64, "complete-p").report(run(4, "complete-p")).findings if f.kind == "repaired"]
    assert "price" not in finding.text


def test_a_plan_that_the_optimizer_ignores_is_not_called_repaired() -> None:
    plain = torch.optim.SGD
    deep, base = (
        run(64, "depth-mup-corrected", lr=1e-3, optimizer=plain),
        run(4, "depth-mup-corrected", lr=1e-3, optimizer=plain),
    )
    report = deep.report(base, family="sgd")
    (finding,) = [finding for finding in report.findings if finding.kind == "collapse"]
    assert "not predicted for depth-mup-corrected: check that the optimizer" in finding.text


def test_an_explosion_is_found_in_sizes_and_in_numbers_that_are_not_finite() -> None:
    assert "exploding" in kinds(run(16, "depth-mup-corrected", lr=1.0))
    model, x = Canonical(4), samples()[0]
    monitor = FeatureMonitor(model, x)
    with torch.no_grad():
        model.blocks[2].outer.weight.fill_(math.inf)
    monitor.record(0)
    (finding,) = [f for f in monitor.report().findings if f.kind == "exploding"]
    assert finding.where == "blocks.2.outer.weight" and "not finite" in finding.text
    assert "healthy" not in kinds(monitor)


def test_growth_through_the_depth_at_initialization_is_an_explosion() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + 4 * layer(x)
            return x

    model, x = Doubling(), torch.randn(4, 8)
    monitor = FeatureMonitor(model, x)
    with torch.no_grad():
        model.layers[0].weight.mul_(1.01)
    monitor.record(0)
    (finding,) = [f for f in monitor.report().findings if f.kind == "exploding"]
    assert "at initialization" in finding.text


def test_lazy_training_is_found() -> None:
    torch.manual_seed(0)
    model, (x, y) = Canonical(8), samples()
    monitor = FeatureMonitor(model, x)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-2)  # the readout learns, features stay
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        for block in model.blocks:
            block.inner.weight.add_(1e-6)
    monitor.record(0)
    assert kinds(monitor) == {"lazy"}


def test_healthy_training_is_healthy_and_an_untrained_network_is_not_judged() -> None:
    base = run(4, "depth-mup-corrected")
    assert kinds(base) == {"healthy"}
    assert kinds(run(16, "depth-mup-corrected"), base=base) == {"healthy", "repaired"}
    fresh = FeatureMonitor(Canonical(4), samples()[0])
    fresh.record(0)
    assert kinds(fresh) == {"untrained"}
    with pytest.raises(MeasurementError, match="nothing was recorded"):
        FeatureMonitor(Canonical(4), samples()[0]).report()


def test_a_report_prints_predicted_beside_measured() -> None:
    text = str(run(16, "depth-mup").report(run(4, "depth-mup")))
    (inner,) = [line for line in text.splitlines() if line.startswith("blocks") and " inner " in line]
    assert "-0.50" in inner and "0.5x" in inner and "rule depth-mup" in text
    assert all(len(line) <= 200 for line in text.splitlines())


# Figures


def test_the_coordinate_figure_draws_the_rules_slope_through_the_data() -> None:
    result = check(depths=(2, 4, 8))
    figure = coordinate_figure(result)
    top = figure.subfigs[0].axes
    assert len(top) == len(result.slopes)
    for axis, slope in zip(top, result.slopes, strict=True):
        assert axis.get_xscale() == axis.get_yscale() == "log"
        (guide,) = [line for line in axis.lines if str(line.get_label()).startswith("depth-mup-corrected ")]
        x, y = (np.log(np.asarray(values, float)) for values in guide.get_data())
        assert np.polyfit(x, y, 1)[0] == pytest.approx(slope.predicted, abs=1e-9)
    assert len(figure.subfigs[1].axes) == 3


def test_the_coordinate_figure_of_a_grid_has_a_row_for_widths() -> None:
    def make(depth: int, width: int) -> nn.Module:
        return Canonical(depth, width)

    result = check(depths=(2, 4), widths=(16, 32, 64), steps=1, make=make)
    depth, width, profiles = coordinate_figure(result).subfigs
    assert [len(part.axes) for part in (depth, width, profiles)] == [5, 4, 3]
    for axis in width.axes:
        assert axis.get_xlabel() == "width" and [tick.get_text() for tick in axis.get_xticklabels()] == [
            "16",
            "32",
            "64",
        ]
    told = [[text.get_text() for text in part.legends[0].get_texts()] for part in (depth, profiles)]
    assert told == [["16", "32", "64"], ["2", "4"]]


def test_the_monitor_figure_draws_a_line_for_each_layer() -> None:
    monitor = run(6, "depth-mup-corrected")
    inner, outer, stream = monitor_figure({"depth 6": monitor}).axes[:3]
    assert len(inner.lines) == len(outer.lines) == len(stream.lines) == 6
    row = [r for r in monitor.rows if r["layer"] == "blocks.0.outer.weight"]
    assert list(outer.lines[0].get_ydata()) == pytest.approx([r["own"] / r["folded"] for r in row])
    with pytest.raises(MeasurementError, match="no quantity is called"):
        monitor_figure(monitor, "speed")
