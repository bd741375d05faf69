"""Neural Feature Dynamics: the training of a very wide residual network, simulated without its matrices.

The network (arXiv 2512.21075): h_0 = U x / sqrt(d), h_l = h_{l-1} + a W_l phi(h_{l-1}) / sqrt(n), f = v . h_L / n, all
entries standard normal; or blocks of two layers, x_l = W_l h_{l-1} / sqrt(n), h_l = h_{l-1} + a V_l phi(x_l) / sqrt(n).
The branch multiplier a is sqrt(T / L) under depth-muP. Trained by SGD with learning rate lr * n.

What training adds to a matrix has low rank, and what was there at the start is seen through products only
(`gaussian.py`), so nothing here is larger than width times samples times steps.
"""

from __future__ import annotations

import math
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torch_depthmup.diagnostics.activations import Activation
from torch_depthmup.diagnostics.canonical import Loss, Scales, Setting, checked_data
from torch_depthmup.diagnostics.dynamics import Network, Record, Recorded, backward, forward
from torch_depthmup.diagnostics.extras import needs
from torch_depthmup.diagnostics.gaussian import Coupling, Noise
from torch_depthmup.diagnostics.progress import bar
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.rules import Rule, get_rule

__all__ = ["GIAGap", "NFDResult", "gia_gap", "memory_estimate", "simulate"]

SIZES = ("stream_moment", "gradient_moment", "stream_update", "inner_update", "inner_own", "outer_own")


