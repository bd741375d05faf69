"""Neural Feature Dynamics: the training of a very wide residual network, simulated without its matrices.

The network (arXiv 2512.21075): h_0 = U x / sqrt(d), h_l = h_{l-1} + a W_l phi(h_{l-1}) / sqrt(n), f = v . h_L / n, all
entries standard normal; or blocks of two layers, x_l = W_l h_{l-1} / sqrt(n), h_l = h_{l-1} + a V_l phi(x_l) / sqrt(n).
The branch multiplier a is sqrt(T / L) under depth-muP. Trained by SGD with learning rate lr * n.

What training adds to a matrix has low rank, and what was there at the start is seen through products only
(`gaussian.py`), so nothing here is larger than width times samples times steps.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.activations import Activation
from torch_depthmup.diagnostics.nfd.dynamics import Network, backward, forward
from torch_depthmup.diagnostics.nfd.gaussian import Coupling, Noise
from torch_depthmup.diagnostics.nfd.record import Record
from torch_depthmup.diagnostics.nfd.result import NFDResult, collect
from torch_depthmup.diagnostics.nfd.setting import Loss, Scales, Setting, checked_data
from torch_depthmup.diagnostics.shared.progress import bar
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.rules import Rule

__all__ = ["memory_estimate", "simulate"]


def memory_estimate(setting: Setting, samples: int, held_out: int, width: int, seeds: int, bytes_each: int = 4) -> int:
    """Bytes that a simulation will take for its bases, increments and reference features."""
    forward, backward = (setting.steps + 1) * (samples + held_out), setting.steps * samples
    per_layer = setting.block_layers * (2 * forward + 4 * backward) + 3 * (samples + held_out)
    return setting.depth * per_layer * width * seeds * bytes_each


def simulate(
    inputs: Tensor,
    targets: Tensor,
    *,
    depth: int,
    steps: int,
    lr: float,
    base_depth: int = 1,
    width: int = 4096,
    activation: str | Activation = "tanh",
    block_layers: Literal[1, 2] = 1,
    rule: str | Rule = "depth-mup-corrected",
    coupling: Coupling = "reused",
    loss: Loss = "mse",
    horizon: float = 1.0,
    seeds: int | Sequence[int] = 4,
    train_readout: bool = False,
    train_input: bool = False,
    momentum: float = 0.0,
    batch_size: int | None = None,
    held_out: Tensor | None = None,
    scales: Scales | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> NFDResult:
    """Training of the canonical network at any width, exact in law, without any n x n matrix.

    Args:
        inputs: (samples, d).
        targets: (samples,) or (samples, classes) numbers for ``"mse"``, (samples,) class indices for
            ``"cross_entropy"``.
        depth: as the following up to ``batch_size``, see `Setting`.
        width: n; at least as large as all queries together, see Raises.
        coupling: ``"reused"`` predicts real networks; ``"decoupled"`` is NFD under gradient independence.
        seeds: how many, or which; simulated as one batch.
        held_out: (points, d), only evaluated.
        scales: other constants than the canonical ones.
        device: where to simulate; ``None`` is that of the inputs.
        dtype: of the simulation.
        progress: whether a terminal shows a bar over steps (needs rich).

    Returns:
        Outputs, losses, kernels and feature updates at every step and depth, for each seed.

    Raises:
        DepthMuPError: shapes or values do not fit, the width does not support so many samples times steps (the message
            gives the smallest that does), or memory will not do. A run that diverges warns, and returns what it has.

    Source: arXiv 2512.21075, the NFD system; the conditional simulation is that of `gaussian.py`.
    """
    setting = Setting(
        depth=depth, steps=steps, lr=lr, base_depth=base_depth, block_layers=block_layers, activation=activation,
        rule=rule, loss=loss, horizon=horizon, momentum=momentum, batch_size=batch_size, train_readout=train_readout,
        train_input=train_input, scales=scales or Scales(),
    )  # fmt: skip
    device = torch.device(device) if device is not None else inputs.device
    inputs, targets = checked_data(inputs, targets, setting, device, dtype)
    points = inputs if held_out is None else torch.cat([inputs, _points(held_out, inputs)])
    which = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not which:
        raise DepthMuPError("at least one seed is needed")
    _check_width(setting, len(inputs), len(points), width)
    _check_memory(
        memory_estimate(setting, len(inputs), len(points) - len(inputs), width, len(which), dtype.itemsize), device
    )
    noise = Noise(which, device=device, dtype=dtype)
    classes = targets.shape[1] if loss == "mse" else int(targets.max()) + 1
    network = Network(setting, points, len(inputs), classes, width, noise, coupling)
    with torch.no_grad(), bar("simulating", steps, show=progress) as advance:
        return _train(network, targets, advance)


def _points(held_out: Tensor, inputs: Tensor) -> Tensor:
    if held_out.ndim != 2 or held_out.shape[1] != inputs.shape[1] or not bool(torch.isfinite(held_out).all()):
        raise DepthMuPError(
            f"held_out must be finite, of shape (points, {inputs.shape[1]}), not {tuple(held_out.shape)}"
        )
    return held_out.to(inputs)


def _check_width(setting: Setting, samples: int, points: int, width: int) -> None:
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise DepthMuPError(f"width must be a positive whole number, not {width!r}")
    queries = (setting.steps + 1) * points + setting.steps * samples
    if width <= queries:
        raise DepthMuPError(
            f"{points} points over {setting.steps} steps ask {queries} questions of each matrix, as many as a width of "
            f"{width} has directions, so nothing would be random any more. The smallest width is {queries + 1}; the "
            "limit of infinite width asks for several times that"
        )


def _check_memory(needed: int, device: torch.device) -> None:
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    elif device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        return
    if needed > 0.9 * there:
        raise DepthMuPError(
            f"the simulation would take {needed / 1e9:.1f} GB and there are {there / 1e9:.1f} GB. Take fewer seeds at "
            "a time, samples, steps or layers, or a smaller width"
        )


def _train(network: Network, targets: Tensor, advance: Callable[[], None]) -> NFDResult:
    setting, samples = network.setting, network.samples
    record = Record(network)
    velocity = {"embedding": torch.zeros_like(network.embedding), "readout": torch.zeros_like(network.readout)}
    for step in range(setting.steps + 1):
        layers, outputs = forward(network, step, record)
        if not bool(torch.isfinite(outputs).all()):
            record.stop(step, 1.0)  # unless the layer is known already
            break
        record.outputs.append(outputs)
        if step == setting.steps:
            break
        batch = setting.batch(step, samples).to(outputs.device)
        errors = setting.errors(outputs[:, :samples], targets, batch)
        if not backward(network, layers, errors, batch, step, record, velocity):
            break
        advance()
    if (where := record.diverged) is not None:
        step, t = where
        warnings.warn(
            f"the simulation diverged at step {step}, layer time {t:.2f}: the learning rate {setting.lr:g} is too "
            "large here. The result holds the steps before",
            stacklevel=3,
        )
    return collect(network, record, targets)
