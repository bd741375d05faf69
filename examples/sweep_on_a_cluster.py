"""One learning-rate sweep on any executor: the default pool, dask, ray or MPI.

    python examples/sweep_on_a_cluster.py                                        # a process for each core
    python examples/sweep_on_a_cluster.py --on dask                              # pip install distributed
    python examples/sweep_on_a_cluster.py --on ray                               # pip install ray
    mpiexec -n 3 python -m mpi4py.futures examples/sweep_on_a_cluster.py --on mpi  # pip install mpi4py mpich

On a real cluster give dask's ``Client`` and ``ray.init`` the address of the scheduler. All of them do the same runs and
may be stopped and taken up by another: the finished ones are in the file that --runs names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import torch

from torch_depthmup.diagnostics import transfer_sweep
from torch_depthmup.diagnostics.shared.digits import DigitsResNet, digits
from torch_depthmup.diagnostics.shared.training import Training


def network(depth: int) -> DigitsResNet:
    return DigitsResNet(depth, 32)


def train(model: torch.nn.Module, lr: float, seed: int) -> float:
    """Loads its data where it runs: nothing large travels."""
    torch.set_num_threads(1)
    return Training(*digits(), steps=20)(model, lr, seed)


class RayExecutor(Executor):
    """Ray's remote functions as a ``concurrent.futures.Executor``."""

    def __init__(self) -> None:
        import ray

        ray.init(num_cpus=os.cpu_count(), include_dashboard=False, ignore_reinit_error=True)
        self._remote = ray.remote(max_retries=3)(lambda function, *args, **kwargs: function(*args, **kwargs))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = self._remote.remote(fn, *args, **kwargs).future()
        return future


@contextmanager
def executor(kind: str) -> Iterator[Executor | None]:
    if kind == "dask":
        from distributed import Client

        with Client(n_workers=os.cpu_count(), threads_per_worker=1, dashboard_address=None) as client:
            yield client.get_executor()
    elif kind == "ray":
        yield RayExecutor()
    elif kind == "mpi":
        from mpi4py.futures import MPIPoolExecutor

        with MPIPoolExecutor() as pool:
            yield pool
    else:
        yield None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=("pool", "dask", "ray", "mpi"), default="pool")
    parser.add_argument("--runs", help="a file to keep finished runs in, and to take them up from")
    options = parser.parse_args()
    with executor(options.on) as pool:
        sweep = transfer_sweep(
            network, train, depths=[4, 16], lrs=[2.0**-i for i in range(5, 11)], seeds=2,
            rules=["mup", "depth-mup-corrected"], example_inputs=digits()[0][:16], executor=pool, path=options.runs,
        )  # fmt: skip
    for row in sweep.summary():
        print(f"{row['rule']:10} depth {row['depth']:3}: best lr {row['lr']:.4f}, median loss {row['loss']:.6f}")


if __name__ == "__main__":
    main()
