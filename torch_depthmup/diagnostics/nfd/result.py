"""What a simulation or a measured network gave: tensors by seed, step and layer; a frame; a file."""

from __future__ import annotations

import math
import pickle
import textwrap
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.record import Record, Recorded
from torch_depthmup.diagnostics.nfd.setting import Scales, Setting
from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.rules import Rule, get_rule
from torch_depthmup.tables import COLUMNS, columns, number

if TYPE_CHECKING:
    import pandas

__all__ = ["NFDResult", "SIZES", "collect"]

SIZES = ("stream_moment", "gradient_moment", "stream_update", "inner_update", "inner_own", "outer_own")
"""The fields that are sizes by layer."""


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

    def __str__(self) -> str:
        """The loss and the sizes of the updates at each step, means over seeds and layers."""
        setting, seeds = self.setting, len(self.losses)
        head = (
            f"{setting.depth} blocks of {setting.block_layers} layers, width {self.width}, rule "
            f"{get_rule(setting.rule).label}, lr {setting.lr:g}, {self.coupling}: {seeds} seed{'s' * (seeds > 1)}"
        )
        updates = [name for name in SIZES if not name.endswith("moment")]
        sizes = {name: self.mean(name).mean(1) for name in updates}
        losses, errors = self.mean("losses"), self.error("losses")
        rows = []
        for step in range(self.losses.shape[1]):
            loss = f"{number(float(losses[step]))} ± {number(float(errors[step]), 1)}"
            rows.append((str(step), (loss, *(number(float(sizes[name][step])) for name in updates))))
        header = ("step", "loss", *(name.replace("_", " ") for name in updates))
        told = [] if self.diverged is None else ["diverged at step {}, layer time {:.2f}".format(*self.diverged)]
        return "\n".join([*textwrap.wrap(head, COLUMNS), *columns(header, rows), *told])

    def mean(self, name: str) -> Tensor:
        """Mean over seeds of one of the fields."""
        return getattr(self, name).mean(0)

    def error(self, name: str) -> Tensor:
        """Standard error over seeds of one of the fields; nan for a single seed."""
        value = getattr(self, name)
        return value.std(0) / math.sqrt(len(value)) if len(value) > 1 else torch.full_like(value[0], math.nan)

    def frame(self) -> pandas.DataFrame:
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
