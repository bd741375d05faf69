"""The rules' numbers against the table of the papers, written out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_depthmup import Rule
from torch_depthmup.errors import DepthMuPError, OptimizerError, PlanError
from torch_depthmup.rules import (
    FAMILIES,
    RULES,
    UNIT,
    Family,
    Width,
    depth_multipliers,
    fold_multipliers,
    get_family,
    get_rule,
    predicted_slopes,
    width_multipliers,
)

SGD, ADAM, ADAMW, MUON = (FAMILIES[name] for name in ("sgd", "adam", "adamw", "muon"))

# rule, branch multiplier, then learning rates: SGD outer, SGD inner, Adam outer, Adam inner, all at r = 16
AT_SIXTEEN = [
    ("sp", 1, 1, 1, 1, 1),
    ("mup", 1, 1, 1, 1, 1),
    ("depth-mup", 1 / 4, 1, 1, 1 / 4, 1 / 4),
    ("depth-mup-corrected", 1 / 4, 1, 4, 1 / 4, 1),
    ("complete-p", 1 / 16, 16, 16, 1, 1),
]


@pytest.mark.parametrize("name, m, sgd_outer, sgd_inner, adam_outer, adam_inner", AT_SIXTEEN)
def test_rules_give_the_published_multipliers(name, m, sgd_outer, sgd_inner, adam_outer, adam_inner) -> None:
    rule = RULES[name]
    assert rule.branch_multiplier(16) == m
    for family, outer, inner in ((SGD, sgd_outer, sgd_inner), (ADAM, adam_outer, adam_inner)):
        assert depth_multipliers(rule, family, "outer", 16).lr == outer
        assert depth_multipliers(rule, family, "inner", 16).lr == inner
        assert depth_multipliers(rule, family, "outside", 16) == UNIT


@given(
    st.sampled_from(sorted(RULES)), st.sampled_from(sorted(FAMILIES)), st.sampled_from(["inner", "outer"]),
    st.floats(1, 1e4),
)  # fmt: skip
def test_decay_and_eps_follow_learning_rate_and_gradient(name: str, family: str, role, ratio: float) -> None:
    rule, kind = RULES[name], FAMILIES[family]
    m = depth_multipliers(rule, kind, role, ratio)
    if kind.decoupled or not kind.normalised:
        assert m.lr * m.weight_decay == pytest.approx(1)
    else:  # an L2 penalty is compared with the gradient, which carries the branch multiplier
        assert m.weight_decay == pytest.approx(rule.branch_multiplier(ratio))
    assert m.eps == pytest.approx(rule.branch_multiplier(ratio) if kind.normalised else 1)


@given(
    st.sampled_from(sorted(RULES)), st.sampled_from(sorted(FAMILIES)), st.sampled_from(["outside", "inner", "outer"])
)
def test_nothing_changes_at_the_base(name: str, family: str, role) -> None:
    assert depth_multipliers(RULES[name], FAMILIES[family], role, 1.0) == UNIT
    assert fold_multipliers(FAMILIES[family], 1.0) == UNIT
    width = Width((8, 4), (8, 4), 1)
    assert width_multipliers(RULES[name], FAMILIES[family], width) == UNIT


def test_folding_follows_the_reparametrization() -> None:
    assert fold_multipliers(SGD, 0.5) == type(UNIT)(lr=0.25, weight_decay=4, eps=1)
    assert fold_multipliers(ADAM, 0.5) == type(UNIT)(lr=0.5, weight_decay=4, eps=2)
    assert fold_multipliers(ADAMW, 0.5) == type(UNIT)(lr=0.5, weight_decay=2, eps=2)
    with pytest.raises(OptimizerError, match="how='wrap'"):
        fold_multipliers(FAMILIES["adafactor"], 0.5)


def test_the_label_of_a_rule_tells_it_from_every_other() -> None:
    assert [rule.label for rule in RULES.values()] == list(RULES)
    assert Rule("mine", alpha=0.75).label == "mine (alpha 0.75)"
    assert (
        Rule("depth-mup-corrected", alpha=1.0, adam=0.5, width=False).label
        == "depth-mup-corrected (alpha 1.0, adam 0.5, no width)"
    )
    assert Rule("mine", alpha=1 / 3).label != Rule("mine", alpha=0.333333).label


@pytest.mark.parametrize("family", [SGD, ADAM], ids=lambda family: family.name)
def test_slopes_are_those_of_the_theory(family: Family) -> None:
    published = {"inner": -0.5, "outer": -0.5, "stream": 0, "function": 0}
    assert predicted_slopes(RULES["depth-mup"], family) == published
    corrected = {"inner": 0, "outer": -0.5, "stream": 0.5, "function": 0.5}
    assert predicted_slopes(RULES["depth-mup-corrected"], family) == corrected
    assert set(predicted_slopes(RULES["complete-p"], family).values()) == {0}
    # without inner layers there is nothing to correct
    alone = {name: slope for name, slope in published.items() if name != "inner"}
    assert predicted_slopes(RULES["depth-mup-corrected"], family, inner_layers=False) == alone


def test_own_exponents_are_taken_and_missing_ones_derived() -> None:
    rule = Rule("mine", alpha=0.75)
    assert (rule.sgd, rule.adam) == (0.5, -0.25)
    assert rule == Rule("mine", alpha=0.75, sgd=0.5, adam=-0.25)
    own = Rule("own", alpha=0.5, correction=0.25, sgd=0.125)
    assert depth_multipliers(own, SGD, "inner", 16).lr == pytest.approx(16 ** (0.125 + 0.25))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Rule("", alpha=0.5),
        lambda: Rule("x", alpha=-0.5),
        lambda: Rule("x", alpha=math.nan),
        lambda: Rule("x", alpha="0.5"),  # type: ignore[arg-type]
        lambda: get_rule("depthmup"),
        lambda: get_family("lion"),
        lambda: RULES["depth-mup-corrected"].branch_multiplier(0),
    ],
)
def test_bad_rules_are_refused(build) -> None:
    with pytest.raises(DepthMuPError):
        build()


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(PlanError, match="'depth-mup-corrected', 'complete-p'"):
        get_rule("depthmup")


def test_width_multipliers_by_hand() -> None:
    hidden, vector, readout = Width((64, 48), (16, 16), 1), Width((64,), (16,), 0), Width((10, 64), (None, 16), 1)
    rule = RULES["mup"]
    assert width_multipliers(rule, ADAM, hidden).lr == pytest.approx(1 / 3)
    assert width_multipliers(rule, ADAM, vector) == width_multipliers(rule, ADAM, readout) == UNIT
    assert width_multipliers(rule, SGD, hidden).lr == pytest.approx(4 / 3)
    assert width_multipliers(rule, SGD, vector).lr == width_multipliers(rule, SGD, readout).lr == 4
    assert width_multipliers(RULES["sp"], SGD, vector) == UNIT
    with pytest.raises(OptimizerError, match="at most two"):
        width_multipliers(rule, SGD, Width((4, 4, 4), (2, 2, 2), 2))
    with pytest.raises(OptimizerError, match="no width rule"):
        width_multipliers(rule, FAMILIES["adafactor"], hidden)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, "original", "match_rms_adamw"]))
def test_muon_keeps_the_spectral_condition(rows: int, columns: int, adjust: str | None) -> None:
    """lr times torch's factor times the spectral norm 1 grows like sqrt(fan_out / fan_in)."""
    base, dims = (8, 24), (8 * rows, 24 * columns)

    def factor(out: int, inp: int) -> float:
        return 0.2 * math.sqrt(max(out, inp)) if adjust == "match_rms_adamw" else math.sqrt(max(1, out / inp))

    lr = width_multipliers(RULES["mup"], MUON, Width(dims, base, 1), adjust_lr=adjust).lr
    grown = lr * factor(*dims) / factor(*base)
    assert grown == pytest.approx(math.sqrt((dims[0] / dims[1]) / (base[0] / base[1])))