@dataclass(frozen=True)
class NFDResult:
    """What a simulation, or a measured network, gave. All tensors on the CPU; step 0 is initialization.

    Args:
        setting: the network and its training.
        coupling: ``"reused"``, ``"decoupled"``, or ``"network"`` for a measurement.
        width: n.
        outputs: (seeds, steps + 1, samples, classes).
        held_out: the same for inputs that were only evaluated.
        losses: (seeds, steps + 1).
        stream_moment: E[h_l h_l], mean over samples: (seeds, steps + 1, depth + 1).
        gradient_moment: E[g_l g_l] with g_l = n df/dh_l for one output, and n dLoss/dh_l for several; mean over
            samples, (seeds, steps + 1, depth + 1); nan after the last step.
        stream_update: root mean square of h_l(k) - h_l(0), as stream_moment.
        inner_update: the same of what a block's activation takes or, for one layer, of phi(h): (seeds, steps + 1,
            depth).
        inner_own: root mean square of (W - W(0)) h / sqrt(n); zero for one-layer blocks, which have no inner matrix.
        outer_own: the same of the matrix before the addition, without the branch multiplier.
        kernels: E[h h'] between samples at depths `times`: (seeds, steps + 1, len(times), samples, samples).
        feature_kernels: E[phi phi'] of the blocks' activations, likewise.
        gradient_kernels: E[g g'], likewise.
        times: layers at which kernels are kept.
        diverged: (step, layer time) at which values stopped being finite, or ``None``.
    """

    setting: Setting
    coupling: str
    width: int
    outputs: Tensor
    held_out: Tensor
    losses: Tensor
    stream_moment: Tensor
    gradient_moment: Tensor
    stream_update: Tensor
    inner_update: Tensor
    inner_own: Tensor
    outer_own: Tensor
    kernels: Tensor
    feature_kernels: Tensor
    gradient_kernels: Tensor
    times: tuple[int, ...]
    diverged: tuple[int, float] | None = None

    def mean(self, name: str) -> Tensor:
        """Mean over seeds of one of the fields."""
        return getattr(self, name).mean(0)

    def error(self, name: str) -> Tensor:
        """Standard error over seeds of one of the fields; nan for a single seed."""
        value = getattr(self, name)
        return value.std(0) / math.sqrt(len(value))

    def frame(self) -> Any:
        """Tidy pandas frame of the sizes: step, t, quantity, mean, error.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = []
        for name in SIZES:
            mean, error = self.mean(name), self.error(name)
            times = self.layer_times(name).tolist()
            for step in range(mean.shape[0]):
                for layer, t in enumerate(times):
                    rows.append((step, t, name, float(mean[step, layer]), float(error[step, layer])))
        return needs("pandas").DataFrame(rows, columns=["step", "t", "quantity", "mean", "error"])

    def plot(self) -> Any:
        """Losses and outputs over steps, and sizes over layer time at the last step, with standard errors.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = needs("matplotlib.figure").Figure(figsize=(11, 3.4), layout="constrained")
        losses, outputs, sizes = figure.subplots(1, 3)
        steps = range(self.losses.shape[1])
        losses.errorbar(steps, self.mean("losses"), self.error("losses"))
        losses.set(title="loss", xlabel="step", ylim=(0, None))
        for sample in range(min(6, self.outputs.shape[2])):
            outputs.errorbar(steps, self.mean("outputs")[:, sample, 0], self.error("outputs")[:, sample, 0])
        outputs.set(title="outputs", xlabel="step")
        for name in ("stream_update", "inner_update", "inner_own", "outer_own"):
            mean, error = self.mean(name)[-1], self.error(name)[-1]
            sizes.errorbar(self.layer_times(name), mean, error, label=name.replace("_", " "))
        sizes.set(title=f"feature updates after {len(steps) - 1} steps", xlabel="layer time t", ylim=(0, None))
        sizes.legend(fontsize="small", frameon=False)
        return figure

    def layer_times(self, name: str) -> Tensor:
        """t = l / L of the layers of one of the sizes."""
        count = getattr(self, name).shape[2]
        return (torch.arange(count) + self.setting.depth + 1 - count) / self.setting.depth

    def save(self, path: str | Path) -> None:
        """Writes the result to a file. An activation that is a callable cannot be saved.

        Raises:
            DepthMuPError: the activation is a callable without a name of its own.
        """
        if not isinstance(self.setting.activation, str):
            raise DepthMuPError("a result whose activation is a callable cannot be saved; use an activation by name")
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "setting"}
        setting = {**asdict(self.setting), "rule": asdict(get_rule(self.setting.rule))}
        torch.save({**data, "setting": setting}, path)

    @classmethod
    def load(cls, path: str | Path) -> NFDResult:
        """The result that `save` wrote.

        Raises:
            DepthMuPError: the file is something else.
        """
        try:
            data = torch.load(path, weights_only=True)
            setting = data.pop("setting")
            known = {"rule": Rule(**setting["rule"]), "scales": Scales(**setting["scales"])}
            return cls(setting=Setting(**{**setting, **known}), **data)
        except (RuntimeError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
            raise DepthMuPError(f"{path} is not a saved NFDResult: {error}") from error


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
    rule: str | Rule = "depth-mup",
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


def collect(network: Recorded, record: Record, targets: Tensor) -> NFDResult:
    """A record as a result; of a simulation or of a real network."""
    setting, samples = network.setting, network.samples
    if not record.outputs:
        raise DepthMuPError("not even the forward pass at initialization is finite: inputs or horizon are too large")
    outputs = torch.stack(record.outputs, dim=1)
    lengths = dict.fromkeys(("stream_moment", "gradient_moment", "stream_update"), setting.depth + 1)
    lengths |= dict.fromkeys(("inner_update", "inner_own", "outer_own"), setting.depth)
    kept = len(record.times)
    features = sum(time > 0 for time in record.times)
    lengths |= {"kernels": kept, "feature_kernels": features, "gradient_kernels": kept}
    return NFDResult(
        setting=setting,
        coupling=network.coupling,
        width=network.width,
        outputs=outputs[:, :, :samples].cpu(),
        held_out=outputs[:, :, samples:].cpu(),
        losses=setting.losses(outputs[:, :, :samples], targets).cpu(),
        times=record.times,
        diverged=record.diverged,
        **{name: record.stacked(name, length) for name, length in lengths.items()},
    )


def gia_gap(inputs: Tensor, targets: Tensor, **options: Any) -> GIAGap:
    """What gradient independence gets wrong in one training run: both couplings on the same draws.

    Args:
        inputs: as for `simulate`.
        targets: likewise.
        options: likewise, without ``coupling``.

    Returns:
        Both results, and their differences seed by seed.
    """
    reused, decoupled = (
        simulate(inputs, targets, **options, coupling=coupling)  # type: ignore[arg-type]
        for coupling in ("reused", "decoupled")
    )
    return GIAGap(reused, decoupled)


@dataclass(frozen=True)
class GIAGap:
    """The two couplings of one training run beside each other."""

    reused: NFDResult
    decoupled: NFDResult

    def gap(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean over seeds of reused minus decoupled in one field of the results, and its standard error."""
        difference = getattr(self.reused, name) - getattr(self.decoupled, name)
        return difference.mean(0), difference.std(0) / math.sqrt(len(difference))

    def function(self) -> tuple[Tensor, Tensor]:
        """The gap in the function's change since initialization, (steps + 1, samples, classes), and its error."""
        changes = [r.outputs - r.outputs[:, :1] for r in (self.reused, self.decoupled)]
        difference = changes[0] - changes[1]
        return difference.mean(0), difference.std(0) / math.sqrt(len(difference))
