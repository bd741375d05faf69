"""Random residual networks: what is found and scaled is what they say themselves."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from generated import TOKENS, Network, networks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch_depthmup as dm

OPTIONS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


def check(network: Network, layers: int, base_layers: int, how: str) -> None:
    torch.manual_seed(0)
    model = network.build(layers).double().eval()
    inputs = torch.randn(2, TOKENS, 5).double(), torch.randn(2, 3).double()
    plain, truth = copy.deepcopy(model), model.truth()
    base = network.build(base_layers).double().to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plan = dm.parametrize(model, base=base, example_inputs=inputs, how=how, rule="complete-p")
    ratio = layers / base_layers
    with torch.no_grad():
        for got, wanted in zip(model(*inputs), plain(*inputs, 1 / ratio), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)  # some sums are cast to float32
    roles = {entry.name: entry.role for entry in plan.entries if entry.role in ("inner", "outer")}
    wanted_roles = {name: side for t in truth for side in ("inner", "outer") for name in getattr(t, side)}
    assert roles == wanted_roles
    deeper = sorted(s.additions for s in plan.streams if s.depth_multiplier == ratio)
    assert deeper == sorted(sum(t.stream == s for t in truth) for s in {t.stream for t in truth})


SIZES = st.sampled_from([(4, 2), (3, 1), (2, 1)])
HOW = st.sampled_from(["fold", "wrap"])


@settings(max_examples=60, **OPTIONS)
@given(network=networks(), sizes=SIZES, how=HOW)
def test_random_networks_are_what_they_say(network: Network, sizes: tuple[int, int], how: str) -> None:
    check(network, *sizes, how)


@pytest.mark.evidence
@settings(max_examples=1000, **OPTIONS)
@given(network=networks(), sizes=SIZES, how=HOW)
def test_a_thousand_random_networks_are_what_they_say(network: Network, sizes: tuple[int, int], how: str) -> None:
    check(network, *sizes, how)
