"""``depthmup check``: its verdict and its page."""

from __future__ import annotations

from pathlib import Path

from terminal import line

from torch_depthmup import cli


def test_the_check_exits_with_its_verdict(here: Path, capsys, tmp_path: Path) -> None:
    check = ["check", "user_net:make", "user_net:data", "--depths", "4", "8", "16", "32", "--width", "64", "--out"]
    assert cli.main([*check, str(tmp_path / "holds.html")]) == 0
    assert "coordinate check of depth-mup-corrected with adam: holds" in capsys.readouterr().out
    page = (tmp_path / "holds.html").read_text()
    assert "Verdict: holds." in page and page.count("<td class=good>holds</td>") == 5
    cli_arguments = [*check, str(tmp_path / "large.html"), "--optimizer", "sgd", "--lr", "1e30", "--steps", "4"]
    assert cli.main(cli_arguments) == 2 and "smaller lr" in line(capsys)
