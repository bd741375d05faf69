"""Predicted against measured: the simulation beside PyTorch networks trained by this package's own constructors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from torch_depthmup.diagnostics.monitor.beside import Beside, beside
from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.diagnostics.nfd.gaussian import checked_dtype
from torch_depthmup.diagnostics.nfd.network import CanonicalBlock, CanonicalResNet
from torch_depthmup.diagnostics.nfd.predict import Prediction
from torch_depthmup.diagnostics.nfd.record import Record
from torch_depthmup.diagnostics.nfd.result import SIZES, NFDResult, collect
from torch_depthmup.diagnostics.nfd.setting import Scales, Setting, checked_data
from torch_depthmup.diagnostics.shared.arguments import seeds_of
from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.optim import SGD
from torch_depthmup.scaling.apply import parametrize

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "compare", "measure"]

FAR = 4.0  # standard errors beyond which a difference is called one
ALLOWED = 0.01  # share of quantities that may be farther


def measure(
    setting: Setting,
    inputs: Tensor,
    targets: Tensor,
    *,
    width: int,
    seeds: int | Sequence[int] = 4,
    backward: Literal["tied", "independent"] = "tied",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> NFDResult:
    """Trains real networks of the setting, seed by seed, and records what the simulation records.

    Args:
        setting: the network and its training.
        inputs: (samples, d).
        targets: as for `nfd.simulate`.
        width: n of the network, whose matrices are formed.
        seeds: how many, or which.
        backward: ``"independent"`` gives the network of which gradient independence holds.
        dtype: of the network.
        device: where to train; ``None`` is that of the inputs.

    Returns:
        The fields of a simulation, with ``coupling="network"``.

    Raises:
        DepthMuPError: data or setting do not fit, the setting has other scales, or training diverged.

    >>> inputs, targets = torch.eye(2), torch.tensor([1.0, -1.0])
    >>> measure(Setting(depth=2, steps=1, lr=1.0), inputs, targets, width=16, seeds=2).outputs.shape
    torch.Size([2, 2, 2, 1])
    """
    if setting.scales != Scales():
        raise DepthMuPError(
            "the setting has scales of its own, those of another network than the canonical one that is trained here. "
            "Train that network, or leave scales out"
        )
    device = torch.device(device) if device is not None else inputs.device
    inputs, targets = checked_data(inputs, targets, setting, device, checked_dtype(dtype))
    results = [_train(setting, inputs, targets, width, seed, backward, dtype) for seed in seeds_of(seeds)]
    together: dict[str, Any] = {name: torch.cat([getattr(r, name) for r in results]) for name in _PER_SEED}
    return replace(results[0], **together)


_PER_SEED = ("outputs", "held_out", "losses", *SIZES, "kernels", "feature_kernels", "gradient_kernels")


@dataclass
class _Shape:
    """What a `Record` asks of a network."""

    setting: Setting
    samples: int
    width: int
    coupling: str = "network"


def _train(
    setting: Setting, inputs: Tensor, targets: Tensor, width: int, seed: int, backward: Any, dtype: torch.dtype
) -> NFDResult:
    torch.manual_seed(seed)
    classes = targets.shape[1] if setting.loss == "mse" else int(targets.max()) + 1
    network = CanonicalResNet(setting, inputs.shape[1], classes, width, backward).to(inputs.device, dtype)
    multiplier = setting.depth / setting.base_depth
    parametrize(network, depth_multiplier=multiplier, example_inputs=inputs, rule=setting.rule, how="wrap")
    optimizer = SGD(network, lr=setting.lr * width, momentum=setting.momentum)
    shape = _Shape(setting, len(inputs), width)
    record = Record(shape)
    starts = [{name: p.detach().clone() for name, p in block.named_parameters()} for block in network.blocks]
    for step in range(setting.steps + 1):
        streams, outputs = _forward(network, inputs, starts, step, record)
        if not bool(torch.isfinite(outputs).all()):
            raise DepthMuPError(f"the network diverged at step {step}: the learning rate {setting.lr:g} is too large")
        record.outputs.append(outputs.detach()[None])
        if step == setting.steps:
            break
        batch = setting.batch(step, len(inputs)).to(inputs.device)
        errors = setting.errors(outputs.detach(), targets, batch)
        objective = (outputs * errors).sum()
        _record_gradients(setting, streams, outputs, objective, step, record, width)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    return collect(shape, record, targets)


def _forward(
    network: CanonicalResNet, inputs: Tensor, starts: list[dict[str, Tensor]], step: int, record: Record
) -> tuple[list[Tensor], Tensor]:
    h = network.stem(inputs).requires_grad_()
    streams = [h]
    record.stream(step, 0, h.detach()[None])
    blocks = cast(Iterable[CanonicalBlock], network.blocks)
    for number, (block, start) in enumerate(zip(blocks, starts, strict=True)):
        with torch.no_grad():
            taken = h if block.inner is None else block.inner(h)
            phi = block.phi(taken)
            root = math.sqrt(h.shape[1])
            outer_own = phi @ (block.outer.weight - start["outer.weight"]).T / root
            inner_own = None
            if block.inner is not None:
                inner_own = (h @ (block.inner.weight - start["inner.weight"]).T / root)[None]
            inner = phi if inner_own is None else taken
            record.block(step, number, inner[None], inner_own, outer_own[None], phi[None])
        h = h + block(h)
        streams.append(h)
        record.stream(step, number + 1, h.detach()[None])
    return streams, h @ network.readout.T / h.shape[1]


def _record_gradients(
    setting: Setting, streams: list[Tensor], outputs: Tensor, objective: Tensor, step: int, record: Record, width: int
) -> None:
    """g_l = n df/dh_l for one output, n dLoss/dh_l for several."""
    target = outputs.sum() if outputs.shape[1] == 1 else objective
    gradients = torch.autograd.grad(target, streams, retain_graph=True)
    for layer in range(setting.depth, -1, -1):
        record.gradient(step, layer, gradients[layer][None] * width)


@dataclass(frozen=True)
class Comparison:
    """A prediction beside a measurement, quantity by quantity."""

    predicted: NFDResult
    measured: NFDResult

    def difference(self, name: str) -> tuple[Tensor, Tensor]:
        """Measured minus predicted mean over seeds, and its standard error from both spreads."""
        error = (self.measured.error(name).square() + self.predicted.error(name).square()).sqrt()
        return self.measured.mean(name) - self.predicted.mean(name), error

    def z(self, name: str) -> Tensor:
        """The difference in standard errors; 0 where both are the same number, nan where one is not known."""
        difference, error = self.difference(name)
        return torch.where(difference == 0, 0.0, difference / error)

    def frame(self) -> pandas.DataFrame:
        """Tidy pandas frame: quantity, step, t, predicted, measured, z. Outputs have t = 1 and are named by sample.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = []
        for name in ("outputs", *SIZES):
            z = self.z(name)
            predicted, measured = self.predicted.mean(name), self.measured.mean(name)
            depth = self.predicted.setting.depth
            for step in range(len(z)):
                for i, values in enumerate(zip(predicted[step], measured[step], z[step], strict=True)):
                    p, m, zs = (value.flatten() for value in values)
                    t = 1.0 if name == "outputs" else (i + depth + 1 - z.shape[1]) / depth
                    for j in range(len(p)):
                        label = f"output {j} of sample {i}" if name == "outputs" else name
                        rows.append((label, step, t, float(p[j]), float(m[j]), float(zs[j])))
        return needs("pandas").DataFrame(rows, columns=["quantity", "step", "t", "predicted", "measured", "z"])

    @property
    def far(self) -> dict[str, float]:
        """For each quantity the share of its values that differ by more than four standard errors."""
        shares = {}
        for name in ("outputs", *SIZES):
            z = self.z(name)
            known = z[torch.isfinite(z)]
            shares[name] = float((known.abs() > FAR).float().mean()) if len(known) else 0.0
        return shares

    @property
    def verdict(self) -> str:
        """In words: whether outputs, and which other quantities, agree."""
        off = [name for name, share in self.far.items() if share > ALLOWED]
        if not off:
            return (
                f"agrees: no quantity differs by more than {FAR:g} standard errors in over {ALLOWED:.0%} of its values"
            )
        return f"differs by more than {FAR:g} standard errors: " + ", ".join(f"{n} ({self.far[n]:.0%})" for n in off)


