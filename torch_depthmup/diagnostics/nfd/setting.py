"""The setting of a run: a canonical residual network of the theory, and how it is trained.

h_0 = U x / sqrt(d), h_l = h_{l-1} + a W_l phi(h_{l-1}) / sqrt(n) or, with blocks of two layers,
x_l = W_l h_{l-1} / sqrt(n), h_l = h_{l-1} + a V_l phi(x_l) / sqrt(n); f = v . h_L / n. All entries start standard
normal.

Source: arXiv 2512.21075, the depth-muP ResNets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_depthmup.diagnostics.nfd.activations import Activation, get_activation
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.rules import Rule, depth_multipliers, get_family, get_rule

__all__ = ["Loss", "Scales", "Setting", "checked_data"]

Loss = Literal["mse", "cross_entropy"]


@dataclass(frozen=True)
class Scales:
    """Other constants than the canonical network's: a gain and a learning rate for each of its parts.

    Gains multiply the initial values of the canonical matrices; learning rates are in units of the width, ``None``
    takes the setting's. A rate of 0 freezes the part.
    """

    input_gain: float = 1.0
    inner_gain: float = 1.0
    outer_gain: float = 1.0
    readout_gain: float = 1.0
    input_rate: float | None = None
    inner_rate: float | None = None
    outer_rate: float | None = None
    readout_rate: float | None = None


@dataclass(frozen=True)
class Setting:
    """Everything that a network of the theory and its training are made of, but for data, width and seeds.

    Args:
        depth: L, number of blocks.
        steps: SGD steps.
        lr: learning rate of the base, in units of the width.
        base_depth: depth of the base; the rule's multipliers are relative to it.
        block_layers: 1 or 2.
        activation: a name of `activations.ACTIVATIONS`, or an elementwise callable.
        rule: a rule by name, or a `Rule`.
        loss: ``"mse"``, the mean over samples of half the squared error, or ``"cross_entropy"``.
        horizon: T, the variance that the branches add over the base's depth.
        momentum: of SGD.
        batch_size: samples of a step, taken in a fixed order; ``None`` takes all.
        train_readout: whether v learns, at lr * n.
        train_input: whether U learns, at lr * n.
        scales: other gains and rates than the canonical ones; `like.simulate_like` reads them off a model.
    """

    depth: int
    steps: int
    lr: float
    base_depth: int = 1
    block_layers: Literal[1, 2] = 1
    activation: str | Activation = "tanh"
    rule: str | Rule = "depth-mup-corrected"
    loss: Loss = "mse"
    horizon: float = 1.0
    momentum: float = 0.0
    batch_size: int | None = None
    train_readout: bool = False
    train_input: bool = False
    scales: Scales = Scales()

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("base_depth", 1), ("steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DepthMuPError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("lr", "horizon", "momentum"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise DepthMuPError(f"{name} must be finite and not negative, not {getattr(self, name)!r}")
        if self.block_layers not in (1, 2):
            raise DepthMuPError(f"block_layers must be 1 or 2, not {self.block_layers!r}")
        if self.loss not in ("mse", "cross_entropy"):
            raise DepthMuPError(f"loss must be 'mse' or 'cross_entropy', not {self.loss!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise DepthMuPError(f"batch_size must be positive, not {self.batch_size}")
        get_activation(self.activation)
        get_rule(self.rule)

    @property
    def multiplier(self) -> float:
        """a: the factor on a branch, sqrt(T / base_depth) times the rule's branch multiplier."""
        rule = get_rule(self.rule)
        return math.sqrt(self.horizon / self.base_depth) * rule.branch_multiplier(self.depth / self.base_depth)

    def layer_lr(self, role: Literal["inner", "outer"]) -> float:
        """The learning rate of a block's matrix, in units of the width."""
        own = self.scales.inner_rate if role == "inner" else self.scales.outer_rate
        if own is not None:
            return own
        rule = get_rule(self.rule)
        return self.lr * depth_multipliers(rule, get_family("sgd"), role, self.depth / self.base_depth).lr

    def batch(self, step: int, samples: int) -> Tensor:
        """Indices of the samples of a step."""
        size = min(self.batch_size or samples, samples)
        return (torch.arange(size) + step * size) % samples

    def errors(self, outputs: Tensor, targets: Tensor, batch: Tensor) -> Tensor:
        """dLoss/df of the batch's mean loss, zero off the batch: (..., samples, classes)."""
        wanted = targets if self.loss == "mse" else F.one_hot(targets, outputs.shape[-1])
        slope = (outputs if self.loss == "mse" else outputs.softmax(-1)) - wanted
        chosen = torch.zeros(outputs.shape[-2], device=outputs.device, dtype=outputs.dtype)
        chosen[batch] = 1 / len(batch)
        return slope * chosen[:, None]

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss over all samples, for outputs (..., samples, classes)."""
        if self.loss == "mse":
            return (outputs - targets).square().sum(-1).mean(-1) / 2
        picked = outputs.log_softmax(-1).gather(-1, targets.expand(outputs.shape[:-1])[..., None])
        return -picked.squeeze(-1).mean(-1)


def checked_data(
    inputs: Tensor, targets: Tensor, setting: Setting, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Inputs (samples, d) and targets (samples, classes) or class indices, on one device, finite.

    Raises:
        DepthMuPError: they are not.
    """
    if inputs.ndim != 2 or len(inputs) == 0:
        raise DepthMuPError(f"inputs must have shape (samples, d), not {tuple(inputs.shape)}")
    if len(targets) != len(inputs):
        raise DepthMuPError(f"{len(inputs)} inputs and {len(targets)} targets: one target for each input")
    inputs = inputs.to(device, dtype)
    if setting.loss == "cross_entropy":
        if targets.ndim != 1 or targets.is_floating_point() or int(targets.min()) < 0:
            raise DepthMuPError("cross_entropy takes targets (samples,) of class indices")
        targets = targets.to(device)
    else:
        targets = targets.to(device, dtype).reshape(len(inputs), -1)
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not bool(torch.isfinite(value).all()):
            raise DepthMuPError(f"{name} are not all finite")
    return inputs, targets
