"""Predicts the training of the user's own network at a width at which its hidden matrices could not be formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.diagnostics.nfd.building import built, hidden_matrices
from torch_depthmup.diagnostics.nfd.gaussian import ROUNDED, Coupling, GaussianMatrix, checked_coupling, checked_dtype
from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight
from torch_depthmup.diagnostics.nfd.simulate import check_memory
from torch_depthmup.diagnostics.shared.arguments import positive_integers, seeds_of
from torch_depthmup.diagnostics.shared.progress import bar
from torch_depthmup.diagnostics.shared.training import default_loss, own_random_state
from torch_depthmup.errors import DepthMuPError, DivergenceError
from torch_depthmup.running import call, main_output, tensors_in

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """The law of a network's training, as draws over its random initialization. Step 0 is initialization.

    Args:
        width: what the factory was called with.
        outputs: the model's main output on the inputs, (seeds, steps + 1, *output).
        losses: (seeds, steps + 1).
        hidden: names of the matrices that were never formed.
        rows: of a `FeatureMonitor` on each seed's model, with a record at each step; empty without ``probe``.
    """

    width: int
    outputs: Tensor
    losses: Tensor
    hidden: tuple[str, ...]
    rows: tuple[list[dict[str, Any]], ...] = ()

    def mean(self, name: str = "outputs") -> Tensor:
        """Mean over seeds of one of the fields."""
        value: Tensor = getattr(self, name).mean(0)
        return value

    def error(self, name: str = "outputs") -> Tensor:
        """Standard error over seeds of one of the fields; nan for a single seed."""
        value: Tensor = getattr(self, name)
        return value.std(0) / math.sqrt(len(value))


def predict(
    make_model: Callable[[int], nn.Module],
    inputs: Any,
    targets: Tensor,
    *,
    width: int,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    probe: Any = None,
    seeds: int | Sequence[int] = 4,
    coupling: Coupling = "reused",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Prediction:
    """Trains the user's own model by its own code on all inputs at each step, without forming its hidden matrices.

    The model is made in training mode, as the factory leaves it. A network of this width follows the same law, up to
    what the shape of the distribution of its initial entries matters, which falls like 1 / width.

    Args:
        make_model: a factory width -> model, with random initialization.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments of the model.
        targets: handed to the loss.
        width: of the model. Rows that a matrix is multiplied by in all steps together must be fewer than its columns.
        optimizer: model -> optimizer: torch's SGD (momentum, nesterov, weight decay) or Muon, of low rank; or
            Adam, AdamW, Adafactor and others that act on gradients entry by entry. These take a matrix's entries from
            the gradients of all steps so far, for each product again: time grows like width^2 steps^2, memory does not.
            Likewise `dm.SGD`, `dm.AdamW`, ... after `dm.parametrize(model, ...)` in the same function.
        steps: optimizer steps.
        loss: (output, targets) -> scalar; the default is cross-entropy for integer targets, else mean squares.
        probe: inputs on which a `FeatureMonitor` watches each step, for ``monitor.report(prediction=...)`` and
            `comparison.compare`; ``None`` does not watch.
        seeds: how many, or which; one after the other.
        coupling: ``"reused"`` predicts real networks; ``"decoupled"`` sends gradients back through others.
        device: where to train; ``None`` is the CPU.
        dtype: float32 or float64.
        progress: whether a terminal shows a bar over all steps (needs rich).

    Raises:
        DepthMuPError: the factory does not fit (see `implicit_model`), an operation or the optimizer needs the entries
            of a hidden matrix (named), the width does not support so many rows, memory will not do, or training
            diverged.

    Source: arXiv 2512.21075; the conditional products are those of `gaussian.py`.

    >>> make = lambda n: nn.Sequential(nn.Linear(3, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 1))
    >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
    >>> result = predict(make, torch.eye(3), torch.ones(3, 1), width=10**5, optimizer=sgd, steps=1, seeds=2)
    >>> result.outputs.shape, result.hidden
    (torch.Size([2, 2, 3, 1]), ('2.weight',))
    """
    positive_integers("width and steps", [width, steps])
    checked_coupling(coupling), checked_dtype(dtype)
    which = seeds_of(seeds)
    inputs, targets = _moved(inputs, device, dtype), _moved(targets, device, dtype)
    hidden = hidden_matrices(make_model, width)
    outputs, losses = [], []
    rows: list[list[dict[str, Any]]] = []
    with bar("predicting", len(which) * steps, show=progress) as advance:
        for seed in which:
            model = built(make_model, width, hidden, seed=seed, coupling=coupling, device=device, dtype=dtype)
            weights = {name: p for name, p in model.named_parameters() if isinstance(p, ImplicitWeight)}
            _check_least_memory(weights, inputs, steps)
            stepping = optimizer(model)
            before = {name: _asked(weight) for name, weight in weights.items()}
            monitor = None if probe is None else FeatureMonitor(model, _moved(probe, device, dtype))
            run = _Run(model, weights, stepping, loss or default_loss, steps, before, monitor)
            with own_random_state():
                torch.manual_seed(seed)
                values = run.train(inputs, targets, advance)
            outputs.append(torch.stack([output for output, _ in values]))
            losses.append(torch.stack([value for _, value in values]))
            rows += [] if monitor is None else [monitor.rows]
    return Prediction(width, torch.stack(outputs).cpu(), torch.stack(losses).cpu(), tuple(hidden), tuple(rows))


def _moved(value: Any, device: torch.device | str | None, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    return type(value)(_moved(item, device, dtype) for item in value) if isinstance(value, tuple | list) else value


def _check_least_memory(weights: Mapping[str, ImplicitWeight], inputs: Any, steps: int) -> None:
    """Before anything runs: each sample is at least one row of each matrix, in each pass."""
    samples = next((len(tensor) for tensor in tensors_in(inputs) if tensor.ndim), 1)
    sizes = sum(_bytes(weight) for weight in weights.values())
    device = next(iter(weights.values())).device
    check_memory((2 * steps + 1) * samples * sizes, device, "Take fewer samples or steps, or less width")


def _bytes(weight: ImplicitWeight) -> int:
    """What a direction takes, with what is drawn for it, on the mean of both sides."""
    start = weight.matrix.start
    return (start.rows + start.columns) * (weight.element_size() + ROUNDED.itemsize) // 2


def _asked(weight: ImplicitWeight) -> int:
    """Directions asked of a matrix so far, from both sides: a transposed weight is asked from the left."""
    start = weight.matrix.start
    return start.right_side.count + start.left_side.count


@dataclass
class _Run:
    """One seed's training. ``before`` is what was asked of each matrix before the monitor was made."""

    model: nn.Module
    weights: Mapping[str, ImplicitWeight]
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any, Tensor], Tensor]
    steps: int
    before: Mapping[str, int]
    monitor: FeatureMonitor | None

    def train(self, inputs: Any, targets: Tensor, advance: Callable[[], None]) -> list[tuple[Tensor, Tensor]]:
        """Output and loss before each step and after the last one."""
        values = []
        watched = {name: _asked(weight) for name, weight in self.weights.items()}
        for step in range(self.steps + 1):
            with torch.set_grad_enabled(step < self.steps):
                output = self._output(inputs, step)
                value = self.loss(output, targets)
            if not bool(torch.isfinite(value)):
                raise DivergenceError(f"the network diverged at step {step}: take a smaller learning rate")
            values.append((main_output(output).detach().clone(), value.detach()))
            if step == 0:
                self._make_room(watched)
            if self.monitor is not None:
                self.monitor.record(step)
            if step == self.steps:
                break
            self.optimizer.zero_grad()
            value.backward()
            self._step()
            advance()
        return values

    def _output(self, inputs: Any, step: int) -> Any:
        try:
            return call(self.model, inputs)
        except Exception as error:  # whatever the user's code raises
            if step or isinstance(error, DepthMuPError):
                raise
            raise DepthMuPError(f"the model of this width fails on the inputs: {error}") from error

    def _step(self) -> None:
        try:
            self.optimizer.step()
        except DepthMuPError as error:
            raise DepthMuPError(
                f"{type(self.optimizer).__name__} cannot train a matrix that is never formed: {error}"
            ) from error

    def _make_room(self, watched: Mapping[str, int]) -> None:
        """After the first forward pass: what all steps will ask of each matrix, against its size and the memory.

        Before it, `dm.parametrize` or a monitor may have asked too; the monitor asks as much again at each step.
        """
        needed = largest = 0
        for name, weight in self.weights.items():
            start: GaussianMatrix = weight.matrix.start
            asked_by_probe, rows = watched[name] - self.before[name], _asked(weight) - self.before[name]
            rows = rows if self.monitor is None else max(rows - asked_by_probe, asked_by_probe // 2)
            queries = watched[name] + (2 * self.steps + 1) * rows + self.steps * asked_by_probe
            own = queries * _bytes(weight)
            needed, largest = needed + own, max(largest, own)
            asked = self.before[name] + (self.steps + 1) * (rows + asked_by_probe // 2)
            least = min(start.rows, start.columns)
            if asked >= least:
                raise DepthMuPError(
                    f"{name} of shape {tuple(weight.shape)} is multiplied by {rows} rows in a pass, and {self.steps} "
                    f"steps need {asked} of its {least} directions: little would be left out, and the network is "
                    "cheaper to train. Take fewer samples or steps, or a width at least "
                    f"{math.ceil((asked + 1) / least)} times as large"
                )
        # A product by entries holds the gradients' rows of all steps, of one matrix at a time.
        check_memory(
            needed + largest, next(iter(self.weights.values())).device, "Take fewer samples or steps, or less width"
        )
        for name, weight in self.weights.items():
            for side in (weight.matrix.start.right_side, weight.matrix.start.left_side):
                side.reserve(side.count + self.steps * (_asked(weight) - watched[name]))
