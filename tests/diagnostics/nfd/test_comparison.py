"""The simulation beside networks trained by the package."""

from __future__ import annotations

import pytest
import torch
from simulated import OPTIONS, RULES, X, Y

from torch_depthmup.diagnostics.nfd import NFDResult, Setting, simulate
from torch_depthmup.diagnostics.nfd.comparison import compare, measure
from torch_depthmup.errors import DepthMuPError


@pytest.mark.parametrize("block_layers", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_all_quantities_agree_with_networks_trained_by_the_package(block_layers, rule: str) -> None:
    common = {
        "depth": 6,
        "steps": 3,
        "lr": 1.0,
        "activation": "tanh",
        "block_layers": block_layers,
        "rule": rule,
        "base_depth": 2,
    }
    predicted = simulate(Setting(**common), X, Y, width=4000, seeds=8)
    measured = measure(Setting(**common), X, Y, width=400, seeds=16)
    comparison = compare(predicted, measured)
    assert float(comparison.z("outputs").abs().max()) < 4
    assert comparison.verdict.startswith("agrees"), comparison.verdict


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_agree_with_networks_too(name: str) -> None:
    common = {"depth": 4, "steps": 4, "lr": 0.5, "block_layers": 2, **OPTIONS[name]}
    comparison = compare(
        simulate(Setting(**common), X, Y, width=4000, seeds=8), measure(Setting(**common), X, Y, width=400, seeds=16)
    )
    assert comparison.verdict.startswith("agrees"), comparison.verdict


@pytest.mark.parametrize("loss, targets", [("mse", torch.eye(3)), ("cross_entropy", torch.arange(3))])
def test_several_outputs_agree_with_networks(loss, targets: torch.Tensor) -> None:
    common = {"depth": 4, "steps": 3, "lr": 1.0, "loss": loss}
    comparison = compare(
        simulate(Setting(**common), X, targets, width=4000, seeds=8),
        measure(Setting(**common), X, targets, width=400, seeds=16),
    )
    assert comparison.predicted.outputs.shape == (8, 4, 3, 3)
    assert comparison.verdict.startswith("agrees"), comparison.verdict


def test_a_wrong_learning_rate_does_not_agree() -> None:
    """The comparison can fail: 10 % more learning rate on one side is seen."""
    common = {"depth": 6, "steps": 3, "block_layers": 2, "base_depth": 2}
    predicted = simulate(Setting(**common, lr=1.0), X, Y, width=4000, seeds=8)
    measured = measure(Setting(**common, lr=1.1), X, Y, width=400, seeds=16)
    with pytest.raises(DepthMuPError, match="settings differ"):
        compare(predicted, measured)
    relabelled = NFDResult(**{**vars(measured), "setting": predicted.setting})
    assert compare(predicted, relabelled).verdict.startswith("differs")


@pytest.mark.evidence
@pytest.mark.parametrize("block_layers", [1, 2])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("rule", ["depth-mup", "depth-mup-corrected", "complete-p"])
def test_wide_dense_networks_agree(block_layers, activation: str, rule: str) -> None:
    common = {
        "depth": 8,
        "steps": 3,
        "lr": 1.0,
        "activation": activation,
        "block_layers": block_layers,
        "rule": rule,
        "base_depth": 2,
    }
    predicted = simulate(Setting(**common), X, Y, width=8000, seeds=16)
    comparison = compare(predicted, measure(Setting(**common), X, Y, width=1024, seeds=12))
    assert float(comparison.z("outputs").abs().max()) < 4
    assert comparison.verdict.startswith("agrees"), comparison.verdict
