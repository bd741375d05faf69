"""What watching costs: training with a monitor every 10 steps against training without, in alternating pairs.

    python examples/benchmarks/monitor_cost.py [--batch 32] [--probe 4] [--pairs 5] [--size 96] [--device cpu]

The model is shaped as ResNet-50 (25.6 M parameters). Each pair times 10 training steps of SGD with momentum without and
10 with a monitor that records once; the order alternates. On a CPU the time is that of the processor. Prints the median
ratio with its quartiles, the time of one record, and the bytes that the monitor keeps.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor

sys.path.insert(0, str(Path(__file__).parent))
from overhead import resnet50  # noqa: E402  the model both benchmarks share

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="training batch")
    parser.add_argument("--probe", type=int, default=4, help="samples in the probe")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=int, default=96, help="image side in pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = resnet50().to(device)
    x = torch.randn(options.batch, 3, options.size, options.size, device=device)
    y = torch.randint(0, 1000, (options.batch,), device=device)
    monitor = FeatureMonitor(model, x[: options.probe], every=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def clock() -> float:
        if device.type == "cpu":  # other programs may run beside
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def run(watched: bool) -> tuple[float, float]:
        start, recording = clock(), 0.0
        for step in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if watched and step % STEPS == 0:
                before = clock()
                monitor.record(step)
                recording += clock() - before
        return clock() - start, recording

    run(True)
    ratios, records, steps = [], [], []
    for pair in range(options.pairs):
        first, second = (run(watched) for watched in ((False, True) if pair % 2 else (True, False)))
        plain, watched = (first, second) if pair % 2 else (second, first)
        ratios.append(watched[0] / plain[0])
        records.append(watched[1])
        steps.append(plain[0] / STEPS)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {options.threads} thread(s), batch {options.batch} at {options.size} px, probe {options.probe}")
    print(f"training with a record every {STEPS} steps / without: {middle:.3f} (quartiles {low:.3f} .. {high:.3f})")
    step, record = statistics.median(steps), statistics.median(records)
    print(f"one record {record:.3f} s, one training step {step:.3f} s: {record / (STEPS * step):.1%} of training time")
    print(f"kept between records: {monitor.memory / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
