"""Learning rates without training the network: a sweep of predictions, at any width and depth."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.nfd.predict import predict
from torch_depthmup.diagnostics.shared.arguments import positive_integers
from torch_depthmup.diagnostics.shared.progress import bar
from torch_depthmup.diagnostics.transfer.result import Sweep
from torch_depthmup.diagnostics.transfer.runs import Job, Run
from torch_depthmup.diagnostics.transfer.sweep import grid
from torch_depthmup.errors import DepthMuPError, DivergenceError, ignores_depth
from torch_depthmup.rules import Rule, get_rule
from torch_depthmup.scaling.apply import parametrize

__all__ = ["sweep"]


def sweep(
    make: Callable[[int, int], nn.Module],
    inputs: Any,
    targets: Tensor,
    *,
    depths: Sequence[int],
    width: int,
    lrs: Sequence[float],
    steps: int,
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer],
    rules: Sequence[str | Rule] | str | Rule = ("mup", "depth-mup", "depth-mup-corrected", "complete-p"),
    seeds: int | Sequence[int] = 2,
    progress: bool = False,
    **options: Any,
) -> Sweep:
    """Predicts the loss after some steps at every depth, learning rate and rule: `transfer_sweep` without training.

    Optimum and edge of stability are those of so many steps on these samples: what stays small in a few steps may
    still grow in many. A run counts as diverged where its loss is not finite, or ends above where it began.

    Args:
        make: a factory (depth, width) -> model.
        inputs: as for `nfd.predict`; all of them are in every step.
        targets: likewise.
        depths: the shallowest is the base of the rules.
        width: of the networks. Rates are those of this width.
        lrs: learning rates of the base.
        steps: optimizer steps.
        optimizer: (parametrized model, lr) -> optimizer, made by this package's constructors.
        rules: names or `Rule` objects.
        seeds: how many, or which; wide networks differ little.
        progress: whether a terminal shows a bar over runs (needs rich).
        options: as for `nfd.predict`: loss, coupling, device, dtype.

    Returns:
        A sweep, with `Sweep.optimum`, `Sweep.edge_of_stability`, `Sweep.drift` and the rest.

    Raises:
        DepthMuPError: the grid is wrong, the factory ignores depth, or as `nfd.predict`.

    >>> import torch_depthmup as dm
    >>> def make(depth, n):
    ...     block = lambda: dm.Residual(nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n)))
    ...     return nn.Sequential(nn.Linear(2, n), *(block() for _ in range(depth)), nn.Linear(n, 1))
    >>> sgd = lambda model, lr: dm.SGD(model, lr=lr)
    >>> x, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> found = sweep(make, x, y, depths=[1, 2], width=64, lrs=[0.001, 0.01, 10.0], steps=2, optimizer=sgd,
    ...               rules="complete-p", seeds=1)  # fmt: skip
    >>> found.edge_of_stability("complete-p", 2)
    10.0
    """
    named = {rule.label: rule for rule in map(get_rule, [rules] if isinstance(rules, str | Rule) else rules)}
    jobs = grid(depths, lrs, list(named), seeds)
    planned = _Planned(min(positive_integers("depths", depths)), inputs, optimizer)
    runs = []
    with bar("predicting", len(jobs), show=progress) as advance:
        for _, same in itertools.groupby(jobs, key=lambda job: (job.rule, job.depth, job.lr)):
            group = list(same)
            start, job = time.perf_counter(), group[0]
            losses = _losses(
                lambda n, job=job: make(job.depth, n), inputs, targets, width=width, steps=steps,
                optimizer=lambda model, job=job: planned.optimizer_of(model, job, named[job.rule]),
                seeds=[job.seed for job in group], **options,
            )  # fmt: skip
            seconds = (time.perf_counter() - start) / len(group)
            for job, loss in zip(group, losses, strict=True):
                runs.append(Run(job, loss, seconds))
                advance()
    return Sweep(tuple(runs))


def _losses(*args: Any, seeds: Sequence[int], **options: Any) -> list[float]:
    """The last loss of each seed's prediction, infinite where it diverged."""
    try:
        losses = predict(*args, seeds=seeds, **options).losses
    except DivergenceError:
        if len(seeds) == 1:
            return [math.inf]
        return [loss for seed in seeds for loss in _losses(*args, seeds=[seed], **options)]
    return [math.inf if last > first else last for first, *_, last in losses.tolist()]


@dataclass
class _Planned:
    """Models with a plan relative to the shallowest depth, and how many branches each depth had."""

    base: int
    inputs: Any
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    branches: dict[int, int] = field(default_factory=dict)

    def optimizer_of(self, model: nn.Module, job: Job, rule: Rule) -> torch.optim.Optimizer:
        if not rule.scales_depth:
            parametrize(model, rule=rule)
            return self.optimizer(model, job.lr)
        ratio = job.depth / self.base
        plan = parametrize(model, depth_multiplier=ratio, example_inputs=self.inputs, rule=rule)
        self.branches[job.depth] = len(plan.branches)
        for depth, count in self.branches.items():
            if depth != job.depth and count == len(plan.branches):
                raise DepthMuPError(ignores_depth(count, depth, job.depth))
        return self.optimizer(model, job.lr)
