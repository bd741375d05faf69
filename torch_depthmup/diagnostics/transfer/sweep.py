"""Does the learning rate transfer? Trains over depths, learning rates, rules and seeds; `Sweep` says what it means.

A sweep is a list of independent runs, each a function of (rule, depth, lr, seed), so that any executor can do them in
any order, and a file of finished runs is all that a resumed sweep needs.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.shared.arguments import checked_samples, positive_integers, positive_numbers, seeds_of
from torch_depthmup.diagnostics.shared.content import source_digest
from torch_depthmup.diagnostics.shared.progress import bar
from torch_depthmup.diagnostics.shared.training import Training, own_random_state, take
from torch_depthmup.diagnostics.transfer.pool import run_all
from torch_depthmup.diagnostics.transfer.result import Sweep
from torch_depthmup.diagnostics.transfer.runs import Job, Run, appending, finished
from torch_depthmup.errors import DepthMuPError, ignores_depth
from torch_depthmup.rules import Rule, get_rule
from torch_depthmup.running import tensors_in
from torch_depthmup.scaling.apply import parametrize

__all__ = ["EXAMPLES", "grid", "transfer_sweep"]

EXAMPLES = 16  # samples that branches are found with


def transfer_sweep(
    make_model: Callable[[int], nn.Module],
    train: Callable[[nn.Module, float, int], float] | tuple[Any, Tensor],
    *,
    depths: Sequence[int],
    lrs: Sequence[float],
    rules: Sequence[str | Rule] | str | Rule = ("mup", "depth-mup", "depth-mup-corrected", "complete-p"),
    seeds: int | Sequence[int] = 3,
    example_inputs: Any = None,
    executor: Executor | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    """Trains a model at every depth, learning rate, rule and seed. The shallowest depth is the base.

    Args:
        make_model: depth -> a fresh model; importable by workers (a function of a module, not a lambda).
        train: (parametrized model, lr, seed) -> loss, which makes its optimizer with this package's constructors; or
            data (inputs, targets) for the loop of `Training`. Workers get a copy of it, data and all: once each in the
            default pool, with every run in other executors. Let ``train`` load data that are large.
        depths: what ``make_model`` takes, ascending or not; at least one.
        lrs: learning rates of the base.
        rules: names or `Rule` objects; in the results, and in the file, a rule is its `Rule.label`.
        seeds: how many, or which.
        example_inputs: for `parametrize`; by default the first samples of the data, where ``train`` is data.
        executor: any ``concurrent.futures.Executor``, the caller's to shut down; ``None`` makes a process for each
            core, with one thread each, whose losses are those of one thread to the bit.
        path: a file of JSON lines. Finished runs are appended as they come; runs that it holds are not done again. It
            remembers what was trained - the factory and the training, the text of the modules that they come from and
            import (not of installed ones), their data and options - and is refused for anything else.
        progress: whether a terminal shows a bar with the time left (needs rich).

    Returns:
        All runs in the order of the grid, whatever order they finished in.

    Raises:
        DepthMuPError: the grid is empty or wrong, the file is of another sweep, or a model cannot be parametrized; the
            message names the run.

    >>> import torch, torch_depthmup as dm
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> def make(depth):
    ...     blocks = [dm.Residual(torch.nn.Linear(8, 8)) for _ in range(depth)]
    ...     return torch.nn.Sequential(*blocks, torch.nn.Linear(8, 2))
    >>> def train(model, lr, seed):
    ...     return (lr - 0.1) ** 2  # your own training; returns the loss
    >>> sweep = transfer_sweep(
    ...     make, train, depths=[2, 4], lrs=[0.05, 0.1, 0.2], rules="depth-mup", seeds=1,
    ...     example_inputs=torch.ones(1, 8), executor=ThreadPoolExecutor(1),
    ... )  # fmt: skip
    >>> sweep.optimum("depth-mup", 4).lr
    0.1
    """
    named = {rule.label: rule for rule in map(get_rule, [rules] if isinstance(rules, str | Rule) else rules)}
    jobs = grid(depths, lrs, list(named), seeds)
    if isinstance(train, tuple):
        train = Training(*checked_samples(train))
    if not callable(train):
        raise DepthMuPError(f"train must be data, or a function (model, lr, seed) -> loss, not {type(train).__name__}")
    if isinstance(train, Training):
        if not all(bool(tensor.isfinite().all()) for tensor in tensors_in((train.inputs, train.targets))):
            raise DepthMuPError("the data hold values that are not finite: every run would diverge at its first step")
        if example_inputs is None:
            example_inputs = take(train.inputs, torch.arange(min(EXAMPLES, len(train.targets))))
    if example_inputs is None and any(rule.scales_depth for rule in named.values()):
        raise DepthMuPError("branches are found by running the model once: pass example_inputs=")
    work = _Work(make_model, train, min(depths), example_inputs, named)
    fingerprint = work.fingerprint()
    done = finished(path, jobs, fingerprint)
    pending = _telling_first([job for job in jobs if job not in done], named)
    with bar("training", len(jobs), len(done), show=progress) as advance, appending(path, fingerprint) as append:
        for run in run_all(work, pending, executor):
            done[run.job] = run
            append(run)
            advance()
    return Sweep(tuple(done[job] for job in jobs))


def grid(depths: Sequence[int], lrs: Sequence[float], rules: Sequence[str], seeds: int | Sequence[int]) -> list[Job]:
    """All runs of a sweep, the deepest first: the longest work last would leave the other workers idle.

    Raises:
        DepthMuPError: a list is empty, or holds something else.
    """
    if not rules:
        raise DepthMuPError("a sweep needs at least one rule")
    deep_first = reversed(positive_integers("depths", depths))
    order = itertools.product(rules, deep_first, positive_numbers("lrs", lrs), seeds_of(seeds))
    return [Job(rule, depth, lr, seed) for rule, depth, lr, seed in order]


def _telling_first(jobs: list[Job], rules: Mapping[str, Rule]) -> list[Job]:
    """One run of each rule before the others, depth-scaled ones first: a model that cannot be parametrized says so."""
    firsts = list({job.rule: job for job in reversed(jobs)}.values())
    firsts.sort(key=lambda job: not rules[job.rule].scales_depth)
    return firsts + [job for job in jobs if job not in firsts]


@dataclass(frozen=True)
class _Work:
    """One run as a picklable function of its job."""

    make_model: Callable[[int], nn.Module]
    train: Callable[[nn.Module, float, int], float]
    base_depth: int
    example_inputs: Any
    rules: Mapping[str, Rule]

    def fingerprint(self) -> str:
        """What is trained but for rules, as a short text: functions by name and source, everything else by value."""
        content = io.BytesIO()
        try:
            _ByValue(content).dump((self.make_model, self.train, self.base_depth, self.example_inputs))
        except (pickle.PicklingError, AttributeError, TypeError):  # a lambda, say, which only threads can run
            names = [getattr(f, "__qualname__", type(f).__name__) for f in (self.make_model, self.train)]
            content = io.BytesIO(repr((names, self.base_depth)).encode())
        sources = source_digest(self.make_model, self.train)
        return hashlib.sha256(content.getvalue() + sources.encode()).hexdigest()[:16]

    def __call__(self, job: Job) -> Run:
        start = time.perf_counter()
        try:
            with own_random_state():
                torch.manual_seed(job.seed)
                model = self._parametrized(job)
                loss = float(self.train(model, job.lr, job.seed))
        except DepthMuPError as error:
            raise DepthMuPError(f"{job.rule} at depth {job.depth}: {error}") from error
        except Exception as error:
            error.add_note(f"in the run of {job.rule} at depth {job.depth}, lr {job.lr:g}, seed {job.seed}")
            raise
        return Run(job, loss if math.isfinite(loss) else math.inf, time.perf_counter() - start)

    def _parametrized(self, job: Job) -> nn.Module:
        model = self._made(job.depth)
        state = torch.random.get_rng_state()
        rule = self.rules[job.rule]
        if rule.scales_depth:
            plan = parametrize(model, base=self._made(self.base_depth), example_inputs=self.example_inputs, rule=rule)
            if job.depth != self.base_depth and all(stream.depth_multiplier == 1 for stream in plan.streams):
                raise DepthMuPError(ignores_depth(len(plan.branches), self.base_depth, job.depth))
        else:
            parametrize(model, rule=rule)
        torch.random.set_rng_state(state)  # the same noise under every rule
        return model

    def _made(self, depth: int) -> nn.Module:
        model = self.make_model(depth)
        if not isinstance(model, nn.Module):
            raise DepthMuPError(f"the factory returned {type(model).__name__}, not an nn.Module")
        return model


class _ByValue(pickle.Pickler):
    """The same bytes for equal tensors in every process; torch's own pickles contain memory addresses."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return tuple, ((str(value.dtype), tuple(value.shape), plain.numpy().tobytes()),)
