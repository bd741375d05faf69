"""Does AdamW's learning rate transfer to another batch size and another duration? CIFAR-10 at 16 pixels, one pass.

    python examples/evidence/horizon.py --data DIR                # loads CIFAR-10 through torchvision into DIR
    python examples/evidence/horizon.py --data cifar10_16px.npz   # or the arrays train_images, train_labels

The rate is tuned with batches of 32 on 12,500 images, and taken to four times the batch, to four times the images, and
to both, with the keywords batch_multiplier and duration_multiplier of dm.AdamW ("rule") and without ("as it is"). The
network is that of cifar_transfer.py with norms, at depth 4. The loss of a run is the mean of the last fifth of its
training losses, each taken before the image was trained on. A run's regret is its loss at the rate that was best in
the tuned set-up, less its smallest mean loss at any rate.

Writes horizon.csv beside this file; a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cifar_transfer import WIDTH, Network
from onepass import DATA, HERE, final, images, one_pass, shuffled

import torch_depthmup as dm

BATCH, SAMPLES = 32, 12_500
SETUPS = {"tuned": (1, 1), "batch x 4": (4, 1), "duration x 4": (1, 4), "both x 4": (4, 4)}
"""Multiples of batch size and number of images."""
LRS = [2.0**i for i in range(-11, -3)]
HEADER = ["set-up", "learning rate", "best", "loss there", "regret of the tuned rate"]


def run(source: str, lr: float, seed: int, batch: int, duration: int, rule: bool) -> float:
    """Trains once through the images. Returns the mean of the last fifth of the losses."""
    torch.manual_seed(seed)
    model = Network(4, norm=True)
    multipliers = {"batch_multiplier": batch, "duration_multiplier": duration} if rule else {}
    dm.parametrize(model, depth_multiplier=1, example_inputs=images(source)[0][:4])
    hidden = {"params": list(model.blocks.parameters()), "lr": lr}
    ends = {"params": [p for name, p in model.named_parameters() if "blocks" not in name], "lr": lr * WIDTH**0.5}
    optimizer = dm.AdamW([hidden, ends], betas=(0.9, 0.99), weight_decay=0.1, **multipliers)
    return final(one_pass(model, optimizer, shuffled(source, seed, BATCH * batch, SAMPLES * duration)))


def regrets(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """For each set-up and way: best rate, loss there, and the tuned rate's regret with the error over paired seeds."""
    losses: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        losses[row["setup"], row["how"]][float(row["lr"])].append(float(row["loss"]))
    best = {key: min(curve, key=lambda lr: statistics.fmean(curve[lr])) for key, curve in losses.items()}
    tuned = best["tuned", "as it is"]
    found = []
    for key, curve in losses.items():
        paired = [there - least for there, least in zip(curve[tuned], curve[best[key]], strict=True)]
        error = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else math.nan
        bound = "<= " if best[key] == min(curve) else ">= " if best[key] == max(curve) else ""  # an end of the grid
        numbers = f"{statistics.fmean(curve[best[key]]):.4f}", f"{statistics.fmean(paired):.4f} ± {error:.4f}"
        found.append([*key, f"{bound}2^{round(math.log2(best[key]))}", *numbers])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=DATA)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=HERE, metavar="DIR", help="of the CSV (default: beside this script)"
    )
    options = parser.parse_args()
    start, rows = time.perf_counter(), list[dict[str, Any]]()
    ways = [("tuned", "as it is"), *product([name for name in SETUPS if name != "tuned"], ["as it is", "rule"])]
    for (setup, how), lr, seed in product(ways, LRS, range(options.seeds)):
        loss = run(options.data, lr, seed, *SETUPS[setup], rule=how == "rule")
        rows.append({"setup": setup, "how": how, "lr": lr, "seed": seed, "loss": round(loss, 6)})
        print(f"\r{len(rows)} of {len(ways) * len(LRS) * options.seeds} runs", end="", flush=True)
    print(f"\r{'   '.join(HEADER)}", *("   ".join(line) for line in regrets(rows)), sep="\n")
    print(f"{time.perf_counter() - start:.0f} s")
    with open(options.out / "horizon.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
