"""One training run of the canonical network in Gaussian products: forward, backward, and one step of SGD.

With a the branch multiplier and g_l = n df/dh_l (arXiv 2512.21075):

    h_l = h_{l-1} + a W_l phi(h_{l-1}) / sqrt(n)          g_{l-1} = g_l + a phi'(h_{l-1}) * (W_l^T g_l) / sqrt(n)
    dW_l / sqrt(n) = -lr a sum over samples of dLoss/df g_l phi(h_{l-1})^T / n

and with blocks of two layers x_l = W_l h_{l-1} / sqrt(n), h_l = h_{l-1} + a V_l phi(x_l) / sqrt(n), likewise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.activations import derivative, get_activation
from torch_depthmup.diagnostics.nfd.gaussian import Coupling, GaussianMatrix, Noise
from torch_depthmup.diagnostics.nfd.record import Record
from torch_depthmup.diagnostics.nfd.setting import Setting
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix

__all__ = ["Forward", "Gradients", "Network", "backward", "forward"]


class Network:
    """The network's state: its matrices W / sqrt(n) block by block, input and readout, and SGD's velocities."""

    def __init__(
        self, setting: Setting, points: Tensor, samples: int, classes: int, width: int, noise: Noise, coupling: Coupling
    ):
        self.setting, self.points, self.samples, self.width = setting, points, samples, width
        self.coupling: str = coupling
        self.phi = get_activation(setting.activation)
        scales = setting.scales
        self.embedding = scales.input_gain * noise(points.shape[1], width)
        self.readout = scales.readout_gain * noise(classes, width)
        capacity = (setting.steps + 1) * len(points), setting.steps * samples
        gains = (scales.inner_gain, scales.outer_gain)[-setting.block_layers :]

        def matrix(gain: float) -> TrainedMatrix:
            start = GaussianMatrix(width, width, noise, std=width**-0.5, capacity=capacity, coupling=coupling)
            return TrainedMatrix.at_start(start, gain)

        self.blocks = [[matrix(gain) for gain in gains] for _ in range(setting.depth)]
        self.velocities = [[matrix.times(0.0) for matrix in block] for block in self.blocks]
        self.embedding_velocity = torch.zeros_like(self.embedding)
        self.readout_velocity = torch.zeros_like(self.readout)

    def learn(self, gradients: Gradients) -> None:
        """One step of SGD with momentum, on everything that is trained."""
        setting, mu = self.setting, self.setting.momentum
        rates = [setting.layer_lr(role) for role in ("inner", "outer")][-setting.block_layers :]
        for block, velocities, found in zip(self.blocks, self.velocities, gradients.blocks, strict=True):
            for i, (gradient, rate) in enumerate(zip(found, rates, strict=True)):
                velocities[i] = velocities[i].times(mu).plus(gradient) if mu else gradient
                block[i] = block[i].plus(velocities[i], -rate)
        if setting.train_readout:
            self.readout_velocity = mu * self.readout_velocity + gradients.readout
            self.readout = self.readout - _own(setting.scales.readout_rate, setting.lr) * self.readout_velocity
        if setting.train_input:
            self.embedding_velocity = mu * self.embedding_velocity + gradients.embedding
            self.embedding = self.embedding - _own(setting.scales.input_rate, setting.lr) * self.embedding_velocity


def _own(rate: float | None, lr: float) -> float:
    return lr if rate is None else rate


@dataclass(frozen=True)
class _Block:
    """What a block leaves for the backward pass: the activation's slope, the coordinates of each matrix's input."""

    slope: Tensor
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Forward:
    """A forward pass: its blocks, h_L, the outputs (seeds, points, classes). It may have stopped early, not finite."""

    blocks: list[_Block]
    last: Tensor
    outputs: Tensor


def forward(network: Network, step: int, record: Record) -> Forward:
    """The outputs at all points; sizes and kernels go to the record."""
    setting, samples = network.setting, network.samples
    h = network.points @ network.embedding / math.sqrt(network.points.shape[1])
    blocks: list[_Block] = []
    record.stream(step, 0, h)
    for number, matrices in enumerate(network.blocks):
        taken, inner_own, inputs = h, None, []
        if setting.block_layers == 2:
            taken, inner_own, coordinates = _product(matrices[0], h)
            inputs.append(coordinates[:, :samples])
        phi, slope = derivative(network.phi, taken)
        added, outer_own, coordinates = _product(matrices[-1], phi)
        inputs.append(coordinates[:, :samples])
        blocks.append(_Block(slope[:, :samples], tuple(inputs)))
        h = h + setting.multiplier * added
        record.block(step, number, phi if inner_own is None else taken, inner_own, outer_own, phi)
        record.stream(step, number + 1, h)
        if not bool(torch.isfinite(h[:, :, 0]).all()):
            record.stop(step, (number + 1) / setting.depth)
            break
    return Forward(blocks, h, torch.bmm(h, network.readout.mT) / network.width)


def _product(matrix: TrainedMatrix, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W q, a tensor of the mean squares of what training added to it, and the coordinates of q.

    Mean squares are the same in coordinates along orthonormal vectors, but for the number of entries.
    """
    coordinates = matrix.start.coordinates("right", q)
    own = matrix.own("right", coordinates)
    own = own * math.sqrt(own.shape[2] / q.shape[2]) if own.shape[2] else torch.zeros_like(q[:, :, :1])
    return matrix.value("right", coordinates), own, coordinates


