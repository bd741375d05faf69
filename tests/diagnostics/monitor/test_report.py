"""What a monitor's numbers mean, in words."""

from __future__ import annotations

import math

import blocks
import pytest
import torch
from canonical import Canonical, samples
from torch import Tensor, nn
from trained import run

import torch_depthmup as dm
from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.errors import MeasurementError


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
        f"inner layers of blocks learn {1 / stage.factor:.2g}x less than in the base of 4 additions: collapse, "
        "as predicted for depth-mup (4x); rule depth-mup-corrected repairs it"
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
    assert [finding.where for finding in report.findings if finding.kind == "predicted"] == [f"{kept}.blocks"]


def test_without_a_base_run_the_prediction_is_called_one() -> None:
    (finding,) = [f for f in run(64, "depth-mup").report().findings if f.kind == "predicted"]
    assert "not measured" in finding.text


def test_a_repaired_collapse_is_told_with_its_price() -> None:
    (finding,) = [
        f for f in run(64, "depth-mup-corrected").report(run(4, "depth-mup-corrected")).findings if f.kind == "repaired"
    ]
    assert "repaired by depth-mup-corrected" in finding.text
    assert "the price: the residual stream's update grows as depth^0.5, up to 4x here" in finding.text
    (finding,) = [f for f in run(64, "complete-p").report(run(4, "complete-p")).findings if f.kind == "repaired"]
    assert "price" not in finding.text


@pytest.mark.filterwarnings("ignore:a plain")  # that is the mistake
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
    (finding,) = [f for f in monitor.report().findings if f.kind == "diverged"]
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
    assert kinds(monitor) == {"lazy", "frozen"}


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


def test_a_deep_run_without_a_base_is_not_called_healthy_or_repaired() -> None:
    assert kinds(run(16, "depth-mup-corrected")) == {"predicted", "unknown"}
    assert kinds(run(16, "mup")) == {"unknown"}


def test_layers_that_are_not_trained_are_frozen_and_named() -> None:
    monitor = run(8, "depth-mup-corrected", optimizer=lambda p, lr: dm.Adam([*p][:5], lr=lr))
    found = [f for f in monitor.report().findings if f.kind == "frozen"]
    assert {f.text.partition(" have")[0] for f in found} == {
        "6 of 8 inner layers of blocks",
        "7 of 8 outer layers of blocks",
    }


@pytest.mark.parametrize("last, wanted", [(1.1, False), (1.8, True)])
def test_a_stream_that_has_stopped_growing_does_not_explode(last: float, wanted: bool) -> None:
    """Twenty times the initial size is a long training's affair; still growing by half is not."""
    monitor = run(4, "depth-mup-corrected", steps=3)
    for row in monitor.rows:
        if row["kind"] == "stream":
            row["size"] = row["start"] * 20 * (1.0 if row["step"] < 2 else last)
    assert ("exploding" in kinds(monitor)) == wanted


def test_features_that_are_alike_for_all_samples_have_collapsed() -> None:
    class OneForAll(blocks.Stack):
        collapsed = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:1].expand_as(x) if self.collapsed else x)

    model, x = OneForAll(3, blocks.PreNorm), torch.randn(6, 8)
    with FeatureMonitor(model, x) as monitor:
        model.collapsed = True
        monitor.record(1)
    assert "collapsed" in kinds(monitor)


def test_a_base_without_the_step_is_refused() -> None:
    with pytest.raises(MeasurementError, match="base has no record at step 4, only at 0, 1, 2"):
        run(8, "depth-mup").report(run(4, "depth-mup", steps=3))
