"""The plain training loop that the instruments run where the user gives data and not a loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.shared.arguments import checked_samples, positive_integers
from torch_depthmup.errors import DepthMuPError, MeasurementError
from torch_depthmup.optim import SGD, Adam, AdamW
from torch_depthmup.running import call, main_output

__all__ = ["OPTIMIZERS", "Training", "default_loss", "own_random_state", "take", "trainable"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
DIVERGED = 2.0  # a loss above so many times that of the first batch is past the edge of stability, finite or not
EVALUATION = 8  # batches at a time where no gradients are kept


@dataclass(frozen=True)
class Training:
    """A plain training loop on data in memory, for sweeps that need no loop of their own.

    Args:
        inputs: a tensor (samples, ...), or a dict, tuple or list of such, as the model takes them.
        targets: (samples, ...) class indices or numbers.
        optimizer: ``"sgd"`` (momentum 0.9), ``"adam"`` or ``"adamw"``.
        steps: optimizer steps.
        batch_size: samples drawn with replacement for each step.
        loss: (output, targets) -> scalar; the default is cross-entropy for integer targets, else mean squares.

    Calling it with (model, lr, seed) trains a parametrized model and returns its mean loss over all the data in
    evaluation mode, infinite where it diverged.

    Raises:
        DepthMuPError: inputs and targets are not of equally many samples, or an option is not known or not positive.
    """

    inputs: Any
    targets: Tensor
    optimizer: str = "adam"
    steps: int = 60
    batch_size: int = 128
    loss: Callable[[Any, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        checked_samples((self.inputs, self.targets))
        positive_integers("steps and batch_size", [self.steps, self.batch_size])
        if self.optimizer not in OPTIMIZERS:
            raise DepthMuPError(f"optimizer={self.optimizer!r} is not known. Write one of {', '.join(OPTIMIZERS)}")

    def __call__(self, model: nn.Module, lr: float, seed: int) -> float:
        options = {"momentum": 0.9} if self.optimizer == "sgd" else {}
        optimizer = OPTIMIZERS[self.optimizer](model, lr=lr, **options)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        first = math.nan
        for step in range(self.steps):
            batch = torch.randint(len(self.targets), (self.batch_size,), generator=generator)
            loss = trainable(self._loss(model, batch), model)
            value = loss.item()
            if not math.isfinite(value):
                return math.inf
            first = value if step == 0 else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        final = self._evaluate(model)
        return math.inf if math.isnan(final) or final > DIVERGED * first else final

    def _loss(self, model: nn.Module, which: Tensor) -> Tensor:
        return (self.loss or default_loss)(call(model, take(self.inputs, which)), self.targets[which])

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> float:
        model.eval()
        parts = torch.arange(len(self.targets)).split(EVALUATION * self.batch_size)
        return sum(self._loss(model, part).item() * len(part) for part in parts) / len(self.targets)


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Seeds set inside do not reach the caller's random numbers."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def default_loss(output: Any, targets: Tensor) -> Tensor:
    """Cross-entropy for integer targets, mean squares for floating ones."""
    value = main_output(output)
    if targets.is_floating_point():
        return nn.functional.mse_loss(value, targets.reshape(value.shape))
    return nn.functional.cross_entropy(value.flatten(0, -2), targets.flatten())


def trainable(loss: Any, model: nn.Module) -> Tensor:
    """The loss itself, where training can begin at it.

    Raises:
        MeasurementError: it is no number in a tensor, or no parameter of the model is behind it.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise MeasurementError(f"the loss is {found}. Return a tensor that holds one number, such as a mean")
    if loss.requires_grad:
        return loss
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise MeasurementError(
            f"every parameter of {type(model).__name__} is frozen (requires_grad=False), so that nothing can be "
            "trained. Unfreeze what should learn, or all of it with model.requires_grad_(True)"
        )
    raise MeasurementError(
        f"no parameter of {type(model).__name__} that can be trained is behind the loss: it was detached, or is not "
        "computed from the output. Let it be, without detach(), item() or torch.no_grad()"
    )


def take(inputs: Any, which: Any) -> Any:
    """The samples of a batch that an index or slice picks, of each tensor in it."""
    if isinstance(inputs, Tensor):
        return inputs[which]
    if isinstance(inputs, Mapping):
        return {key: take(value, which) for key, value in inputs.items()}
    return type(inputs)(take(value, which) for value in inputs) if isinstance(inputs, tuple | list) else inputs
