"""How much faster is the simulation than the dense network that it replaces? Paired, alternating, in one process.

    python examples/benchmarks/nfd_speed.py [--quick] [--device cuda]

Prints the ratio of training times (network / simulation) at width 4096, depth 32, the growth of the simulation's time
with width, depth and steps, peak memory of both, and depth 1024 at width 8192 with 4 samples and 10 steps.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torch_depthmup.diagnostics.nfd import simulate
from torch_depthmup.diagnostics.nfd.network import CanonicalResNet
from torch_depthmup.diagnostics.nfd.setting import Setting
from torch_depthmup.optim import SGD
from torch_depthmup.scaling.apply import parametrize

SAMPLES = 4


def data(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 16, generator=generator).to(device), torch.tensor([1.0, -1.0, 0.5, -0.5]).to(device)


def network(setting: Setting, width: int, device: str) -> Callable[[], None]:
    """Training of the dense network by PyTorch; making its matrices is not counted."""
    inputs, targets = data(device)
    torch.manual_seed(0)
    model = CanonicalResNet(setting, 16, 1, width).to(device)
    parametrize(model, depth_multiplier=setting.depth, example_inputs=inputs[:1], how="wrap")
    optimizer = SGD(model, lr=setting.lr * width)

    def train() -> None:
        for _ in range(setting.steps):
            optimizer.zero_grad()
            ((model(inputs)[:, 0] - targets).square().mean() / 2).backward()
            optimizer.step()
        with torch.no_grad():
            model(inputs)

    return train


def simulation(setting: Setting, width: int, device: str, seeds: int = 1) -> Callable[[], None]:
    inputs, targets = data(device)

    def run() -> None:
        simulate(setting, inputs, targets, width=width, seeds=seeds)

    return run


def seconds(action: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def growth(label: str, times: dict[int, float]) -> None:
    xs, ys = [math.log(x) for x in times], [math.log(t) for t in times.values()]
    slope = statistics.linear_regression(xs, ys).slope
    print(
        f"time against {label}: {', '.join(f'{x}: {t:.2f} s' for x, t in times.items())}; exponent {slope:.2f}",
        flush=True,
    )


def _peak(kind: str, setting: Setting, width: int, pipe: Any) -> None:
    before = _high_water()
    (network if kind == "network" else simulation)(setting, width, "cpu")()
    pipe.send(_high_water() - before)


def _high_water() -> float:
    """Gigabytes of the most resident memory so far, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6


def peak(kind: str, setting: Setting, width: int) -> float:
    """Gigabytes of resident memory that one run adds, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_peak, args=(kind, setting, width, theirs))
    process.start()
    gigabytes = ours.recv()
    process.join()
    return gigabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 1024, depth 8, and not the deep run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    width, depth = (1024, 8) if options.quick else (4096, 32)
    device = options.device
    setting = Setting(depth=depth, steps=4, lr=1.0)
    dense, simulated = network(setting, width, device), simulation(setting, width, device)
    seconds(simulated, device)
    pairs = [(seconds(dense, device), seconds(simulated, device)) for _ in range(options.pairs)]
    ratios = [a / b for a, b in pairs]
    print(
        f"width {width}, depth {depth}, {SAMPLES} samples, 4 steps on {device}: network {pairs[-1][0]:.2f} s, "
        f"simulation {pairs[-1][1]:.2f} s; ratio {statistics.median(ratios):.1f} "
        f"[{min(ratios):.1f}, {max(ratios):.1f}], {len(ratios)} pairs",
        flush=True,
    )
    del dense
    widths = {w: seconds(simulation(setting, w, device), device) for w in (width, 2 * width, 4 * width)}
    growth("width", widths)
    depths = {d: seconds(simulation(Setting(depth=d, steps=4, lr=1.0), width, device), device) for d in (16, 32, 64)}
    growth("depth", depths)
    steps = {k: seconds(simulation(Setting(depth=8, steps=k, lr=0.2), width, device), device) for k in (8, 16, 32)}
    growth("steps", steps)
    if device == "cpu":
        print(f"peak memory: network {peak('network', setting, width):.2f} GB, simulation "
              f"{peak('simulation', setting, width):.2f} GB", flush=True)  # fmt: skip
    if not options.quick:
        deep = seconds(simulation(Setting(depth=1024, steps=10, lr=1.0), 8192, device), device)
        print(f"width 8192, depth 1024, {SAMPLES} samples, 10 steps: {deep:.1f} s")


if __name__ == "__main__":
    main()
