"""``depthmup plan``: what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from torch_depthmup import cli


def test_the_plan_is_that_of_the_library(here: Path, capsys, tmp_path: Path) -> None:
    plan = ["plan", "user_net:make", "user_net:data", "--depth", "8", "--base-depth", "2", "--width", "32"]
    assert (
        cli.main([*plan, "--base-width", "16", "--rule", "complete-p", "--out", str(tmp_path / "new" / "p.html")]) == 0
    )
    said = capsys.readouterr().out
    assert "rule complete-p" in said and "depth multiplier 4, branch multiplier 0.25" in said
    assert "branch multiplier" in (tmp_path / "new" / "p.html").read_text()


@pytest.mark.filterwarnings("default")
def test_a_warning_takes_one_line_too(here: Path, capsys, tmp_path: Path) -> None:
    plan = ["plan", "user_net:warning", "user_net:data", "--depth", "16", "--base-depth", "2"]
    assert cli.main([*plan, "--out", str(tmp_path / "p.html")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said and set(said) == {"depthmup plan: warning: this network is slow"}
