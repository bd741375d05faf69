"""The simulation against dense networks and closed forms."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import oracles
import pytest
import torch

import torch_depthmup as dm
from torch_depthmup.diagnostics.nfd import NFDResult, Setting, gia_gap, infinite_depth, memory_estimate, simulate
from torch_depthmup.diagnostics.nfd.comparison import compare, measure
from torch_depthmup.diagnostics.nfd.network import CanonicalResNet
from torch_depthmup.diagnostics.plots import comparison_figure, simulation_figure
from torch_depthmup.errors import DepthMuPError

GENERATOR = torch.Generator().manual_seed(0)
X = torch.nn.functional.normalize(torch.randn(3, 10, generator=GENERATOR)) * math.sqrt(10)
Y = torch.tensor([1.0, -1.0, 0.5])


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


@pytest.mark.parametrize("coupling, limit", [("reused", math.e), ("decoupled", math.e - 1)])
def test_the_linear_network_moves_by_e_and_by_e_minus_one(coupling, limit: float) -> None:
    x, lr, depth = X[:1].double(), 1e-3, 200
    result = simulate(
        Setting(depth=depth, steps=1, lr=lr, activation="identity"),
        x,
        torch.ones(1),
        width=10000,
        seeds=8,
        coupling=coupling,
        dtype=torch.float64,
    )
    f = result.outputs[:, :, 0, 0]
    q, v = result.stream_moment[:, 0, 0], result.gradient_moment[:, 0, -1]  # |h_0|^2 / n and |v|^2 / n of each seed
    moved = -(f[:, 1] - f[:, 0]) / (lr * (f[:, 0] - 1) * q * v)
    wanted = oracles.linear_first_order(depth, coupling)
    assert wanted == pytest.approx(limit, rel=0.01)
    assert float(moved.mean()) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("activation, rate", [("identity", 1.0), ("relu", 0.5)])
def test_initial_moments_grow_as_the_closed_form(activation: str, rate: float) -> None:
    depth, horizon = 20, 1.5
    result = simulate(
        Setting(depth=depth, steps=1, lr=0.0, activation=activation, horizon=horizon), X[:1], Y[:1], width=20000
    )
    layers = torch.arange(depth + 1)
    grown = (1 + rate * horizon / depth) ** layers
    stream = result.mean("stream_moment")[0]
    torch.testing.assert_close(stream / stream[0], grown, rtol=0.05, atol=0)
    gradient = result.mean("gradient_moment")[0]
    torch.testing.assert_close(gradient / gradient[-1], grown.flip(0), rtol=0.05, atol=0)


RULES = ["depth-mup", "depth-mup-corrected", "complete-p", "mup"]


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


OPTIONS = {
    "readout, input, momentum": {"train_readout": True, "train_input": True, "momentum": 0.5},
    "mini-batches": {"batch_size": 2, "momentum": 0.9},
    "silu, horizon": {"activation": "silu", "horizon": 2.0},
}


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


def test_the_independent_network_is_decoupled_and_not_reused() -> None:
    common = {"depth": 6, "steps": 3, "lr": 1.0, "block_layers": 2}
    measured = measure(Setting(**common), X, Y, width=400, seeds=16, backward="independent")
    z = {
        coupling: float(
            compare(simulate(Setting(**common), X, Y, width=4000, seeds=8, coupling=coupling), measured)
            .z("outputs")
            .abs()
            .max()
        )
        for coupling in ("reused", "decoupled")
    }
    assert z["decoupled"] < 4 < z["reused"]


def test_the_gap_of_gradient_independence_is_seen_and_starts_at_zero() -> None:
    gap, error = gia_gap(Setting(depth=16, steps=4, lr=1.0), X[:2], Y[:2], width=4000, seeds=6).function()
    assert float(gap[0].abs().max()) == 0
    assert float((gap[-1, 0] / error[-1, 0]).abs()) > 4


def test_held_out_points_change_nothing_and_are_evaluated() -> None:
    setting, common = Setting(depth=4, steps=3, lr=1.0), {"width": 8000, "seeds": 6}
    points = torch.cat([X, X[:1] + 0.3])
    result = simulate(setting, X, Y, **common, held_out=points)
    assert result.held_out.shape == (6, 4, 4, 1)
    torch.testing.assert_close(result.held_out[:, :, :3], result.outputs, rtol=1e-3, atol=1e-4)
    alone = simulate(setting, X, Y, **common)
    difference = (alone.outputs - result.outputs).mean(0) / (2 * alone.error("outputs").square() + 1e-12).sqrt()
    assert float(difference.abs().max()) < 4.5


def test_seeds_in_a_batch_are_seeds_alone() -> None:
    setting, common = Setting(depth=3, steps=2, lr=1.0), {"width": 500, "dtype": torch.float64}
    together = simulate(setting, X, Y, **common, seeds=[3, 8])
    alone = simulate(setting, X, Y, **common, seeds=[8])
    torch.testing.assert_close(together.outputs[1], alone.outputs[0], rtol=1e-9, atol=1e-12)


def test_collapse_and_its_repair() -> None:
    """Inner layers' own update at depth 4 and 64: 1/4 uncorrected, unchanged corrected."""
    sizes = {}
    for rule in ("depth-mup", "depth-mup-corrected"):
        sizes[rule] = [
            float(
                simulate(
                    Setting(depth=depth, base_depth=4, steps=1, lr=0.05, block_layers=2, rule=rule), X, Y, width=2000
                )
                .mean("inner_own")[-1]
                .mean()
            )
            for depth in (4, 64)
        ]
    assert sizes["depth-mup"][1] / sizes["depth-mup"][0] == pytest.approx(1 / 4, rel=0.15)
    assert sizes["depth-mup-corrected"][1] / sizes["depth-mup-corrected"][0] == pytest.approx(1, rel=0.15)


