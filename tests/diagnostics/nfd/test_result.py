"""What a simulation gave: printed, saved, framed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from simulated import X, Y

import torch_depthmup as dm
from torch_depthmup.diagnostics.nfd import NFDResult, Setting, simulate
from torch_depthmup.errors import DepthMuPError


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
