"""A run, and the file of finished runs."""

from __future__ import annotations

import math

from torch_depthmup.diagnostics.transfer.runs import Job, Run


def test_runs_survive_json_also_diverged_ones() -> None:
    for run in (Run(Job("mup", 4, 0.1, 0), 0.3, 1.0), Run(Job("mup", 4, 0.1, 0), math.inf, 1.0)):
        assert Run.from_json(run.to_json()) == run
