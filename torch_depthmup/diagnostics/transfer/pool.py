"""Runs jobs in processes, one for each core, or on the caller's executor."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from torch_depthmup.diagnostics.transfer.runs import Job, Run
from torch_depthmup.errors import DepthMuPError

__all__ = ["run_all"]


LOOK = 0.5  # seconds between two looks of a worker whether it is still wanted
AHEAD = 4  # runs handed out for each core: an interrupted sweep has little to throw away, and no worker waits


def run_all(work: Callable[[Job], Run], jobs: Sequence[Job], executor: Executor | None) -> Iterator[Run]:
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
            path.unlink()  # the sign for the other workers to end at once
            raise DepthMuPError(
                "a worker process ended before its run did: it was killed, ran out of memory, or could not import "
                "make_model and train (a script needs if __name__ == '__main__':, and what a notebook or the standard "
                "input defines cannot be imported). Finished runs are in path="
            ) from error
        except BaseException:  # Ctrl-C, say: nobody waits for the runs that are under way
            path.unlink()
            raise
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


_work: Callable[[Job], Run] | None = None  # of this worker process


def _start_worker(path: Path) -> None:
    global _work
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    _work = pickle.loads(path.read_bytes())
    threading.Thread(target=_end_with, args=(parent, path), daemon=True).start()


def _end_with(parent: Any, path: Path) -> None:
    """Ends the worker with its parent, or when the parent takes its work away.

    A worker holds both ends of the pool's pipe and would wait for ever for a parent that was killed.
    """
    while parent.is_alive() and path.exists():
        parent.join(LOOK)
    shutil.rmtree(path.parent, ignore_errors=True)  # which a parent that was killed could not do any more
    os._exit(1)


def _in_worker(job: Job) -> Run:
    assert _work is not None
    return _work(job)
