"""Forward and backward passes of the canonical network in products."""

from __future__ import annotations

import math
import warnings

import oracles
import pytest
import torch
from simulated import X, Y

from torch_depthmup.diagnostics.nfd import Setting, simulate


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


def test_held_out_points_change_nothing_and_are_evaluated() -> None:
    setting, common = Setting(depth=4, steps=3, lr=1.0), {"width": 8000, "seeds": 6}
    points = torch.cat([X, X[:1] + 0.3])
    result = simulate(setting, X, Y, **common, held_out=points)
    assert result.held_out.shape == (6, 4, 4, 1)
    torch.testing.assert_close(result.held_out[:, :, :3], result.outputs, rtol=1e-3, atol=1e-4)
    alone = simulate(setting, X, Y, **common)
    difference = (alone.outputs - result.outputs).mean(0) / (2 * alone.error("outputs").square() + 1e-12).sqrt()
    assert float(difference.abs().max()) < 4.5


def test_divergence_says_where_and_returns_what_there_is() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = simulate(Setting(depth=8, steps=20, lr=1e9, activation="relu"), X, Y, width=300)
    assert result.diverged is not None and 0 < result.outputs.shape[1] <= 20
    assert any("diverged at step" in str(warning.message) for warning in caught)
    assert bool(torch.isfinite(result.outputs).all())
