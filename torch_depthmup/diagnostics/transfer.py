"""Does the learning rate transfer? Sweeps over depths, learning rates, rules and seeds, and what they say.

A sweep is a list of independent runs, each a function of (rule, depth, lr, seed), so that any executor can do them in
any order, and a file of finished runs is all that a resumed sweep needs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_depthmup.diagnostics.extras import needs
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.optim import SGD, Adam, AdamW
from torch_depthmup.parametrize import parametrize
from torch_depthmup.rules import get_rule

__all__ = ["Job", "Optimum", "Run", "Sweep", "Training", "transfer_sweep"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
DIVERGED = 2.0  # a loss above so many times the untrained one is past the edge of stability, finite or not


@dataclass(frozen=True)
class Job:
    """One run to do: a rule by name, a depth in residual additions, the base's learning rate, a seed."""

    rule: str
    depth: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Run:
    """A finished run. ``loss`` is infinite where it diverged; ``seconds`` is the time it took in its worker."""

    job: Job
    loss: float
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the loss is not a number that training could have gone on from."""
        return not math.isfinite(self.loss)

    def to_json(self) -> str:
        """One line; an infinite loss is null, which JSON has and infinity it has not."""
        return json.dumps({**asdict(self.job), "loss": None if self.diverged else self.loss, "seconds": self.seconds})

    @classmethod
    def from_json(cls, line: str) -> Run:
        """The run that `to_json` wrote."""
        data = json.loads(line)
        loss, seconds = data.pop("loss"), data.pop("seconds")
        return cls(Job(**data), math.inf if loss is None else loss, seconds)


@dataclass(frozen=True)
class Training:
    """A plain training loop on data in memory, for sweeps that need no loop of their own.

    Args:
        inputs: (samples, ...) on any device.
        targets: (samples,) class indices, or (samples, ...) numbers for ``loss="mse"``.
        optimizer: ``"sgd"`` (momentum 0.9), ``"adam"`` or ``"adamw"``.
        steps: optimizer steps.
        batch_size: samples drawn with replacement for each step.
        loss: ``"cross_entropy"`` or ``"mse"``.

    Calling it with (model, lr, seed) trains a parametrized model and returns its mean loss over all the data, infinite
    where it diverged.
    """

    inputs: Tensor
    targets: Tensor
    optimizer: str = "adam"
    steps: int = 60
    batch_size: int = 128
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"

    def __call__(self, model: nn.Module, lr: float, seed: int) -> float:
        options = {"momentum": 0.9} if self.optimizer == "sgd" else {}
        optimizer = OPTIMIZERS[self.optimizer](model, lr=lr, **options)
        criterion = F.cross_entropy if self.loss == "cross_entropy" else F.mse_loss
        generator = torch.Generator().manual_seed(seed)
        untrained = self._evaluate(model, criterion)
        for _ in range(self.steps):
            batch = torch.randint(len(self.inputs), (self.batch_size,), generator=generator)
            loss = criterion(model(self.inputs[batch]), self.targets[batch])
            if not math.isfinite(loss.item()):
                return math.inf
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        final = self._evaluate(model, criterion)
        return final if final <= DIVERGED * untrained else math.inf

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor]) -> float:
        return criterion(model(self.inputs), self.targets).item()


@dataclass(frozen=True)
class Optimum:
    """Where the loss is smallest.

    ``lr`` is on the grid, by the median over seeds. ``log2_lr`` is the vertex of a parabola through the three points
    around each seed's minimum, averaged over seeds, with its standard error (nan for one seed). ``at_edge`` says that
    the grid does not enclose it.
    """

    lr: float
    loss: float
    log2_lr: float
    error: float
    at_edge: bool


@dataclass(frozen=True)
class Sweep:
    """Finished runs, and what follows from them."""

    runs: tuple[Run, ...]

    def _values(self, field: str) -> list[Any]:
        return list(dict.fromkeys(sorted({getattr(run.job, field) for run in self.runs})))

    @property
    def rules(self) -> list[str]:
        """Rules in the order in which they were run."""
        return list(dict.fromkeys(run.job.rule for run in self.runs))

    @property
    def depths(self) -> list[int]:
        """Depths, ascending."""
        return self._values("depth")

    @property
    def lrs(self) -> list[float]:
        """Learning rates of the base, ascending."""
        return self._values("lr")

    def losses(self, rule: str, depth: int, lr: float) -> list[float]:
        """The losses of one point of the grid, a number for each seed, infinite where a run diverged."""
        return [run.loss for run in self.runs if (run.job.rule, run.job.depth, run.job.lr) == (rule, depth, lr)]

    def optimum(self, rule: str, depth: int) -> Optimum:
        """The best learning rate at one depth; nan, with an infinite loss, where every run diverged.

        Raises:
            DepthMuPError: there is no such run.
        """
        middle = {lr: median(losses) for lr in self.lrs if (losses := self.losses(rule, depth, lr))}
        if not middle:
            raise DepthMuPError(f"{rule} at depth {depth}: the sweep has no such run")
        if not math.isfinite(min(middle.values())):
            return Optimum(math.nan, math.inf, math.nan, math.nan, False)
        best = min(middle, key=middle.__getitem__)
        vertices = [_vertex(curve) for curve in self._curves(rule, depth) if min(curve.values()) < math.inf]
        spread = stdev(vertices) / math.sqrt(len(vertices)) if len(vertices) > 1 else math.nan
        edge = best in (min(middle), max(middle))
        return Optimum(best, middle[best], fmean(vertices), spread, edge)

    def _curves(self, rule: str, depth: int) -> list[dict[float, float]]:
        """For each seed the loss against the learning rate."""
        curves: dict[int, dict[float, float]] = {}
        for run in self.runs:
            if (run.job.rule, run.job.depth) == (rule, depth):
                curves.setdefault(run.job.seed, {})[run.job.lr] = run.loss
        return list(curves.values())

    def drift(self, rule: str, depth: int) -> float:
        """By how many factors of two the fitted optimum moves from the shallowest depth to this one."""
        return self.optimum(rule, depth).log2_lr - self.optimum(rule, self.depths[0]).log2_lr

    def transferred(self, rule: str, depth: int) -> list[float]:
        """The losses at a depth with the learning rate tuned at the shallowest one, a number for each seed.

        Infinite where there was nothing to tune.
        """
        return self.losses(rule, depth, self.optimum(rule, self.depths[0]).lr) or [math.inf]

    def regret(self, rule: str, depth: int) -> float:
        """What tuning shallow costs at a depth: median transferred loss less the best median loss there."""
        return median(self.transferred(rule, depth)) - self.optimum(rule, depth).loss

    def edge(self, rule: str, depth: int) -> float:
        """The smallest learning rate at which any seed diverged; infinite where none did."""
        return min((lr for lr in self.lrs if math.inf in self.losses(rule, depth, lr)), default=math.inf)

    def frame(self) -> Any:
        """A tidy pandas frame: rule, depth, lr, seed, loss, diverged, seconds; a row for each run.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = [{**asdict(r.job), "loss": r.loss, "diverged": r.diverged, "seconds": r.seconds} for r in self.runs]
        return needs("pandas").DataFrame(rows)


