"""Sizes by layer, as they come."""

from __future__ import annotations

import pytest
import torch
from simulated import X, Y

from torch_depthmup.diagnostics.nfd import Setting, simulate


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
