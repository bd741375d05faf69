"""The training of implicit models: of one seed's, or of several seeds' side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.diagnostics.nfd.gaussian import ROUNDED, GaussianMatrix
from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight
from torch_depthmup.diagnostics.nfd.simulate import check_memory
from torch_depthmup.errors import DepthMuPError, DivergenceError
from torch_depthmup.running import call, main_output, tensors_in

__all__ = ["Alone", "Networks", "Run", "TooManyError", "asked", "check_least_memory", "expected_rows", "worthwhile"]

SMALL, IN_ALL = 2**16, 2**20  # numbers in a matrix's rows of a pass, of one seed and of all: a processor's caches
ADVICE = "Take fewer samples or steps, or less width"


class TooManyError(Exception):
    """So many seeds side by side would be slower than fewer."""

    def __init__(self, fits: int):
        super().__init__(fits)
        self.fits = fits


class Networks(Protocol):
    """What a run trains: networks of some seeds with the same hidden matrices."""

    starts: Mapping[str, GaussianMatrix]
    """Each hidden matrix, of as many seeds."""

    def __call__(self, inputs: Any, loss: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Main outputs (seeds, *output) and losses (seeds,) on the same inputs."""


class Alone:
    """One seed's network."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.starts: Mapping[str, GaussianMatrix] = {name: w.matrix.start for name, w in _hidden_in(model).items()}

    def __call__(self, inputs: Any, loss: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Main output (1, *output) and loss (1,)."""
        output = call(self.model, inputs)
        return main_output(output)[None], loss(output)[None]


def _hidden_in(model: nn.Module) -> dict[str, ImplicitWeight]:
    """Its matrices that are never formed."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, ImplicitWeight)}


def check_least_memory(models: Sequence[nn.Module], inputs: Any, steps: int, share: float) -> None:
    """Before anything runs: each sample is at least one row of each matrix, in each pass.

    Beside another seed's network, parameters that are formed are held three times: they, their gradients, all at once.
    """
    samples = next((len(tensor) for tensor in tensors_in(inputs) if tensor.ndim), 1)
    starts = Alone(models[0]).starts.values()
    needed = (2 * steps + 1) * samples * sum(_bytes(start) for start in starts)
    if len(models) > 1:
        formed = [p for p in models[0].parameters() if not isinstance(p, ImplicitWeight)]
        needed += 3 * sum(p.numel() * p.element_size() for p in formed)
    check_memory(len(models) * needed / share, next(iter(starts)).noise.device, ADVICE)


def _bytes(start: GaussianMatrix) -> int:
    """What a direction takes for all seeds, with what is drawn for it, on the mean of both sides."""
    numbers = len(start.noise.generators) * (start.rows + start.columns)
    return numbers * (start.noise.dtype.itemsize + ROUNDED.itemsize) // 2


def asked(start: GaussianMatrix) -> int:
    """Directions asked of a matrix so far, from both sides: a transposed weight is asked from the left."""
    return start.right_side.count + start.left_side.count


def expected_rows(inputs: Any) -> int:
    """How many rows a matrix is multiplied by, to go by before anything runs: tokens, where inputs are integers."""
    first = next((tensor for tensor in tensors_in(inputs) if tensor.ndim), None)
    return 1 if first is None else len(first) if first.is_floating_point() else first.numel()


def worthwhile(numbers: int, device: torch.device) -> int:
    """How many seeds to train side by side, by the numbers in a matrix's rows of a pass.

    What is saved is the calling of operations. Where these are long, a processor's caches count for more.
    """
    if device.type != "cpu":
        return 10**6
    return max(1, IN_ALL // max(1, numbers)) if numbers <= SMALL else 1


@dataclass
class Run:
    """Training on all inputs at each step.

    Args:
        networks: of some seeds.
        optimizers: one for each seed.
        loss: (output, targets) -> scalar.
        steps: optimizer steps.
        before: what was asked of each matrix before the monitor was made.
        monitor: of a single seed's network.
        share: of the memory that the directions may take.
    """

    networks: Networks
    optimizers: Sequence[torch.optim.Optimizer]
    loss: Callable[[Any, Tensor], Tensor]
    steps: int
    before: Mapping[str, int]
    monitor: FeatureMonitor | None = None
    share: float = 1.0

    def train(self, inputs: Any, targets: Tensor, advance: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Outputs (seeds, steps + 1, *output) and losses (seeds, steps + 1) before each step and after the last one."""
        outputs, losses = [], []
        watched = {name: asked(start) for name, start in self.networks.starts.items()}
        for step in range(self.steps + 1):
            with torch.set_grad_enabled(step < self.steps):
                output, loss = self._pass(inputs, targets, step)
            if not bool(torch.isfinite(loss).all()):
                raise DivergenceError(f"the network diverged at step {step}: take a smaller learning rate")
            outputs.append(output.detach().clone())
            losses.append(loss.detach())
            if step == 0:
                self._make_room(watched)
            if self.monitor is not None:
                self.monitor.record(step)
            if step == self.steps:
                break
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.sum().backward()
            for optimizer in self.optimizers:
                _step(optimizer)
                advance()
        return torch.stack(outputs, dim=1).cpu(), torch.stack(losses, dim=1).cpu()

    def _pass(self, inputs: Any, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        try:
            return self.networks(inputs, lambda output: self.loss(output, targets))
        except Exception as error:  # whatever the user's code raises
            if step or isinstance(error, DepthMuPError):
                raise
            raise DepthMuPError(f"the model of this width fails on the inputs: {error}") from error

    def _make_room(self, watched: Mapping[str, int]) -> None:
        """After the first forward pass: what all steps will ask of each matrix, against its size and the memory.

        Before it, `dm.parametrize` or a monitor may have asked too; the monitor asks as much again at each step.
        """
        needed = largest = 0
        rows_held = []
        for name, start in self.networks.starts.items():
            asked_by_probe, rows = watched[name] - self.before[name], asked(start) - self.before[name]
            rows = rows if self.monitor is None else max(rows - asked_by_probe, asked_by_probe // 2)
            queries = watched[name] + (2 * self.steps + 1) * rows + self.steps * asked_by_probe
            own = queries * _bytes(start)
            needed, largest = needed + own, max(largest, own)
            in_all = self.before[name] + (self.steps + 1) * (rows + asked_by_probe // 2)
            least = min(start.rows, start.columns)
            if in_all >= least:
                raise DepthMuPError(
                    f"{name} of shape ({start.rows}, {start.columns}) is multiplied by {rows} rows in a pass, and "
                    f"{self.steps} steps need {in_all} of its {least} directions: little would be left out, and the "
                    "network is cheaper to train. Take fewer samples or steps, or a width at least "
                    f"{math.ceil((in_all + 1) / least)} times as large"
                )
            rows_held.append(rows * (start.rows + start.columns) // 2)
        self._check_worth(sum(rows_held) // len(rows_held))
        # A product by entries holds the gradients' rows of all steps, of one matrix at a time.
        device = next(iter(self.networks.starts.values())).noise.device
        check_memory((needed + largest) / self.share, device, ADVICE)
        for name, start in self.networks.starts.items():
            for side in (start.right_side, start.left_side):
                side.reserve(side.count + self.steps * (asked(start) - watched[name]))

    def _check_worth(self, numbers: int) -> None:
        device = next(iter(self.networks.starts.values())).noise.device
        if worthwhile(numbers, device) < len(self.optimizers):
            raise TooManyError(worthwhile(numbers, device))


def _step(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except DepthMuPError as error:
        raise DepthMuPError(
            f"{type(optimizer).__name__} cannot train a matrix that is never formed: {error}"
        ) from error
