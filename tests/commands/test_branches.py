"""``depthmup branches``: what it prints."""

from __future__ import annotations

import re
from pathlib import Path

from torch_depthmup import cli


def test_branches_are_those_of_the_library(here: Path, capsys, tmp_path: Path) -> None:
    assert (
        cli.main(["branches", "user_net:make", "user_net:PAIR", "--depth", "4", "--out", str(tmp_path / "b.html")]) == 0
    )
    said = capsys.readouterr().out
    assert "4 residual branches in 1 stream of 4 additions" in said and "{1..4}.branch" in said
    assert re.search(r"\{1\.\.4\}\.branch\.\{0\.\.1\}\.weight +inner\n", said)
    assert re.search(r"\{1\.\.4\}\.branch\.3\.weight +outer +carrier\n", said)


def test_branches_whose_norms_stand_beside_them_are_folded_into_few_lines(here: Path, capsys, tmp_path: Path) -> None:
    out = str(tmp_path / "t.html")
    assert cli.main(["branches", "user_net:Transformer", "user_net:data", "--depth", "6", "--out", out]) == 0
    said = capsys.readouterr().out
    assert "12 residual branches in 1 stream of 12 additions" in said
    assert re.search(r"blocks\.\{0\.\.5\}\.before_feed_forward\.weight +inner\n", said)
    assert re.search(r"blocks\.\{0\.\.5\}\.attention\.out_proj\.bias +outer +carrier\n", said)
    *lines, report = said.splitlines()
    assert report == f"report: {out}" and len(lines) < 40 and max(map(len, lines)) <= 80
