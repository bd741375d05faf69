"""The README's numbers against the code."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from torch_depthmup import cli
from torch_depthmup.rules import FAMILIES, RULES, depth_multipliers

README = Path(__file__).parents[1].joinpath("README.md").read_text()
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
    assert {line.split()[1] for line in COMMANDS} == set(cli.COMMANDS) - {"choose", "demo", "nfd"}