# Results


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_result_prints_as_a_short_table(seeds: int) -> None:
    result = simulate(Setting(depth=4, steps=2, lr=0.5, block_layers=2), X, Y, width=256, seeds=seeds)
    lines = str(result).splitlines()
    first, last = (line.split() for line in (lines[-3], lines[-1]))
    assert first[0] == "0" and (first[3] == "–") == (seeds == 1) and first[4:] == ["0"] * 4
    assert float(last[1]) == pytest.approx(float(result.mean("losses")[-1]), rel=5e-3)
    assert float(last[4]) == pytest.approx(float(result.mean("stream_update")[-1].mean()), rel=5e-3)
    assert len(lines) < 10 and max(map(len, lines)) <= 80


def test_results_are_saved_loaded_framed(tmp_path: Path) -> None:
    result = simulate(Setting(depth=3, steps=2, lr=1.0, rule=dm.Rule("mine", alpha=0.7)), X, Y, width=300)
    result.save(tmp_path / "run.pt")
    loaded = NFDResult.load(tmp_path / "run.pt")
    assert loaded.setting == result.setting and torch.equal(loaded.outputs, result.outputs)
    frame = result.frame()
    assert set(frame.columns) == {"step", "t", "quantity", "mean", "error"}
    assert len(frame) == 3 * (3 * 4 + 3 * 3)
    with pytest.raises(DepthMuPError, match="not a saved"):
        torch.save({"a": 1}, tmp_path / "other.pt")
        NFDResult.load(tmp_path / "other.pt")
    own = simulate(Setting(depth=2, steps=1, lr=1.0, activation=torch.sin), X, Y, width=300)
    with pytest.raises(DepthMuPError, match="activation by name"):
        own.save(tmp_path / "own.pt")


def test_the_canonical_network_is_found_like_any_other() -> None:
    for layers in (1, 2):
        setting = Setting(depth=5, steps=0, lr=1.0, block_layers=layers)
        branches = dm.find_branches(CanonicalResNet(setting, 10, 1, 32), X)
        assert [branch.additions for branch in branches] == [5] * 5 and branches[0].levels == layers


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": 0}, "depth must be a whole number of at least 1"),
        ({"depth": 2.5}, "depth must be a whole number"),
        ({"width": 0}, "width must be a positive"),
        ({"steps": -1}, "steps must be"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"activation": "gelo"}, "no activation is called 'gelo'"),
        ({"rule": "deep"}, "no rule is called"),
        ({"block_layers": 3}, "block_layers"),
        ({"loss": "hinge"}, "loss must be"),
        ({"loss": "cross_entropy"}, "class indices"),
        ({"seeds": []}, "at least one integer"),
        ({"batch_size": 0}, "batch_size"),
        ({"width": 20}, r"ask 21 questions.*smallest width is 22"),
        ({"width": 10**9}, "GB"),
        ({"coupling": "reuse"}, "coupling must be one of 'reused', 'decoupled'"),
        ({"dtype": torch.bfloat16}, "dtype must be torch.float32 or torch.float64"),
        ({"held_out": torch.zeros(2, 3)}, r"held_out must be finite, of shape \(points, 10\)"),
    ],
)
def test_bad_arguments_are_refused(change, message: str) -> None:
    with pytest.raises(DepthMuPError, match=message):
        own = {name: value for name, value in change.items() if name not in Setting.__annotations__}
        setting = {"depth": 2, "steps": 3, "lr": 1.0} | {n: v for n, v in change.items() if n not in own}
        simulate(Setting(**setting), X, Y, **{"width": 300, **own})


@pytest.mark.parametrize(
    "inputs, targets, message",
    [
        (X[0], Y, "shape"),
        (X, Y[:2], "3 inputs and 2 targets"),
        (X * float("inf"), Y, "not all finite"),
        (X, Y * float("nan"), "not all finite"),
    ],
)
def test_bad_data_is_refused(inputs: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(DepthMuPError, match=message):
        simulate(Setting(depth=2, steps=1, lr=1.0), inputs, targets, width=300)


def test_divergence_says_where_and_returns_what_there_is() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = simulate(Setting(depth=8, steps=20, lr=1e9, activation="relu"), X, Y, width=300)
    assert result.diverged is not None and 0 < result.outputs.shape[1] <= 20
    assert any("diverged at step" in str(warning.message) for warning in caught)
    assert bool(torch.isfinite(result.outputs).all())


def test_the_memory_estimate_is_that_of_the_tensors() -> None:
    setting = Setting(depth=8, steps=4, lr=1.0, block_layers=2)
    estimate = memory_estimate(setting, 3, 0, 1000, 2)
    bases = 8 * 2 * 2 * (15 + 12) * 1000 * 2 * 4  # forward and backward queries of both matrices, with products
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
