"""Closed forms against quadrature, against each other, and against the simulation."""

from __future__ import annotations

import math

import pytest
import torch

from torch_depthmup.diagnostics.nfd import simulate
from torch_depthmup.diagnostics.nfd.kernels import dual_kernels, first_order_change, initial_kernels, tangent_kernel
from torch_depthmup.diagnostics.nfd.setting import Setting

X = torch.nn.functional.normalize(torch.randn(3, 10, generator=torch.Generator().manual_seed(0))) * math.sqrt(10)
Y = torch.tensor([1.0, -1.0, 0.5])
COVARIANCE = torch.tensor([[1.3, 0.4, -0.6], [0.4, 0.8, 0.1], [-0.6, 0.1, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("name, callable_", [("erf", torch.erf), ("identity", lambda x: x * 1.0)])
def test_exact_kernels_are_those_of_quadrature(name: str, callable_) -> None:
    for exact, numeric in zip(dual_kernels(COVARIANCE, name), dual_kernels(COVARIANCE, callable_), strict=True):
        torch.testing.assert_close(exact, numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "silu", "erf"])
def test_kernels_are_means_over_gaussians(name: str) -> None:
    from torch_depthmup.diagnostics.nfd.activations import derivative, get_activation

    generator = torch.Generator().manual_seed(1)
    u = torch.randn(400_000, 3, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(COVARIANCE).T
    for exact, sample in zip(dual_kernels(COVARIANCE, name), derivative(get_activation(name), u), strict=True):
        products = sample[:, :, None] * sample[:, None]
        error = products.std(0) / math.sqrt(len(u))
        assert bool(((products.mean(0) - exact).abs() < 5 * error + 1e-12).all())


def test_the_linear_ode_is_the_exponential() -> None:
    kernels = initial_kernels(X, activation="identity", horizon=1.5)
    start = X.double() @ X.double().T / 10
    torch.testing.assert_close(kernels.stream[-1], start * math.exp(1.5), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(kernels.gradient[0], torch.full((3, 3), math.exp(1.5), dtype=torch.float64))


def test_depth_converges_to_the_ode_like_one_over_depth() -> None:
    limit = initial_kernels(X, activation="relu").stream[-1]
    errors = [float((initial_kernels(X, activation="relu", depth=d).stream[-1] - limit).norm()) for d in (32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("activation", ["relu", "tanh", "erf"])
def test_the_simulation_starts_with_these_kernels(activation: str) -> None:
    result = simulate(Setting(depth=16, steps=1, lr=0.0, activation=activation), X, Y, width=20000, seeds=6)
    kernels = initial_kernels(X, activation=activation, depth=16)
    for name, closed in (("kernels", kernels.stream), ("gradient_kernels", kernels.gradient)):
        wanted = closed[list(result.times)].float()
        error = result.error(name)[0]
        assert float(((result.mean(name)[0] - wanted).abs() / (error + 1e-6)).median()) < 1.5
        torch.testing.assert_close(result.mean(name)[0], wanted, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("coupling, limit", [("reused", math.e), ("decoupled", math.e - 1)])
def test_the_linear_tangent_kernel_is_e_or_e_minus_one(coupling, limit: float) -> None:
    setting = Setting(depth=400, steps=1, lr=1.0, activation="identity")
    assert float(tangent_kernel(setting, X[:1], coupling=coupling)) == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize("block_layers", [1, 2])
@pytest.mark.parametrize("rule", ["depth-mup", "depth-mup-corrected", "complete-p"])
@pytest.mark.parametrize("coupling", ["reused", "decoupled"])
def test_first_order_change_is_the_first_step_of_the_simulation(block_layers, rule: str, coupling) -> None:
    common = {"depth": 8, "steps": 1, "lr": 0.02, "block_layers": block_layers, "rule": rule, "base_depth": 2}
    result = simulate(Setting(**common), X, Y, width=20000, seeds=8, coupling=coupling)
    moved = (result.outputs[:, 1] - result.outputs[:, 0])[..., 0]
    wanted = first_order_change(Setting(**common), X, Y, coupling=coupling).float()
    error = moved.std(0) / math.sqrt(8)
    assert float(((moved.mean(0) - wanted).abs() / (error + 0.02 * wanted.abs())).max()) < 4
    assert float(moved.abs().mean()) > 10 * float((moved.mean(0) - wanted).abs().mean())
