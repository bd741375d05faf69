"""A learning-rate sweep in the default pool against one run after the other, in alternation, with equal losses.

    python examples/benchmarks/sweep_speed.py              # three pairs, about five minutes on two cores
    python examples/benchmarks/sweep_speed.py --threads 2  # one after the other with two threads, as torch would

One after the other takes one thread unless told otherwise: it then does the same arithmetic as the pool's workers, and
must give the same losses to the bit. More threads are slower than one for networks as small as these.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from torch_depthmup.diagnostics import transfer_sweep
from torch_depthmup.diagnostics.shared.digits import DigitsResNet, digits
from torch_depthmup.diagnostics.shared.training import Training


def network(depth: int) -> DigitsResNet:
    return DigitsResNet(depth, 64)


def timed(threads: int | None) -> tuple[float, list[float]]:
    """Seconds and losses of one run after the other with so many threads, or in the default pool."""
    # OpenMP's number of threads belongs to the thread that sets it.
    one = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) if threads else None
    start = time.perf_counter()
    sweep = transfer_sweep(
        network, Training(*digits()), depths=[4, 16, 64], lrs=[2.0**-i for i in range(4, 13)],
        rules=["mup", "depth-mup-corrected"], seeds=2, executor=one, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if one is not None:
        one.shutdown()
    return seconds, [run.loss for run in sweep.runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="how often each is run (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of one run after the other (default 1)")
    options = parser.parse_args()
    ratios = []
    for _ in range(options.pairs):
        (plain, reference), (pooled, losses) = timed(options.threads), timed(None)
        equal = losses == reference
        assert equal or options.threads > 1, "the pool's losses are not those of one run after the other"
        ratios.append(plain / pooled)
        print(f"{plain:.1f} s / {pooled:.1f} s, losses {'equal to the bit' if equal else 'not equal'}", flush=True)
    print(f"{len(losses)} runs at width 64, {os.cpu_count()} cores, {options.threads} threads one after the other")
    print(f"one after the other / pool: {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})")


if __name__ == "__main__":
    main()
