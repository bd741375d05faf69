"""The simulation against dense networks and closed forms."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from simulated import X, Y

from torch_depthmup.diagnostics.nfd import Setting, infinite_depth, memory_estimate, simulate
from torch_depthmup.diagnostics.nfd.comparison import compare, measure
from torch_depthmup.diagnostics.plots import comparison_figure, simulation_figure


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("coupling", ["reused", "decoupled"])
def test_outputs_follow_dense_networks_written_by_hand(activation: str, coupling) -> None:
    """Every output within 4 standard errors, and the dense mean tells the two couplings apart where they differ."""
    common = {"depth": 6, "steps": 3, "lr": 2.0, "activation": activation}
    predicted = simulate(Setting(**common), X, Y, width=6000, seeds=8, coupling=coupling).outputs[..., 0]
    dense = torch.stack(
        [
            oracles.dense_training(X, Y, **common, width=400, seed=seed, independent=coupling == "decoupled")
            for seed in range(24)
        ]
    )
    assert float((dense.mean(0)[-1] - dense.mean(0)[0]).abs().max()) > 0.5  # the function moved
    for value in (dense, predicted):
        assert value.shape[1:] == (4, 3)
    error = (dense.var(0) / len(dense) + predicted.var(0) / len(predicted)).sqrt()
    assert float(((dense.mean(0) - predicted.mean(0)) / error).abs().max()) < 4


def test_seeds_in_a_batch_are_seeds_alone() -> None:
    setting, common = Setting(depth=3, steps=2, lr=1.0), {"width": 500, "dtype": torch.float64}
    together = simulate(setting, X, Y, **common, seeds=[3, 8])
    alone = simulate(setting, X, Y, **common, seeds=[8])
    torch.testing.assert_close(together.outputs[1], alone.outputs[0], rtol=1e-9, atol=1e-12)


def test_the_memory_estimate_is_that_of_the_tensors() -> None:
    setting = Setting(depth=8, steps=4, lr=1.0, block_layers=2)
    estimate = memory_estimate(setting, 3, 0, 1000, 2)
    bases = 8 * 2 * 2 * (15 + 12) * 1000 * 2 * 3  # 4 bytes: queries of both matrices and passes, 2 bytes: products
    assert bases < estimate < 1.3 * bases


def test_figures_have_their_panels() -> None:
    common = {"depth": 3, "steps": 2, "lr": 1.0, "block_layers": 2}
    predicted = simulate(Setting(**common), X, Y, width=300, seeds=2)
    assert [axis.get_title() for axis in simulation_figure(predicted).axes][:2] == ["loss", "outputs"]
    comparison = compare(predicted, measure(Setting(**common), X, Y, width=50, seeds=2))
    assert len(comparison_figure(comparison).axes) == 4
    frame = comparison.frame()
    assert set(frame.columns) == {"quantity", "step", "t", "predicted", "measured", "z"} and frame.t.max() == 1


@pytest.mark.evidence
def test_the_error_of_the_mean_falls_like_one_over_width() -> None:
    """Of the finite network's own law, which the simulation has exactly; the loss, whose bias is clear of noise."""
    common = {"depth": 4, "steps": 2, "lr": 2.0, "block_layers": 2}
    limit = simulate(Setting(**common), X, Y, width=20000, seeds=32).losses[:, -1].mean()
    widths, gaps = (32, 64, 128), []
    for width in widths:
        losses = torch.cat(
            [
                simulate(Setting(**common), X, Y, width=width, seeds=range(i, i + 1000)).losses[:, -1]
                for i in range(0, 8000, 1000)
            ]
        )
        gap, error = (losses.mean() - limit).abs(), losses.std() / math.sqrt(len(losses))
        assert gap > 5 * error
        gaps.append(float(gap))
    slope = math.log(gaps[0] / gaps[-1]) / math.log(widths[0] / widths[-1])
    assert slope == pytest.approx(-1, abs=0.25)


@pytest.mark.evidence
def test_the_error_in_depth_falls_like_one_over_depth() -> None:
    limit = infinite_depth(
        Setting(depth=2, steps=2, lr=1.0, activation="relu"), X, Y, depths=[2, 4, 8, 16, 32], width=30000, seeds=32
    )
    assert limit.rate == pytest.approx(1, abs=0.25) and limit.rate_error < 0.25
