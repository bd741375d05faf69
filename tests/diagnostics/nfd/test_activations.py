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