@overload
def compare(predicted: NFDResult, measured: NFDResult) -> Comparison: ...
@overload
def compare(predicted: Prediction, measured: FeatureMonitor | Sequence[FeatureMonitor]) -> Beside: ...
def compare(predicted: Any, measured: Any) -> Any:
    """Puts a prediction beside a measurement of the same network.

    Args:
        predicted: from `nfd.simulate`, or from `nfd.predict` with ``probe=``.
        measured: from `measure`, or a second simulation; beside `nfd.predict` the monitor of a network that was trained
            in the same way on the same probe, or several. A single one should have the prediction's width.

    Returns:
        For a prediction of `nfd.predict`, every number that the monitors' last record has of every layer.

    Raises:
        DepthMuPError: they are of different settings or networks, steps do not fit, or a single seed gives no standard
            error.

    >>> from torch import nn
    >>> from torch_depthmup import Residual, diagnostics
    >>> from torch_depthmup.diagnostics.nfd import predict
    >>> make = lambda n: nn.Sequential(nn.Linear(2, n), Residual(nn.Linear(n, n)), nn.Linear(n, 1))
    >>> x, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
    >>> prediction = predict(make, x, y, width=64, optimizer=sgd, steps=1, probe=x, seeds=4)
    >>> model = make(64)
    >>> optimizer, monitor = sgd(model), diagnostics.FeatureMonitor(model, x)
    >>> (model(x) - y).square().mean().backward(), optimizer.step(), monitor.record(1)
    (None, None, True)
    >>> compare(prediction, monitor).networks
    1
    """
    if isinstance(predicted, Prediction):
        monitors = measured if isinstance(measured, Sequence) else [measured]
        return beside([monitor.rows for monitor in monitors], predicted.rows)
    if predicted.setting != measured.setting:
        raise DepthMuPError(f"the settings differ: {predicted.setting} was predicted, {measured.setting} measured")
    for name, result in (("predicted", predicted), ("measured", measured)):
        if len(result.outputs) < 2:
            raise DepthMuPError(f"the {name} result has one seed, and so no standard error: take two or more")
        if result.diverged is not None:
            raise DepthMuPError(f"the {name} result diverged at step {result.diverged[0]}")
    return Comparison(predicted, measured)
