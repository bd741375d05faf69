"""The tables of docs/reference/rules.md against the papers' numbers, written out by hand."""

from __future__ import annotations

import re
import sys

import pytest
from pages import ROOT

sys.path.append(str(ROOT / "docs"))
import rule_tables  # noqa: E402  it stands beside the pages

from torch_depthmup.rules import FAMILIES, RULES  # noqa: E402

PAGE = (ROOT / "docs" / "reference" / "rules.md").read_text()
RULE_NAMES = "sp mup depth-mup depth-mup-corrected complete-p"


def rows(table: str) -> dict[tuple[str, str], str]:
    """(optimizer, parameters) -> the other cells of a table."""
    found = {}
    for line in table.splitlines()[2:]:
        names, kind, *cells = line.strip("| ").split(" | ")
        found |= {(name, kind): " ".join(cells) for name in names.split(", ")}
    return found


# In the order of RULE_NAMES.
IN_DEPTH = [
    ("lr", "sgd", "inner", "1 1 1 r^0.5 r"),
    ("lr", "sgd", "outer", "1 1 1 1 r"),
    ("lr", "adamw", "inner", "1 1 r^-0.5 1 1"),
    ("lr", "muon", "outer", "1 1 r^-0.5 r^-0.5 1"),
    ("lr", "adam", "trunk", "1 1 r^-1 r^-1 r^-1"),
    ("weight_decay", "sgd", "inner", "1 1 1 r^-0.5 r^-1"),
    ("weight_decay", "adam", "inner", "1 1 r^-0.5 r^-0.5 r^-1"),
    ("weight_decay", "adamw", "outer", "1 1 r^0.5 r^0.5 1"),
    ("eps", "adamw", "inner", "1 1 r^-0.5 r^-0.5 r^-1"),
    ("eps", "sgd", "inner", "1 1 1 1 1"),
]


@pytest.mark.parametrize("quantity, family, role, cells", IN_DEPTH)
def test_factors_in_depth_are_the_papers(quantity: str, family: str, role: str, cells: str) -> None:
    assert list(RULES) == RULE_NAMES.split()
    assert rows(rule_tables.in_depth(quantity))[family, role] == cells


@pytest.mark.parametrize(
    "family, kind, cells",
    [
        ("sgd", "hidden matrices", "1 1"),
        ("sgd", "readouts", "w w^-1"),
        ("adamw", "hidden matrices", "w^-1 w"),
        ("adam", "embeddings", "1 1"),
        ("adafactor", "readouts", "refused refused"),
    ],
)
def test_factors_in_width_are_mups(family: str, kind: str, cells: str) -> None:
    assert rows(rule_tables.in_width())[family, kind] == cells


@pytest.mark.parametrize("table", [*map(rule_tables.in_depth, ("lr", "weight_decay", "eps")), rule_tables.in_width()])
def test_every_family_has_a_row_for_every_kind_of_parameter(table: str) -> None:
    found = rows(table)
    assert {family for family, _ in found} == set(FAMILIES) and len(found) == 4 * len(FAMILIES)


@pytest.mark.parametrize("cells", ["sgd m^2 m^-2 1", "adam m m^-2 m^-1", "adamw m m^-1 m^-1"])
def test_what_a_folded_multiplier_asks_for_is_the_reparametrizations(cells: str) -> None:
    assert f"| {' | '.join(cells.split())} |" in rule_tables.folds()


def test_the_page_holds_every_table() -> None:
    asked = set(re.findall(r"^\{\{ (.*) \}\}$", PAGE, re.MULTILINE))
    assert asked == {
        "rules",
        "alphas",
        "starts",
        "in_depth lr",
        "in_depth weight_decay",
        "in_depth eps",
        "in_width",
        "folds",
    }
