"""The canonical network as a module."""

from __future__ import annotations

from simulated import X, Y

import torch_depthmup as dm
from torch_depthmup.diagnostics.nfd import Setting, simulate
from torch_depthmup.diagnostics.nfd.comparison import compare, measure
from torch_depthmup.diagnostics.nfd.network import CanonicalResNet


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


def test_the_canonical_network_is_found_like_any_other() -> None:
    for layers in (1, 2):
        setting = Setting(depth=5, steps=0, lr=1.0, block_layers=layers)
        branches = dm.find_branches(CanonicalResNet(setting, 10, 1, 32), X)
        assert [branch.additions for branch in branches] == [5] * 5 and branches[0].levels == layers
