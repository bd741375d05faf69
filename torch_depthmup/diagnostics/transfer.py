"""Does the learning rate transfer? Trains over depths, learning rates, rules and seeds; `Sweep` says what it means.

A sweep is a list of independent runs, each a function of (rule, depth, lr, seed), so that any executor can do them in
any order, and a file of finished runs is all that a resumed sweep needs.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.arguments import checked_samples, positive_integers, positive_numbers, seeds_of
from torch_depthmup.diagnostics.optima import Job, Run, Sweep
from torch_depthmup.diagnostics.progress import bar
from torch_depthmup.diagnostics.training import Training, own_random_state, take
from torch_depthmup.errors import DepthMuPError, ignores_depth
from torch_depthmup.graph import tensors_in
from torch_depthmup.parametrize import parametrize
from torch_depthmup.rules import Rule, get_rule

__all__ = ["transfer_sweep"]

EXAMPLES = 16  # samples that branches are found with
AHEAD = 4  # runs handed out for each core: an interrupted sweep has little to throw away, and no worker waits


def transfer_sweep(
    make_model: Callable[[int], nn.Module],
    train: Callable[[nn.Module, float, int], float] | tuple[Any, Tensor],
    *,
    depths: Sequence[int],
    lrs: Sequence[float],
    rules: Sequence[str | Rule] | str | Rule = ("mup", "depth-mup-uncorrected", "depth-mup", "complete-p"),
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
            remembers what was trained - the factory and the training by name, with their data and options - and is
            refused for anything else; it cannot see that their code has changed.
        progress: whether a terminal shows a bar with the time left (needs rich).

    Returns:
        All runs in the order of the grid, whatever order they finished in.

    Raises:
        DepthMuPError: the grid is empty or wrong, the file is of another sweep, or a model cannot be parametrized; the
            message names the run.
    """
    named = {rule.label: rule for rule in map(get_rule, [rules] if isinstance(rules, str | Rule) else rules)}
    jobs = _grid(depths, lrs, list(named), seeds)
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
    done = _finished(path, jobs, fingerprint)
    pending = _telling_first([job for job in jobs if job not in done], named)
    with bar("training", len(jobs), len(done), show=progress) as advance, _appending(path, fingerprint) as append:
        for run in _run_all(work, pending, executor):
            done[run.job] = run
            append(run)
            advance()
    return Sweep(tuple(done[job] for job in jobs))


def _grid(depths: Sequence[int], lrs: Sequence[float], rules: Sequence[str], seeds: int | Sequence[int]) -> list[Job]:
    if not rules:
        raise DepthMuPError("a sweep needs at least one rule")
    # Deep runs first: the longest work last would leave the other workers idle.
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
        """What is trained but for rules, as a short text: functions by name, everything else by value."""
        content = io.BytesIO()
        try:
            _ByValue(content).dump((self.make_model, self.train, self.base_depth, self.example_inputs))
        except (pickle.PicklingError, AttributeError, TypeError):  # a lambda, say, which only threads can run
            names = [getattr(f, "__qualname__", type(f).__name__) for f in (self.make_model, self.train)]
            content = io.BytesIO(repr((names, self.base_depth)).encode())
        return hashlib.sha256(content.getvalue()).hexdigest()[:16]

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
            if job.depth != self.base_depth and all(stream.ratio == 1 for stream in plan.streams):
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


def _run_all(work: _Work, jobs: Sequence[Job], executor: Executor | None) -> Iterator[Run]:
    """Runs as they finish."""
    if not jobs:
        return
    if executor is not None:
        yield from _as_they_finish(executor, work, jobs)
        return
    try:
        content = pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise DepthMuPError(
            f"worker processes cannot import make_model or train ({error}). Define them as functions of a module, or "
            "pass executor=ThreadPoolExecutor(1)"
        ) from error
    context = multiprocessing.get_context("spawn")
    workers = min(os.cpu_count() or 1, len(jobs))
    with tempfile.TemporaryDirectory() as folder:
        # Plain bytes: torch's own way of sending tensors would move the caller's into shared memory, which containers
        # lack. In a file: a worker that ends before it has read a full pipe leaves its parent waiting for ever.
        path = Path(folder, "work.pickle")
        path.write_bytes(content)
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(path,))
        try:
            yield from _as_they_finish(pool, _in_worker, jobs)
        except BrokenExecutor as error:
            raise DepthMuPError(
                "a worker process ended before its run did: it was killed, ran out of memory, or could not import "
                "make_model and train (a script needs if __name__ == '__main__':, and what a notebook or the standard "
                "input defines cannot be imported). Finished runs are in path="
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _as_they_finish(executor: Executor, function: Callable[[Job], Run], jobs: Sequence[Job]) -> Iterator[Run]:
    waiting, pending = iter(jobs), set[Future[Run]]()
    ahead = AHEAD * (os.cpu_count() or 1)
    try:
        while True:
            pending |= {executor.submit(function, job) for job in itertools.islice(waiting, ahead - len(pending))}
            if not pending:
                return
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        for future in pending:
            future.cancel()


_work: _Work | None = None  # of this worker process


def _start_worker(path: Path) -> None:
    global _work
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent, path), daemon=True).start()
    _work = pickle.loads(path.read_bytes())


def _end_with(parent: Any, path: Path) -> None:
    """A worker holds both ends of the pool's pipe and would wait for ever for a parent that was killed."""
    parent.join()
    shutil.rmtree(path.parent, ignore_errors=True)  # which the parent could not do any more
    os._exit(1)


def _in_worker(job: Job) -> Run:
    assert _work is not None
    return _work(job)


def _finished(path: str | Path | None, jobs: Iterable[Job], fingerprint: str) -> dict[Job, Run]:
    """The runs of this grid that a file holds. A last line that was cut off is not one."""
    if path is None or not Path(path).exists():
        return {}
    lines = Path(path).read_text().split("\n")[:-1]
    if not lines:
        return {}
    if lines[0] != _header(fingerprint):
        what = "runs of another model, training, data or base depth" if lines[0].startswith(HEADER) else "no sweep"
        raise DepthMuPError(f"{path} holds {what}. Name another file, or delete it")
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

        def append(run: Run) -> None:
            if not path.stat().st_size:  # not before: a sweep that fails at once should not claim the file
                write(_header(fingerprint))
            write(run.to_json())

        yield append
