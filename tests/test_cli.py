"""The command line as a person meets it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def depthmup(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch_depthmup.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["demo", "--seeds", "0"],
        ["demo", "--optimizer", "lion"],
        ["demo", "--depths", "four"],
        ["demo", "-x"],
    ],
)
def test_bad_arguments_take_one_line_and_exit_code_2(arguments: list[str]) -> None:
    result = depthmup(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1 and "--help" in result.stderr


def test_an_impossible_folder_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = depthmup("demo", "--quick", "--out", str(tmp_path / "file"))
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1


def test_help_says_it_all() -> None:
    assert "demo" in depthmup("--help").stdout
    text = depthmup("demo", "--help").stdout
    for option in ("--quick", "--depths", "--rules", "--seeds", "--steps", "--width", "--optimizer", "--out"):
        assert option in text


def test_the_demo_prints_its_table_and_writes_figure_and_runs(tmp_path: Path) -> None:
    result = depthmup("demo", "--depths", "2", "4", "--steps", "5", "--seeds", "2", "--width", "16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in (
        "mup",
        "depth-mup",
        "depth-mup-corrected",
        "complete-p",
        "with lr of 2",
        "held out, depth 4",
        "best lr",
    ):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    out = tmp_path / "depthmup-demo"
    assert (out / "transfer.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((out / "transfer.json").read_text())
    assert len(data["runs"]) == 4 * 2 * 8 * 2
    assert data["rules"]["mup"]["drift_factors_of_two"]["2"] == "+0.0±0.0"


def test_runs_that_all_diverge_are_reported_and_written(tmp_path: Path) -> None:
    """Learning rates far too large: no best one anywhere, and the JSON is JSON."""
    code = (
        "import sys; from torch_depthmup import cli; from torch_depthmup.commands import demo;"
        "demo.GRIDS['sgd'] = (30, 31);"
        "sys.exit(cli.main(['demo', '--optimizer', 'sgd', '--depths', '2', '3', '--steps', '30', '--seeds', '2',"
        " '--rules', 'mup', 'complete-p']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no rule trains at depth 3" in result.stdout
    data = json.loads((tmp_path / "depthmup-demo" / "transfer.json").read_text(), parse_constant=pytest.fail)
    assert data["rules"]["mup"]["best_lr"]["2"] is None


def test_cifar10_is_read_from_a_file(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    arrays = {
        f"{part}_{name}": dice.integers(0, high, size, dtype=np.uint8)
        for part, count in (("train", 512), ("test", 64))
        for name, high, size in (("images", 256, (count, 4, 4, 3)), ("labels", 10, (count,)))
    }
    np.savez(tmp_path / "small.npz", **arrays)
    demo = ["demo", "--data", "cifar10", "--path", "small.npz", "--depths", "2", "4", "--seeds", "1", "--width", "16"]
    result = depthmup(*demo, "--rules", "complete-p", "--steps", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "held out, depth 4 with lr of 2" in result.stdout
    result = depthmup(*demo, "--steps", "5", cwd=tmp_path)
    assert result.returncode == 2 and "more than one pass over 512: use fewer steps" in result.stderr
    np.savez(tmp_path / "small.npz", images=arrays["test_images"])
    result = depthmup(*demo, cwd=tmp_path)
    assert result.returncode == 2 and "has no train_images, only images" in result.stderr
