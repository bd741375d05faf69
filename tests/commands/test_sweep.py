"""``depthmup sweep``: its grid, its runs and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
from terminal import MODULE, SWEEP, line

from torch_depthmup import cli
from torch_depthmup.commands.sweep import learning_rates


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("0.01", [0.01]),
        ("2^-8", [2**-8]),
        ("2^-4..2^-2", [2**-4, 2**-3, 2**-2]),
        ("1e-3..9e-3", [1e-3, 2e-3, 4e-3, 8e-3]),
    ],
)
def test_learning_rates_are_numbers_powers_and_ranges(text: str, numbers: list[float]) -> None:
    assert learning_rates(text) == pytest.approx(numbers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0",
        "-1",
        "nan",
        "inf",
        "2^",
        "2^-4..",
        "2^-2..2^-4",
        "2^-8...2^-4",
        "1...2",
        "0^-1",
        "2^1e9",
        "(-1)^0.5",
    ],
)
def test_what_is_no_learning_rate_is_refused(here: Path, capsys, text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", "user_net:make", "user_net:data", "--depths", "2", f"--lrs={text}"])
    assert caught.value.code == 2 and "must" in line(capsys)


def test_a_page_does_not_overwrite_the_runs(here, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "x.jsonl")
    assert cli.main(["sweep", "user_net:make", "user_net:data", *SWEEP[1:], "--out", out]) == 2
    assert "the report and the finished runs cannot be one file" in line(capsys)


def test_a_stopped_sweep_is_taken_up(here: Path, capsys, tmp_path: Path) -> None:
    sweep = ["sweep", "user_net:make", "user_net:data", "--depths", "2", "4", "--lrs", "2^-10..2^-4", "--steps", "3"]
    sweep += ["--seeds", "2", "--rules", "mup", "depth-mup-corrected", "--out", str(tmp_path / "sweep.html")]
    assert cli.main(sweep) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines()[:6])) <= 80
    lines = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 7 * 2
    (tmp_path / "sweep.jsonl").write_text("\n".join(lines[:20]) + "\n")
    assert cli.main(sweep) == 0
    assert capsys.readouterr().out == said
    again = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert again[:20] == lines[:20] and len(again) == len(lines)


def test_a_sweep_of_edited_code_is_not_taken_up(here: Path, capsys, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "edited_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    sweep = ["sweep", "edited_net:make", "edited_net:data", *SWEEP[1:], "--rules", "mup"]
    assert cli.main(sweep) == 0 and cli.main(sweep) == 0
    (tmp_path / "edited_net.py").write_text(MODULE.replace("width=16", "width=24"))
    capsys.readouterr()
    assert cli.main(sweep) == 2 and "another model, training, data or base depth" in line(capsys)
