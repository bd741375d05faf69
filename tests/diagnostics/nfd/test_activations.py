"""Activations by name, and their derivatives."""

from __future__ import annotations

import pytest
import torch

from torch_depthmup.diagnostics.nfd.activations import ACTIVATIONS, derivative, get_activation
from torch_depthmup.errors import DepthMuPError


@pytest.mark.parametrize("activation", [*ACTIVATIONS, torch.sin])
def test_the_derivative_is_that_of_finite_differences(activation) -> None:
    phi = get_activation(activation)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        value, slope = derivative(phi, x)
        assert torch.equal(value, phi(x))
        torch.testing.assert_close(slope, (phi(x + 1e-6) - phi(x - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)


def test_a_staircase_has_slope_zero() -> None:
    assert not derivative(torch.floor, torch.randn(3))[1].any()


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DepthMuPError, match="'mish'.*relu.*callable"):
        get_activation("mish")


@pytest.mark.parametrize(
    "activation",
    [lambda x: torch.ones_like(x), lambda x: x.detach().tanh(), lambda x: torch.from_numpy(x.detach().numpy()), len],
)
def test_what_has_no_graph_is_refused_with_what_to_write(activation) -> None:
    with pytest.raises(DepthMuPError, match="cannot differentiate. Write it in torch's operations"):
        derivative(activation, torch.randn(3))
    value, slope = derivative(lambda x: 0 * x + 2.0, torch.randn(3))
    assert bool((value == 2).all()) and not slope.any()
