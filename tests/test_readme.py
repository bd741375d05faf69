"""The README and the documentation against the code and the committed measurements; their Python runs."""

from __future__ import annotations

import csv
import importlib
import math
import re
import shlex
from pathlib import Path
from statistics import median

import pytest
from pages import PAGES, ROOT, code_of, run

from torch_depthmup import cli
from torch_depthmup.rules import FAMILIES, RULES, depth_multipliers

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^depthmup .*$", README, re.MULTILINE)
ROWS = re.findall(r'^\| (`"[^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$', README, re.MULTILINE)


def value(cell: str, ratio: float) -> float:
    return 1.0 if cell == "1" else ratio ** float(cell.removeprefix("r^"))


def test_every_rule_stands_in_the_table() -> None:
    assert {name for row in ROWS for name in re.findall(r'`"([\w-]+)"`', row[0])} == set(RULES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
@pytest.mark.parametrize("ratio", [1.0, 4.0, 7.5])
def test_the_table_says_what_the_rules_do(row: tuple[str, ...], ratio: float) -> None:
    for name in re.findall(r'`"([\w-]+)"`', row[0]):
        rule = RULES[name]
        found = [rule.branch_multiplier(ratio)]
        for family in ("sgd", "adam"):
            found += [depth_multipliers(rule, FAMILIES[family], role, ratio).lr for role in ("outer", "inner")]
        assert found == pytest.approx([value(cell, ratio) for cell in row[1:]])


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are run, on smaller networks, in test_commands.py."""
    _, name, *arguments = shlex.split(line)
    given = []
    room = importlib.import_module(cli.COMMANDS[name][0])
    monkeypatch.setattr(room, "run", lambda options: given.append(options) or 0)
    assert cli.main([name, *arguments]) == 0
    assert (given[0].model, given[0].data) == ("my_net:make", "my_net:data")


def test_every_command_on_ones_own_network_is_shown() -> None:
    assert {line.split()[1] for line in COMMANDS} == set(cli.COMMANDS) - {"demo", "nfd"}


@pytest.mark.parametrize("page", list(filter(code_of, PAGES)), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)
    printed = capsys.readouterr().out
    for shown in re.findall(r"^```\n\n```text\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        assert shown in printed


def medians(setup: str, rule: str, depth: int) -> dict[float, float]:
    """Learning rate -> median loss, of the runs that are committed."""
    losses: dict[float, list[float]] = {}
    with (ROOT / "examples" / "evidence" / f"cifar_transfer_{setup}.csv").open() as file:
        for row in csv.DictReader(file):
            if (row["rule"], int(row["depth"])) == (rule, depth):
                losses.setdefault(float(row["lr"]), []).append(float(row["loss"]))
    return {lr: median(values) for lr, values in losses.items()}


def cell(setup: str, rule: str) -> str:
    """Where the best learning rate is at each depth, and the loss of the deepest at that of the shallowest."""
    curves = [medians(setup, rule, depth) for depth in (4, 16, 64)]
    best = [min(curve, key=curve.__getitem__) for curve in curves]
    places = [
        f"{math.log2(lr):.0f}" if math.isfinite(curve[lr]) else "none" for curve, lr in zip(curves, best, strict=True)
    ]
    loss = curves[2][best[0]]
    return f"{', '.join(places)}; {f'{loss:.3f}' if math.isfinite(loss) else 'diverged'}"


@pytest.mark.parametrize("setup", ["adam", "sgd", "adam-norm"])
def test_the_readmes_measurements_are_the_committed_ones(setup: str) -> None:
    rules = ("mup", "depth-mup", "depth-mup-corrected", "complete-p")
    assert f"| `{setup}` | {' | '.join(cell(setup, rule) for rule in rules)} |" in README


@pytest.mark.parametrize(
    "run, name",
    [
        (("2", "64", "True"), "2 layers x 64, tuned"),
        (("12", "256", "True"), "12 x 256 with `dm.parametrize`"),
        (("12", "256", "False"), "12 x 256 without"),
    ],
)
def test_the_readmes_language_model_is_the_committed_one(run: tuple[str, str, str], name: str) -> None:
    losses: dict[float, list[float]] = {}
    with (ROOT / "examples" / "transfer_llm.csv").open() as file:
        for row in csv.DictReader(file):
            if (row["layers"], row["width"], row["plugin"]) == run:
                losses.setdefault(float(row["lr"]), []).append(float(row["loss"]))
    assert f"| {name} | {' | '.join(f'{median(losses[lr]):.2f}' for lr in sorted(losses))} |" in README


def test_the_readme_is_short() -> None:
    assert README.count("\n") < 150
