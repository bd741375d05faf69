"""A run, and the file of finished runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from torch_depthmup.diagnostics.transfer.runs import Job, Run, appending
from torch_depthmup.errors import DepthMuPError


@pytest.mark.parametrize("loss", [0.3, math.inf])
def test_runs_survive_json_also_diverged_ones(loss: float) -> None:
    run = Run(Job("mup", 4, 0.1, 0), loss, 1.0)
    assert Run.from_json(run.to_json()) == run


def test_a_file_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    run = Run(Job("mup", 4, 0.1, 0), 0.3, 1.0)
    with appending(path, "x") as append:
        append(run)
        with pytest.raises(DepthMuPError, match="is being written by another sweep"), appending(path, "x"):
            pass
    with appending(path, "x") as append:
        append(run)
    assert path.read_text().count("\n") == 3
