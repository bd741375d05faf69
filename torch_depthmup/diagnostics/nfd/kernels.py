"""Closed forms beside the simulation: kernels of the infinitely wide network at initialization, and what follows.

The kernel of the residual stream, Sigma = E[h h'], grows by T E[phi phi'] dt from x x' / d; that of the backward
features, G = E[g g'], grows from 1 at the readout by T E[phi' phi'] G dt towards the input. Finite depths take steps of
1/L instead.

Source: arXiv 2512.21075, section on initialization; arc-cosine kernels: Cho and Saul 2009; erf: Williams 1997.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.activations import Activation, derivative, get_activation
from torch_depthmup.diagnostics.nfd.gaussian import Coupling, checked_coupling
from torch_depthmup.diagnostics.nfd.setting import Setting, checked_data
from torch_depthmup.diagnostics.shared.extras import needs

__all__ = ["InitialKernels", "dual_kernels", "first_order_change", "initial_kernels", "tangent_kernel"]

NODES = 48  # of Gauss-Hermite quadrature in each of two dimensions


def dual_kernels(covariance: Tensor, activation: str | Activation) -> tuple[Tensor, Tensor]:
    """E[phi(u) phi(u')] and E[phi'(u) phi'(u')] for Gaussian u of a covariance.

    Exact for identity, relu and erf, by Gauss-Hermite quadrature else.

    Args:
        covariance: (samples, samples), positive semidefinite.
        activation: a name, or an elementwise callable.

    Returns:
        Two tensors of the covariance's shape, in float64.
    """
    c = covariance.double()
    q = c.diagonal()
    if activation == "identity":
        return c, torch.ones_like(c)
    if activation == "relu":
        norms = (q[:, None] * q[None]).sqrt()
        angle = torch.acos((c / norms).clamp(-1, 1))
        value = norms * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
        return value, (math.pi - angle) / (2 * math.pi)
    if activation == "erf":
        product = (1 + 2 * q[:, None]) * (1 + 2 * q[None])
        value = torch.asin((2 * c / product.sqrt()).clamp(-1, 1)) * 2 / math.pi
        return value, 4 / math.pi / (product - 4 * c.square()).sqrt()
    return _quadrature(c, get_activation(activation))


def _quadrature(c: Tensor, phi: Activation) -> tuple[Tensor, Tensor]:
    nodes, weights = (torch.tensor(part) for part in needs("scipy.special").roots_hermitenorm(NODES))
    weights = weights / weights.sum()
    q = c.diagonal()
    # u = sqrt(q) a, u' = (c / sqrt(q)) a + sqrt(q' - c^2 / q) b, with a and b independent and standard normal
    root = q.sqrt()[:, None, None, None]
    along = (c / q.sqrt()[:, None])[:, :, None, None]
    across = (q[None] - c.square() / q[:, None]).clamp_min(0).sqrt()[:, :, None, None]
    first = root * nodes[:, None] + torch.zeros_like(along + nodes)
    second = along * nodes[:, None] + across * nodes
    both = weights[:, None] * weights
    values = [derivative(phi, u) for u in (first, second)]
    return tuple((values[0][i] * values[1][i] * both).sum((2, 3)) for i in (0, 1))  # type: ignore[return-value]


@dataclass(frozen=True)
class InitialKernels:
    """Kernels between samples at layer times: (times, samples, samples), float64.

    ``stream`` is E[h h'], ``feature`` E[phi phi'], ``slope`` E[phi' phi'], ``gradient`` E[g g'] for one output.
    """

    times: Tensor
    stream: Tensor
    feature: Tensor
    slope: Tensor
    gradient: Tensor


def initial_kernels(
    inputs: Tensor,
    *,
    depth: int | None = None,
    activation: str | Activation = "tanh",
    horizon: float = 1.0,
    points: int = 65,
) -> InitialKernels:
    """Kernels of the canonical network at initialization, infinitely wide. The same for one- and two-layer blocks.

    Args:
        inputs: (samples, d).
        depth: number of layers; ``None`` is the limit of infinite depth, by an ODE solver.
        activation: a name, or an elementwise callable.
        horizon: T.
        points: how many layer times the ODE's solution is given at.

    Raises:
        DepthMuPError: inputs are not (samples, d) or not finite.
        ImportError: scipy is not installed.

    >>> kernels = initial_kernels(torch.eye(2), depth=4, activation="relu")
    >>> kernels.stream[:, 0, 0]  # (1 + T / 2 L) ** l times 1 / d
    tensor([0.5000, 0.5625, 0.6328, 0.7119, 0.8009], dtype=torch.float64)
    """
    setting = Setting(depth=depth or 1, steps=0, lr=0.0, activation=activation, horizon=horizon)
    x, _ = checked_data(inputs, torch.zeros(len(inputs)), setting, torch.device("cpu"), torch.float64)
    start = x @ x.T / x.shape[1]
    if depth is None:
        return _by_ode(start, activation, horizon, points)
    streams = [start]
    for _ in range(depth):
        streams.append(streams[-1] + horizon / depth * dual_kernels(streams[-1], activation)[0])
    duals = [dual_kernels(stream, activation) for stream in streams]
    gradients = [torch.ones_like(start)]
    for layer in range(depth - 1, -1, -1):
        gradients.append(gradients[-1] * (1 + horizon / depth * duals[layer][1]))
    times = torch.linspace(0, 1, depth + 1, dtype=torch.float64)
    feature, slope = (torch.stack([dual[i] for dual in duals]) for i in (0, 1))
    return InitialKernels(times, torch.stack(streams), feature, slope, torch.stack(gradients[::-1]))


def _by_ode(start: Tensor, activation: str | Activation, horizon: float, points: int) -> InitialKernels:
    solve = needs("scipy.integrate").solve_ivp
    shape, size = start.shape, start.numel()
    times = torch.linspace(0, 1, points, dtype=torch.float64)

    def slopes(_: float, y: object) -> object:
        stream = torch.tensor(y)[:size].reshape(shape)
        feature, slope = dual_kernels(stream, activation)
        # d log G / dt = -T E[phi' phi']: integrated from t = 0 here, and subtracted from its value at t = 1 below
        return (horizon * torch.cat([feature.flatten(), slope.flatten()])).numpy()

    y0 = torch.cat([start.flatten(), torch.zeros(size, dtype=torch.float64)]).numpy()
    y = torch.tensor(solve(slopes, (0, 1), y0, t_eval=times.numpy(), rtol=1e-9, atol=1e-11).y).T
    streams, logs = y[:, :size].reshape(-1, *shape), y[:, size:].reshape(-1, *shape)
    duals = [dual_kernels(stream, activation) for stream in streams]
    feature, slope = (torch.stack([dual[i] for dual in duals]) for i in (0, 1))
    return InitialKernels(times, streams, feature, slope, (logs[-1] - logs).exp())


def tangent_kernel(setting: Setting, inputs: Tensor, *, coupling: Coupling = "reused") -> Tensor:
    """The kernel of the first step's function change: df = -lr * sum over samples of Theta * dLoss/df.

    Infinitely wide, at the setting's depth, of the matrices in blocks.

    Args:
        setting: rule, depth and blocks; one output.
        inputs: (samples, d).
        coupling: ``"decoupled"`` sends g back through independent matrices. The function's true derivative at a layer
            is then correlated with g only through the readout, with E = 1 instead of E[g g'], and inner matrices
            contribute nothing.

    Returns:
        (samples, samples), float64.

    Source: Theta = sum over layers of (T / L) E[g g'] E[phi phi'], arXiv 2512.21075; the second coupling is its mean
        over independent backward matrices.
    """
    checked_coupling(coupling)
    effective = setting.multiplier**2 * setting.depth  # a^2 L stands for T under any rule
    kernels = initial_kernels(inputs, depth=setting.depth, activation=setting.activation, horizon=effective)
    below, above = slice(None, -1), slice(1, None)
    gradient = kernels.gradient[above] if coupling == "reused" else torch.ones_like(kernels.gradient[above])
    a2, unit = setting.multiplier**2, replace(setting, lr=1.0)
    theta = unit.layer_lr("outer") * a2 * (gradient * kernels.feature[below]).sum(0)
    if setting.block_layers == 2 and coupling == "reused":
        theta = theta + unit.layer_lr("inner") * a2 * (gradient * kernels.slope[below] * kernels.stream[below]).sum(0)
    return theta


def first_order_change(setting: Setting, inputs: Tensor, targets: Tensor, *, coupling: Coupling = "reused") -> Tensor:
    """What one step changes the outputs by, to first order in the learning rate, from f = 0 at infinite width.

    Args:
        setting: rule, depth, blocks, loss and learning rate.
        inputs: (samples, d).
        targets: as for `nfd.simulate`, one output.
        coupling: as for `tangent_kernel`.

    Returns:
        (samples,), float64.
    """
    x, y = checked_data(inputs, targets, setting, torch.device("cpu"), torch.float64)
    slopes = setting.errors(torch.zeros(len(x), 1, dtype=torch.float64), y, setting.batch(0, len(x)))[:, 0]
    return -setting.lr * tangent_kernel(setting, x, coupling=coupling) @ slopes
