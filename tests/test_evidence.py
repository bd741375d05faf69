"""What docs/evidence.md and docs/benchmarks.md say in words, against the committed measurements."""

from __future__ import annotations

import csv
from statistics import fmean

import pytest
from pages import ROOT


def rows(path: str) -> list[dict[str, str]]:
    with (ROOT / "examples" / path).open() as file:
        return list(csv.DictReader(file))


def test_right_set_ups_are_not_called_broken_and_few_are_left_open() -> None:
    verdicts = [row["verdict"] for row in rows("benchmarks/right_setups.csv")]
    assert "broken" not in verdicts and verdicts.count("cannot tell") <= len(verdicts) / 5


COVERAGE = {row["curve"]: (float(row["one"]), float(row["two"])) for row in rows("benchmarks/optimum_coverage.csv")}


@pytest.mark.parametrize("curve", sorted(set(COVERAGE) - {"pointed", "levelling"}))
def test_an_optimums_error_is_not_too_small(curve: str) -> None:
    one, two = COVERAGE[curve]
    assert one >= 0.6 and two >= 0.8  # three seeds that lie apart: 0.62 and 0.84


@pytest.mark.parametrize("curve", ["pointed", "levelling"])
def test_it_is_where_the_page_says_so(curve: str) -> None:
    one, two = COVERAGE[curve]
    assert one < 0.3 and two < 0.7


@pytest.mark.parametrize("row", rows("evidence/nfd_networks.csv"), ids=lambda row: f"{row['network']}-{row['width']}")
def test_networks_come_to_the_prediction_of_their_own_coupling(row: dict[str, str]) -> None:
    other = {"reused": "decoupled", "decoupled": "reused"}[row["network"]]
    own, far = float(row[f"mean_from_{row['network']}"]), float(row[f"mean_from_{other}"])
    assert own < 3 * float(row[f"one_from_{row['network']}"]) / int(row["seeds"]) ** 0.5 and far > 0.3


@pytest.mark.parametrize("rule, falls", [("depth-mup", False), ("complete-p", False), ("depth-mup-corrected", True)])
def test_the_gaps_share_falls_with_depth_where_the_page_says_so(rule: str, falls: bool) -> None:
    shares = {int(row["depth"]): float(row["share"]) for row in rows("evidence/nfd_gap.csv") if row["rule"] == rule}
    assert (shares[128] < 0.9 * shares[8]) == falls


def loss_of(setup: str, how: str, lr: float) -> float:
    """The mean over seeds."""
    found = [row for row in rows("evidence/horizon.csv") if (row["setup"], row["how"]) == (setup, how)]
    return fmean(float(row["loss"]) for row in found if float(row["lr"]) == lr)


@pytest.mark.parametrize(
    "setup, as_it_is, rule",
    [("duration x 4", "1.73", "1.66"), ("batch x 4", "1.821", "1.832")],
    ids=["longer", "larger"],
)
def test_what_the_page_of_batch_sizes_says_of_the_tuned_rate(setup: str, as_it_is: str, rule: str) -> None:
    page = (ROOT / "docs" / "how-to" / "batch_size.md").read_text()
    for how, said in (("as it is", as_it_is), ("rule", rule)):
        assert f"{loss_of(setup, how, 2.0**-9):.{len(said) - 2}f}" == said and said in page