def _vertex(curve: dict[float, float]) -> float:
    """log2 of the learning rate at the vertex of the parabola through the minimum and its neighbours, in log loss."""
    lrs = sorted(curve)
    i = min(range(len(lrs)), key=lambda j: curve[lrs[j]])
    x = [math.log2(lr) for lr in lrs]
    if i in (0, len(lrs) - 1) or not all(math.isfinite(curve[lrs[j]]) and curve[lrs[j]] > 0 for j in (i - 1, i, i + 1)):
        return x[i]
    left, middle, right = (math.log(curve[lrs[j]]) for j in (i - 1, i, i + 1))
    a, b = x[i] - x[i - 1], x[i + 1] - x[i]
    slope_left, slope_right = (middle - left) / a, (right - middle) / b
    curvature = (slope_right - slope_left) / ((a + b) / 2)
    if curvature <= 0:
        return x[i]
    # the derivative is slope_left at the middle of the left interval and grows by the curvature
    return min(max(x[i] - a / 2 - slope_left / curvature, x[i - 1]), x[i + 1])


def transfer_sweep(
    make_model: Callable[[int], nn.Module],
    train: Callable[[nn.Module, float, int], float] | tuple[Tensor, Tensor],
    *,
    depths: Sequence[int],
    lrs: Sequence[float],
    rules: Sequence[str] = ("mup", "depth-mup-uncorrected", "depth-mup", "complete-p"),
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
            data (inputs, targets) for the loop of `Training`.
        depths: what ``make_model`` takes, ascending or not; at least one.
        lrs: learning rates of the base.
        rules: rules by name.
        seeds: how many, or which.
        example_inputs: for `parametrize`; of data given as tensors the first 16 samples.
        executor: any ``concurrent.futures.Executor``, the caller's to shut down; ``None`` makes a process for each
            core, with one thread each.
        path: a file of JSON lines. Finished runs are appended as they come; runs that it holds are not done again. It
            remembers what was trained - the factory and the training by name, with their data and options - and is
            refused for anything else; it cannot see that their code has changed.
        progress: whether to show a bar with the time left (needs rich).

    Returns:
        All runs in the order of the grid, whatever order they finished in.

    Raises:
        DepthMuPError: the grid is empty or wrong, the file is of another sweep, or a model cannot be parametrized; the
            message names the run.
    """
    jobs = _grid(depths, lrs, rules, seeds)
    if isinstance(train, tuple):
        example_inputs = train[0][:16] if example_inputs is None else example_inputs
        train = Training(*train)
    if example_inputs is None and any(get_rule(rule).scales_depth for rule in rules):
        raise DepthMuPError("branches are found by running the model once: pass example_inputs=")
    work = _Work(make_model, train, min(depths), example_inputs)
    done = _finished(path, jobs, work.fingerprint())
    pending = [job for job in jobs if job not in done]
    with _bar(len(jobs), len(done), progress) as advance, _appending(path, work.fingerprint()) as append:
        for run in _run_all(work, pending, executor):
            done[run.job] = run
            append(run)
            advance()
    return Sweep(tuple(done[job] for job in jobs))


def _grid(depths: Sequence[int], lrs: Sequence[float], rules: Sequence[str], seeds: int | Sequence[int]) -> list[Job]:
    which = range(seeds) if isinstance(seeds, int) else seeds
    if not (depths and lrs and rules and which):
        raise DepthMuPError("a sweep needs at least one depth, learning rate, rule and seed")
    if any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in depths):
        raise DepthMuPError(f"depths must be positive integers, not {list(depths)}")
    if not all(math.isfinite(lr) and lr > 0 for lr in lrs):
        raise DepthMuPError(f"learning rates must be positive, not {list(lrs)}")
    for rule in rules:
        get_rule(rule)
    # Deep runs first: the longest work last would leave the other workers idle.
    order = itertools.product(rules, sorted(set(depths), reverse=True), dict.fromkeys(lrs), dict.fromkeys(which))
    return [Job(rule, depth, float(lr), seed) for rule, depth, lr, seed in order]


@dataclass(frozen=True)
class _Work:
    """One run as a picklable function of its job."""

    make_model: Callable[[int], nn.Module]
    train: Callable[[nn.Module, float, int], float]
    base_depth: int
    example_inputs: Any

    def fingerprint(self) -> str:
        """What is trained, as a short text: functions by name, everything else by value."""
        try:
            content = pickle.dumps(self)
        except (pickle.PicklingError, AttributeError, TypeError):  # a lambda, say, which only threads can run
            names = [getattr(f, "__qualname__", type(f).__name__) for f in (self.make_model, self.train)]
            content = repr((names, self.base_depth)).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def __call__(self, job: Job) -> Run:
        start = time.perf_counter()
        torch.manual_seed(job.seed)
        try:
            model = self.make_model(job.depth)
            state = torch.random.get_rng_state()
            if get_rule(job.rule).scales_depth:
                base = self.make_model(self.base_depth)
                parametrize(model, base=base, example_inputs=self.example_inputs, rule=job.rule)
            else:
                parametrize(model, rule=job.rule)
            torch.random.set_rng_state(state)  # the same noise under every rule
        except DepthMuPError as error:
            raise DepthMuPError(f"{job.rule} at depth {job.depth}: {error}") from error
        loss = float(self.train(model, job.lr, job.seed))
        return Run(job, loss if math.isfinite(loss) else math.inf, time.perf_counter() - start)


def _run_all(work: _Work, jobs: Sequence[Job], executor: Executor | None) -> Iterator[Run]:
    """Runs as they finish. Few are handed out ahead, so that an interrupted sweep has little to throw away."""
    if not jobs:
        return
    own = None
    if executor is None:
        workers = min(os.cpu_count() or 1, len(jobs))
        own = executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
    ahead = 4 * (os.cpu_count() or 1)
    waiting, pending = iter(jobs), set[Future[Run]]()
    try:
        while True:
            pending |= {executor.submit(work, job) for job in itertools.islice(waiting, ahead - len(pending))}
            if not pending:
                return
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        for future in pending:
            future.cancel()
        if own is not None:
            own.shutdown(cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _finished(path: str | Path | None, jobs: Iterable[Job], fingerprint: str) -> dict[Job, Run]:
    """The runs of this grid that a file holds. A last line that was cut off is not one."""
    if path is None or not Path(path).exists():
        return {}
    lines = Path(path).read_text().split("\n")[:-1]
    if not lines:
        return {}
    if lines[0] != _header(fingerprint):
        what = "runs of another model, training, data or base depth" if lines[0].startswith(HEADER) else "no sweep"
        raise DepthMuPError(f"{path} holds {what}. Name another file")
    wanted, found = set(jobs), {}
    for number, line in enumerate(lines[1:], 2):
        try:
            run = Run.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            raise DepthMuPError(f"{path}, line {number}: not a run of a sweep ({error}). Name another file") from error
        if run.job in wanted:
            found[run.job] = run
    return found


HEADER = '{"sweep": "'


def _header(fingerprint: str) -> str:
    return f'{HEADER}{fingerprint}"}}'


@contextmanager
def _appending(path: str | Path | None, fingerprint: str) -> Iterator[Callable[[Run], None]]:
    if path is None:
        yield lambda run: None
        return
    path = Path(path)
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])  # what a killed sweep was in the middle of
    with path.open("a") as file:

        def write(line: str) -> None:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

        if not path.stat().st_size:
            write(_header(fingerprint))
        yield lambda run: write(run.to_json())


@contextmanager
def _bar(total: int, done: int, show: bool) -> Iterator[Callable[[], None]]:
    if not show:
        yield lambda: None
        return
    progress = needs("rich.progress")
    columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
    with progress.Progress(*columns, transient=True) as bar:
        task = bar.add_task("training", total=total, completed=done)
        yield lambda: bar.advance(task)
