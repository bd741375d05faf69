"""Simulates the training of a canonical residual network at any width, without its matrices.

What training adds to a matrix has low rank, and what was there at the start is seen through products only, so nothing
here is larger than width times samples times steps. The network and its formulas are in `setting.py` and `dynamics.py`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.dynamics import Network, backward, forward
from torch_depthmup.diagnostics.nfd.gaussian import ROUNDED, Coupling, Noise, checked_coupling, checked_dtype
from torch_depthmup.diagnostics.nfd.record import Record
from torch_depthmup.diagnostics.nfd.result import NFDResult, collect
from torch_depthmup.diagnostics.nfd.setting import Setting, checked_data
from torch_depthmup.diagnostics.shared.arguments import seeds_of
from torch_depthmup.diagnostics.shared.progress import bar
from torch_depthmup.errors import DepthMuPError

__all__ = ["check_memory", "memory_estimate", "simulate"]


def memory_estimate(setting: Setting, samples: int, held_out: int, width: int, seeds: int, bytes_each: int = 4) -> int:
    """Bytes that a simulation will take for its bases with their products, and for reference features."""
    queries = (setting.steps + 1) * (samples + held_out) + setting.steps * samples
    per_layer = setting.block_layers * queries * (bytes_each + ROUNDED.itemsize) + 3 * (samples + held_out) * bytes_each
    return setting.depth * per_layer * width * seeds


def simulate(
    setting: Setting,
    inputs: Tensor,
    targets: Tensor,
    *,
    width: int = 4096,
    seeds: int | Sequence[int] = 4,
    coupling: Coupling = "reused",
    held_out: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> NFDResult:
    """Training of the canonical network at any width, exact in law, without any n x n matrix.

    Args:
        setting: the network and its training.
        inputs: (samples, d).
        targets: (samples,) or (samples, classes) numbers for ``"mse"``, (samples,) class indices for
            ``"cross_entropy"``.
        width: n; larger than the number of all queries together, see Raises.
        seeds: how many, or which; simulated as one batch.
        coupling: ``"reused"`` predicts real networks; ``"decoupled"`` is NFD under gradient independence.
        held_out: (points, d), only evaluated.
        device: where to simulate; ``None`` is that of the inputs.
        dtype: of the simulation, float32 or float64.
        progress: whether a terminal shows a bar over steps (needs rich).

    Returns:
        Outputs, losses, kernels and feature updates at every step and depth, for each seed.

    Raises:
        DepthMuPError: shapes or values do not fit, the width does not support so many samples times steps (the message
            gives the smallest that does), or memory will not do. A run that diverges warns, and returns what it has.

    Source: arXiv 2512.21075, the NFD system; the conditional simulation is that of `gaussian.py`.

    >>> inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, -1.0])
    >>> result = simulate(Setting(depth=4, steps=2, lr=1.0), inputs, targets, width=1000, seeds=2)
    >>> result.outputs.shape  # seeds, steps and initialization, samples, classes
    torch.Size([2, 3, 2, 1])
    >>> bool((result.losses[:, -1] < result.losses[:, 0]).all())
    True
    """
    checked_coupling(coupling)
    device = torch.device(device) if device is not None else inputs.device
    inputs, targets = checked_data(inputs, targets, setting, device, checked_dtype(dtype))
    points = inputs if held_out is None else torch.cat([inputs, _points(held_out, inputs)])
    which = seeds_of(seeds)
    _check_width(setting, len(inputs), len(points), width)
    needed = memory_estimate(setting, len(inputs), len(points) - len(inputs), width, len(which), dtype.itemsize)
    check_memory(needed, device, "Take fewer seeds at a time, samples, steps or layers, or a smaller width")
    noise = Noise(which, device=device, dtype=dtype)
    classes = targets.shape[1] if setting.loss == "mse" else int(targets.max()) + 1
    network = Network(setting, points, len(inputs), classes, width, noise, coupling)
    with torch.no_grad(), bar("simulating", setting.steps, show=progress) as advance:
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
            f"{points} points over {setting.steps} steps multiply each matrix with {queries} vectors, which fill all "
            f"directions of width {width}. The smallest width is {queries + 1}; take several times that to come near "
            "the limit of infinite width"
        )


class NoRoomError(DepthMuPError):
    """The device has not the memory."""


def check_memory(needed: float, device: torch.device, advice: str) -> None:
    """Refuses what the device has no memory for, before any of it is taken.

    Raises:
        NoRoomError: more than nine tenths of the memory is needed; the message ends with the advice.
    """
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    elif device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        return
    if needed > 0.9 * there:
        raise NoRoomError(
            f"the simulation would take {needed / 1e9:.1f} GB and there are {there / 1e9:.1f} GB. {advice}"
        )


def _train(network: Network, targets: Tensor, advance: Callable[[], None]) -> NFDResult:
    setting, samples = network.setting, network.samples
    record = Record(network)
    for step in range(setting.steps + 1):
        passed = forward(network, step, record)
        if not bool(torch.isfinite(passed.outputs).all()):
            record.stop(step, 1.0)  # unless the layer is known already
            break
        record.outputs.append(passed.outputs)
        if step == setting.steps:
            break
        batch = setting.batch(step, samples).to(passed.outputs.device)
        errors = setting.errors(passed.outputs[:, :samples], targets, batch)
        gradients = backward(network, passed, errors, batch, step, record)
        if gradients is None:
            break
        network.learn(gradients)
        advance()
    if (where := record.diverged) is not None:
        step, t = where
        warnings.warn(
            f"the simulation diverged at step {step}, layer time {t:.2f}: the learning rate {setting.lr:g} is too "
            "large here. The result holds the steps before",
            stacklevel=3,
        )
    return collect(network, record, targets)
