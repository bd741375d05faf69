"""What gradient independence gets wrong."""

from __future__ import annotations

from simulated import X, Y

from torch_depthmup.diagnostics.nfd import Setting, gia_gap


def test_the_gap_of_gradient_independence_is_seen_and_starts_at_zero() -> None:
    gap, error = gia_gap(Setting(depth=16, steps=4, lr=1.0), X[:2], Y[:2], width=4000, seeds=6).function()
    assert float(gap[0].abs().max()) == 0
    assert float((gap[-1, 0] / error[-1, 0]).abs()) > 4
