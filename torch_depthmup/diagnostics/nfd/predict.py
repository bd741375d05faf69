"""Predicts the training of the user's own network at a width at which its hidden matrices could not be formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.diagnostics.nfd.building import built, hidden_matrices
from torch_depthmup.diagnostics.nfd.gaussian import Coupling, checked_coupling, checked_dtype
from torch_depthmup.diagnostics.nfd.simulate import NoRoomError
from torch_depthmup.diagnostics.nfd.together import Together
from torch_depthmup.diagnostics.nfd.training import (
    Alone,
    Run,
    TooManyError,
    asked,
    check_least_memory,
    expected_rows,
    worthwhile,
)
from torch_depthmup.diagnostics.shared.arguments import positive_integers, seeds_of
from torch_depthmup.diagnostics.shared.progress import bar
from torch_depthmup.diagnostics.shared.training import default_loss, own_random_state
from torch_depthmup.errors import DivergenceError

__all__ = ["Prediction", "predict"]

BESIDE = 0.25  # of the memory, for seeds side by side


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
        seeds: how many, or which: side by side where the model's code works under `torch.vmap`, or else in turn.
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
    sizes = [shape[0] + math.prod(shape[1:]) for shape in hidden.values()]
    numbers = expected_rows(inputs) * sum(sizes) // (2 * len(sizes))
    together = worthwhile(numbers, torch.device(device or "cpu")) if probe is None else 1
    groups = [which[i : i + together] for i in range(0, len(which), together)]

    def draw(group: Sequence[int]) -> _Drawn:
        models: list[nn.Module] = []
        for seed in group:
            like = models[0] if models else None
            models.append(built(make_model, width, hidden, seed=seed, coupling=coupling, device=device, dtype=dtype,
                                like=like))  # fmt: skip
        share = 1.0 if len(group) == 1 else BESIDE
        check_least_memory(models, inputs, steps, share)
        optimizers = [optimizer(model) for model in models]
        before = {name: asked(start) for name, start in Alone(models[0]).starts.items()}
        monitor = None if probe is None else FeatureMonitor(models[0], _moved(probe, device, dtype))
        networks = Alone(models[0]) if len(group) == 1 else Together(models)
        run = Run(networks, optimizers, loss or default_loss, steps, before, monitor, share)
        with own_random_state():
            torch.manual_seed(group[0])
            outputs, losses = run.train(inputs, targets, advance)
        return outputs, losses, [] if monitor is None else [monitor.rows]

    with bar("predicting", len(which) * steps, show=progress) as advance:
        drawn = [part for group in groups for part in _together(group, draw)]
    outputs, losses, rows = zip(*drawn, strict=True)
    return Prediction(width, torch.cat(outputs), torch.cat(losses), tuple(hidden), tuple(sum(rows, [])))


_Drawn = tuple[Tensor, Tensor, list[list[dict[str, Any]]]]
"""Outputs, losses and a monitor's rows of some seeds."""


def _together(seeds: Sequence[int], draw: Callable[[Sequence[int]], _Drawn]) -> list[_Drawn]:
    """Seeds side by side, in smaller groups where memory or caches are, and in turn where that does not go."""
    try:
        return [draw(seeds)]
    except DivergenceError:
        raise
    except Exception as error:  # the user's code need not work under vmap; what is wrong with it shows with one seed
        if len(seeds) == 1:
            raise
        fits = error.fits if isinstance(error, TooManyError) else 1
        fits = (len(seeds) + 1) // 2 if isinstance(error, NoRoomError) else fits
        parts = [seeds[i : i + fits] for i in range(0, len(seeds), fits)]
        return [drawn for part in parts for drawn in _together(part, draw)]


def _moved(value: Any, device: torch.device | str | None, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    return type(value)(_moved(item, device, dtype) for item in value) if isinstance(value, tuple | list) else value
