"""Measured rows beside predicted ones."""

from __future__ import annotations

import functools
import math
import statistics

import pytest
import torch
from scipy import stats
from torch import nn
from wide import WIDTH, Norms, Torch, Transformer, X, Y, sgd, watched

import torch_depthmup as dm
from torch_depthmup.diagnostics.monitor.beside import _compared, beside
from torch_depthmup.diagnostics.nfd import predict
from torch_depthmup.diagnostics.nfd.comparison import compare
from torch_depthmup.errors import MeasurementError


@functools.cache
def predicted(make: type[nn.Module] = Norms, seeds: int = 8, steps: int = 3):
    return predict(make, X, Y, width=WIDTH, optimizer=sgd, steps=steps, probe=X, seeds=range(100, 100 + seeds))


@pytest.mark.parametrize("make", [Norms, Transformer, Torch])
def test_networks_move_as_predicted(make: type[nn.Module]) -> None:
    found = compare(predicted(make), [watched(make, seed)[1] for seed in range(8)])
    assert found.agrees, found.verdict
    assert found.verdict.startswith("features move as predicted")
    own = [value for value in found.values if value.quantity == "own" and value.role != "outside"]
    assert len(own) >= 4 and all(value.measured > 0 for value in own)
    assert set(found.frame().quantity) >= {"size", "update", "own", "below", "added"}


def faster(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.5, nesterov=True, weight_decay=1e-3)


def frozen(model: nn.Module) -> torch.optim.Optimizer:
    model.up.requires_grad_(False)
    return sgd(model)


def corrected(model: nn.Module) -> torch.optim.Optimizer:
    dm.parametrize(model, depth_multiplier=2, example_inputs=X)
    return dm.SGD(model, lr=0.02)


@pytest.mark.parametrize("optimizer", [faster, frozen, corrected])
def test_networks_that_were_trained_otherwise_do_not(optimizer) -> None:
    found = compare(predicted(), [watched(Norms, seed, optimizer=optimizer)[1] for seed in range(8)])
    assert not found.agrees
    assert found.verdict.startswith("features do not move as predicted") and "farthest is" in found.verdict


def test_a_single_network_has_the_predictions_spread_in_the_report() -> None:
    monitor = watched(Norms, 3)[1]
    report = monitor.report(prediction=predicted())
    assert [finding.kind for finding in report.findings if finding.kind in ("agrees", "differs")] == ["agrees"]
    value = next(v for v in report.beside.values if v.name == "up.0.weight" and v.quantity == "own")
    runs = [next(r["own"] for r in rows if r["layer"] == "up.0.weight" and r["step"] == 3) for rows in predicted().rows]
    assert value.predicted == pytest.approx(statistics.fmean(runs))
    assert value.error == pytest.approx(statistics.stdev(runs) * math.sqrt(1 + 1 / 8))
    lines = str(report).splitlines()
    (line,) = [line for line in lines if line.startswith("up.0.weight")]
    assert f"{value.measured / value.predicted:.3f} ±" in line
    other = watched(Norms, 3, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))[1]
    assert "differs" in {finding.kind for finding in other.report(prediction=predicted()).findings}


def test_few_seeds_make_an_error_uncertain() -> None:
    """z is as rare as Student's t says."""
    ours, theirs = [1.0, 2.0, 4.0], [5.0, 7.0, 8.0, 6.5]
    t = stats.ttest_ind(ours, theirs, equal_var=False)
    mean, other, error, z = _compared(ours, theirs)
    assert (mean - other) / error == pytest.approx(t.statistic)
    assert stats.norm.sf(-z) * 2 == pytest.approx(t.pvalue, rel=0.06)


def rows(step: int = 1, layer: str = "a", own: float = 1.0) -> list[dict]:
    common = {"step": step, "branch": "", "position": -1, "role": "outside", **dict.fromkeys(
        ("size", "update", "initial", "below", "added", "spread", "own_share"), 1.0)}  # fmt: skip
    return [
        {"kind": "function", "layer": "", "own": math.nan, **common},
        {"kind": "layer", "layer": layer, "own": own, **common},
    ]


@pytest.mark.parametrize(
    "measured, prediction, message",
    [
        ([rows()], [], "not watched: nfd.predict.*probe="),
        ([rows()], [rows()], "one seed has no standard error"),
        ([rows(step=2)], [rows(), rows()], "prediction has no record at step 2, only at 1"),
        ([rows(layer="b")], [rows(), rows()], "watched in one of the runs only"),
        ([[]], [rows(), rows()], "nothing was recorded"),
    ],
)
def test_what_cannot_be_compared_is_refused(measured, prediction, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        beside(measured, prediction)


def test_many_layers_are_summed_up() -> None:
    def deep(own: float) -> list[dict]:
        return [row for i in range(40) for row in rows(layer=f"{i}.weight", own=own * (1 + (i == 30)))[i > 0 :]]

    found = beside([deep(1.0)], [deep(0.99), deep(1.01)])
    assert len(str(found).splitlines()) == 2 + 16 + 1 and str(found).endswith("and 25 layers that are nearer")
