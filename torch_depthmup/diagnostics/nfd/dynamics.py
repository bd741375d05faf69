"""One training run of the canonical network in Gaussian products: forward, backward, and what is kept of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.activations import derivative, get_activation
from torch_depthmup.diagnostics.nfd.gaussian import Coupling, GaussianMatrix, Noise
from torch_depthmup.diagnostics.nfd.record import Record
from torch_depthmup.diagnostics.nfd.setting import Setting

__all__ = ["Network", "backward", "forward"]


class _Matrix:
    """A trained matrix: the Gaussian one it started as, and what SGD added, sum over steps and samples of c p q^T."""

    def __init__(
        self, capacity: tuple[int, int], stored: int, width: int, noise: Noise, coupling: Coupling, gain: float
    ):
        self.gain = gain
        self.start = GaussianMatrix(width, capacity, noise, coupling)
        shape = len(noise.generators), stored, width
        self.left = torch.empty(shape, device=noise.device, dtype=noise.dtype)
        self.right = torch.empty_like(self.left)
        self.raw = self.coefficients = torch.empty(shape[0], 0, device=noise.device, dtype=noise.dtype)

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(W q, (W - W(0)) q) / sqrt(n) for rows q (seeds, points, n)."""
        count = self.coefficients.shape[1]
        own = torch.zeros_like(q)
        if count:
            inner = torch.bmm(q, self.right[:, :count].mT) * self.coefficients[:, None] / q.shape[2]
            own = torch.bmm(inner, self.left[:, :count])
        return self.gain * self.start.right(q) + own, own

    def backward(self, p: Tensor) -> Tensor:
        """W^T p / sqrt(n) for rows p."""
        count = self.coefficients.shape[1]
        value = self.gain * self.start.left(p)
        if count:
            inner = torch.bmm(p, self.left[:, :count].mT) * self.coefficients[:, None] / p.shape[2]
            value = torch.baddbmm(value, inner, self.right[:, :count])
        return value

    def learn(self, p: Tensor, q: Tensor, coefficients: Tensor, decay: Tensor) -> None:
        """Adds rows; ``decay`` is what momentum makes of each earlier step's weight in all, relative to the first."""
        new = slice(self.coefficients.shape[1], self.coefficients.shape[1] + p.shape[1])
        self.left[:, new], self.right[:, new] = p, q
        self.raw = torch.cat([self.raw, coefficients], dim=1)
        self.coefficients = self.raw * decay.repeat_interleave(p.shape[1])


class Network:
    """The network's state: matrices layer by layer, and the features of initialization to compare with."""

    def __init__(
        self, setting: Setting, points: Tensor, samples: int, classes: int, width: int, noise: Noise, coupling: Coupling
    ):
        self.setting, self.points, self.samples, self.width = setting, points, samples, width
        self.coupling: str = coupling
        self.phi = get_activation(setting.activation)
        self.seeds = len(noise.generators)
        batch = len(setting.batch(0, samples))
        capacity = (setting.steps + 1) * len(points), setting.steps * samples
        scales = setting.scales
        self.embedding = scales.input_gain * noise(points.shape[1], width)
        self.readout = scales.readout_gain * noise(classes, width)
        gains = (scales.inner_gain, scales.outer_gain)[-setting.block_layers :]
        self.matrices = [
            tuple(_Matrix(capacity, setting.steps * batch, width, noise, coupling, gain) for gain in gains)
            for _ in range(setting.depth)
        ]


@dataclass
class _Layer:
    """What one block leaves for the backward pass: its input h, the activation's value and slope, W's input."""

    h: Tensor
    phi: Tensor
    slope: Tensor


def forward(network: Network, step: int, record: Record) -> tuple[list[_Layer], Tensor]:
    setting, samples = network.setting, network.samples
    first = step == 0
    h = network.points @ network.embedding / math.sqrt(network.points.shape[1])
    layers: list[_Layer] = []
    record.stream(step, 0, h, first)
    for number, matrices in enumerate(network.matrices):
        inner_own = None
        taken = h
        if len(matrices) == 2:
            taken, inner_own = matrices[0].forward(h)
        phi, slope = derivative(network.phi, taken)
        added, outer_own = matrices[-1].forward(phi)
        layers.append(_Layer(h[:, :samples], phi[:, :samples], slope[:, :samples]))
        h = h + setting.multiplier * added
        record.block(step, number, taken if inner_own is not None else phi, inner_own, outer_own, phi, first)
        record.stream(step, number + 1, h, first)
        if not bool(torch.isfinite(h[:, :, 0]).all()):
            record.stop(step, (number + 1) / setting.depth)
            break
    return layers, torch.bmm(h, network.readout.mT) / network.width


def backward(
    network: Network, layers: list[_Layer], errors: Tensor, batch: Tensor, step: int, record: Record,
    velocity: dict[str, Tensor],
) -> bool:  # fmt: skip
    """One step of SGD: every matrix from the top down, then readout and input. Returns whether all of it is finite."""
    setting, samples, a = network.setting, network.samples, network.setting.multiplier
    if errors.shape[2] == 1:  # one output: g = n df/dh, and the loss's slope is a coefficient
        g = network.readout.expand(-1, samples, -1)
        weight = errors[:, :, 0]
    else:  # several: the direction that the loss selects
        g = torch.bmm(errors, network.readout)
        weight = torch.ones_like(errors[:, :, 0])
    weight = weight[:, batch]
    steps = torch.arange(step, -1, -1, device=g.device, dtype=g.dtype) + 1
    mu = setting.momentum
    decay = steps.new_ones(()).expand(step + 1) if mu == 0 else (1 - mu**steps) / (1 - mu)
    last = record.last
    record.gradient(step, setting.depth, g)
    for number in range(setting.depth - 1, -1, -1):
        layer, matrices = layers[number], network.matrices[number]
        through = a * matrices[-1].backward(g)
        outer = -setting.layer_lr("outer") * a * weight
        updates = [(matrices[-1], g[:, batch], layer.phi[:, batch], outer)]
        x = layer.slope * through
        if len(matrices) == 2:
            inner = -setting.layer_lr("inner") * weight
            updates.append((matrices[0], x[:, batch], layer.h[:, batch], inner))
            x = matrices[0].backward(x)
        g = g + x
        for matrix, p, q, coefficients in updates:
            matrix.learn(p, q, coefficients, decay)
        record.gradient(step, number, g)
        if not bool(torch.isfinite(g[:, :, 0]).all()):
            record.stop(step, number / setting.depth)
            return False
    if setting.train_readout:
        slope = torch.bmm(errors.mT, last[:, :samples])
        velocity["readout"] = mu * velocity["readout"] + slope
        network.readout = network.readout - _rate(setting.scales.readout_rate, setting) * velocity["readout"]
    if setting.train_input:
        root = math.sqrt(network.points.shape[1])
        slope = (
            torch.bmm(network.points[batch].T.expand(network.seeds, -1, -1), weight[:, :, None] * g[:, batch]) / root
        )
        velocity["embedding"] = mu * velocity["embedding"] + slope
        network.embedding = network.embedding - _rate(setting.scales.input_rate, setting) * velocity["embedding"]
    return True


def _rate(own: float | None, setting: Setting) -> float:
    return setting.lr if own is None else own