@dataclass(frozen=True)
class Gradients:
    """The mean loss's gradients in the units of the learning rates: of each block's matrices, readout and input."""

    blocks: list[list[TrainedMatrix]]
    readout: Tensor
    embedding: Tensor


def backward(
    network: Network, passed: Forward, errors: Tensor, batch: Tensor, step: int, record: Record
) -> Gradients | None:
    """Gradients on a batch, or ``None`` where they are not finite. The trained values stay as they are.

    Args:
        network: only asked for products, as `forward` does.
        passed: the forward pass.
        errors: dLoss/df of the batch's mean loss, (seeds, samples, classes), zero off the batch.
        batch: indices of its samples.
        step: for the record.
        record: gets the backward features' sizes and kernels.
    """
    setting, samples, a = network.setting, network.samples, network.setting.multiplier
    if errors.shape[2] == 1:  # one output: g = n df/dh, and the loss's slope is a weight
        g, weight = network.readout.expand(-1, samples, -1), errors
    else:  # several: the direction that the loss selects
        g = torch.bmm(errors, network.readout)
        weight = torch.ones_like(errors[:, :, :1])
    weight = weight[:, batch]
    record.gradient(step, setting.depth, g)
    blocks: list[list[TrainedMatrix]] = []
    for number in range(setting.depth - 1, -1, -1):
        block, matrices, found = passed.blocks[number], network.blocks[number], []
        # p of the matrix in use, from the outer one inwards, and its gradient sum c p q^T / n
        p, scale = g, a
        for matrix, q in zip(reversed(matrices), reversed(block.inputs), strict=True):
            coordinates = matrix.start.coordinates("left", p)
            through = matrix.value("left", coordinates)
            weighted = scale / network.width * weight * coordinates[:, batch]
            found.append(TrainedMatrix.outer(matrix.start, weighted, q[:, batch]))
            p = through if len(found) == 2 else a * block.slope * through
            scale = 1.0
        g = g + p
        blocks.append(found[::-1])
        record.gradient(step, number, g)
        if not bool(torch.isfinite(g[:, :, 0]).all()):
            record.stop(step, number / setting.depth)
            return None
    points = network.points[batch].T.expand(len(g), -1, -1)
    return Gradients(
        blocks[::-1],
        readout=torch.bmm(errors.mT, passed.last[:, :samples]),
        embedding=torch.bmm(points, weight * g[:, batch]) / math.sqrt(network.points.shape[1]),
    )
