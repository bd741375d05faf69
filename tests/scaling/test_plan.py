"""Plans as data: what they say, how they print, and that they survive JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch
from blocks import Attention, BottleneckNet, PreNorm
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torch_depthmup as dm
from torch_depthmup.errors import PlanError
from torch_depthmup.rules import RULES
from torch_depthmup.scaling.plan import Stream
from torch_depthmup.tables import columns, fold_names


def plan_at(depth: int, base_depth: int, **options) -> dm.Plan:
    model = nn.Sequential(nn.Linear(3, 8), *[PreNorm(8) for _ in range(depth)], nn.Linear(8, 2))
    return dm.parametrize(model, depth_multiplier=depth / base_depth, example_inputs=torch.randn(4, 3), **options)


@given(
    st.integers(1, 4), st.integers(1, 3), st.sampled_from(sorted(RULES)), st.sampled_from(["fold", "wrap"])
)  # fmt: skip
def test_json_round_trip_gives_an_equal_plan(base_depth: int, times: int, rule: str, how: str) -> None:
    plan = plan_at(base_depth * times, base_depth, rule=rule, how=how)
    assert dm.Plan.from_json(plan.to_json()) == plan
    assert plan != plan_at(base_depth * times + 1, base_depth, rule=rule, how=how)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', '{"format": 1}', "null"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        dm.Plan.from_json(text)


def test_unknown_fields_are_refused() -> None:
    data = json.loads(plan_at(4, 2).to_json())
    data["rule"]["beta"] = 1
    with pytest.raises(PlanError, match="beta"):
        dm.Plan.from_json(json.dumps(data))


def test_multipliers_by_hand_with_a_folded_carrier() -> None:
    plan = plan_at(8, 2)  # r = 4, m = 1/2
    inner, outer, outside = (plan.multipliers(name, "adamw") for name in ("3.fc1.weight", "3.fc2.weight", "0.weight"))
    assert (inner.lr, inner.weight_decay, inner.eps) == (1, 1, 0.5)
    assert (outer.lr, outer.weight_decay, outer.eps) == (0.25, 4, 1)  # 1/2 of the rule, 1/2 of the fold
    assert (outside.lr, outside.weight_decay, outside.eps) == (1, 1, 1)
    assert plan.multipliers("3.fc1.weight", "sgd").lr == 2
    assert plan.multipliers("3.fc2.weight", "sgd").lr == 0.25
    assert plan_at(8, 2, how="wrap").multipliers("3.fc2.weight", "sgd").lr == 1


def test_names_are_found_behind_wrappers_prefixes() -> None:
    plan = plan_at(4, 2)
    assert plan["module._orig_mod.1.fc1.weight"].name == "1.fc1.weight"
    with pytest.raises(PlanError, match="Did you mean '1.fc1.weight'"):
        plan["1.fc1"]


def test_explain_says_role_reason_and_numbers() -> None:
    text = plan_at(8, 2).explain("4.fc2.weight")
    assert "4.fc2.weight: outer" in text and "(4 of 8, base 2); it carries the branch" in text
    assert "forward multiplier of 0.5" in text and "adamw  lr x 0.25" in text
    assert len(text.splitlines()) <= 8


@given(st.text("ab.", max_size=60), st.integers(0, 200))
def test_columns_of_any_width_print_everything(name: str, width: int) -> None:
    header, *rest = columns(("parameter", "what"), [(name, ("x" * width,))])
    text = "".join(line.replace(" ", "") for line in rest[1:])
    assert header.startswith("parameter") and text == (name or "(root)") + "x" * width


def test_the_table_folds_repeated_blocks_into_100_columns() -> None:
    text = str(plan_at(64, 2))
    assert max(map(len, text.splitlines())) <= 100
    assert "{1..64}.fc2.weight" in text and len(text.splitlines()) < 25


def test_the_table_keeps_long_names_whole() -> None:
    model: nn.Module = nn.Sequential(*[PreNorm(8) for _ in range(4)])
    for name in ("a_rather_long_name_of_a_module", "another_even_longer_name_of_a_module", "third_name_of_a_module"):
        model = _named(name, model)
    text = str(dm.parametrize(model, depth_multiplier=2, example_inputs=torch.randn(4, 8)))
    assert max(map(len, text.splitlines())) <= 100
    joined = "".join(line.strip() for line in text.splitlines())
    assert "third_name_of_a_module.another_even_longer_name_of_a_module.a_rather_long_name_of_a_module" in joined


def _named(name: str, module: nn.Module) -> nn.Module:
    outer = nn.Sequential()
    outer.add_module(name, module)
    return outer


def test_number_patterns_cover_exactly_the_names() -> None:
    names = ["stem", *(f"layer{i}.{j}.conv" for i in (1, 2) for j in range(i + 1)), *(f"block{i}.fc" for i in range(5))]
    rows = fold_names({name: ("same",) for name in names})
    assert [row[0] for row in rows] == ["stem", "layer1.{0..1}.conv", "layer2.{0..2}.conv", "block{0..4}.fc"]


@pytest.mark.parametrize(
    "build, base, message",
    [
        (lambda: _stack(4), lambda: nn.Sequential(nn.Linear(8, 8)), "no residual"),
        (lambda: _stack(4), lambda: _stack(8), "the base is deeper"),
        (lambda: _stack(4), lambda: nn.Sequential(PreNorm(8, 1)), "another family|no counterpart"),
        (lambda: nn.Sequential(*[Residual8() for _ in range(4)]), lambda: _stack(1), "another family|no counterpart"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(build, base, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dm.parametrize(build(), base=base(), example_inputs=torch.randn(4, 8))


def _stack(depth: int) -> nn.Module:
    return nn.Sequential(*[PreNorm(8) for _ in range(depth)])


class Residual8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(8)

    def forward(self, h):
        return h + self.attention(h)


@pytest.mark.parametrize(
    "depth_multiplier, message",
    [
        (0, "at least 1"),
        (-1, "at least 1"),
        (0.5, "at least 1"),
        (math.nan, "must be a number"),
        (True, "must be a number"),
        ("4", "must be a number"),
        (3, r"4 residual additions, and depth_multiplier=3 would give 1\.33 in the base"),
        (8, r"would give 0\.5 in the base.*base=small_model"),
    ],
)
def test_a_bad_depth_multiplier_is_refused(depth_multiplier, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dm.parametrize(_stack(4), depth_multiplier=depth_multiplier, example_inputs=torch.randn(4, 8))


def test_a_depth_multiplier_may_be_rounded() -> None:
    plan = dm.parametrize(_stack(7), depth_multiplier=2.333, example_inputs=torch.randn(4, 8))
    assert plan.streams == (Stream(7, 2.333),) and plan.streams[0].base_additions == 3


def test_a_multiplier_that_does_not_divide_every_stream_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.second = _stack(2), nn.Linear(8, 8), _stack(3)

        def forward(self, h):
            return self.second(torch.tanh(self.middle(self.first(h))))

    with pytest.raises(PlanError, match="base=small_model"):
        dm.parametrize(Two(), depth_multiplier=2, example_inputs=torch.randn(4, 8))


def test_tied_weights_are_refused_by_name() -> None:
    block = PreNorm(8)
    with pytest.raises(PlanError, match=r"0.fc1.* is used by 3 branches.*Untie.*exclude=\['0'\]"):
        dm.parametrize(nn.Sequential(block, block, block), depth_multiplier=3, example_inputs=torch.randn(4, 8))


def test_experts_that_no_token_reached_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

        def forward(self, h):
            return h + self.experts[0](torch.tanh(h)) + self.experts[1](torch.tanh(h))

    with pytest.raises(PlanError, match="experts.2.weight was not reached"):
        dm.parametrize(nn.Sequential(Experts(), Experts()), depth_multiplier=2, example_inputs=torch.randn(4, 8))


def test_stages_joined_by_projections_are_one_stream() -> None:
    plan = dm.parametrize(BottleneckNet(2), base=BottleneckNet(1), example_inputs=torch.randn(2, 3, 8, 8))
    assert len(plan.streams) == 1 and plan.streams[0].depth_multiplier == 2
