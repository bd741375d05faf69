"""What the scripts of this folder that train on images share: the images, one pass through them, a sweep's files."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm
from torch_depthmup.diagnostics.transfer.result import Sweep

HERE = Path(__file__).parent
CLASSES, PIXELS = 10, 3 * 16 * 16
DATA = "an .npz file, or torchvision's folder for CIFAR-10"


@cache
def images(source: str) -> tuple[Tensor, Tensor]:
    """The training set: (50000, 768), each channel standardised over the data set; labels (50000,)."""
    path = Path(source)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            pixels, labels = torch.tensor(arrays["train_images"]).float(), torch.tensor(arrays["train_labels"]).long()
    else:
        from torchvision.datasets import CIFAR10

        data = CIFAR10(str(path), train=True, download=True)
        whole = torch.tensor(data.data).permute(0, 3, 1, 2).float()
        pixels, labels = F.avg_pool2d(whole, 2).permute(0, 2, 3, 1), torch.tensor(data.targets)
    pixels = (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    return pixels.flatten(1), labels


def shuffled(source: str, seed: int, batch: int, samples: int | None = None) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of images in the seed's order, each image at most once; all of them, or the first so many."""
    inputs, targets = images(source)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))[:samples]
    return ((inputs[part], targets[part]) for part in order.split(batch))


def one_pass(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> list[float]:
    """Trains on each batch once. Returns each loss, taken before the batch was trained on, up to one not finite."""
    torch.set_num_threads(1)
    losses = []
    for inputs, targets in batches:
        loss = loss_of(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return losses


def final(losses: Sequence[float]) -> float:
    """The mean of the last fifth; infinite where training diverged."""
    last = losses[-len(losses) // 5 :]
    return sum(last) / len(last) if math.isfinite(losses[-1]) else math.inf


def parser_of(text: str, setups: Iterable[str], depths: list[int]) -> argparse.ArgumentParser:
    """The arguments that each sweep has; the first set-up is the default."""
    names = list(setups)
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=DATA)
    parser.add_argument("--setup", choices=names, default=names[0])
    parser.add_argument("--depths", type=int, nargs="+", default=depths)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=int, nargs=2, metavar=("LOW", "HIGH"), help="powers of two, ends included")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each (default 1)")
    parser.add_argument("--runs", type=Path, help="finished runs (default NAME_SETUP.jsonl, as the CSV)")
    parser.add_argument(
        "--out", type=Path, default=HERE, metavar="DIR", help="of the CSV (default: beside this script)"
    )
    parser.add_argument("--figures", type=Path, default=HERE.parent / "figures", metavar="DIR")
    return parser


def swept(
    name: str, make: Callable[[int], nn.Module], train: Callable[[nn.Module, float, int], float],
    options: argparse.Namespace, powers: tuple[int, int], title: str, example_inputs: Tensor, digits: int = 2,
) -> Sweep:  # fmt: skip
    """Does the sweep that the arguments ask for, prints it, and writes its CSV and its figure."""
    low, high = options.lrs or powers
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        sweep = dm.diagnostics.transfer_sweep(
            make, train, depths=options.depths, lrs=[2.0**i for i in range(low, high + 1)], seeds=options.seeds,
            executor=pool, path=options.runs or f"{name}.jsonl", example_inputs=example_inputs,
        )  # fmt: skip
    print(sweep)
    print(f"{sum(run.seconds for run in sweep.runs):.0f} s of work, {time.perf_counter() - start:.0f} s now")
    sweep.frame().to_csv(options.out / f"{name}.csv", index=False, float_format="%.6g")
    figure = dm.diagnostics.plots.transfer_figure(sweep, title=title)
    figure.axes[0].yaxis.set_major_formatter(f"{{x:.{digits}f}}")
    figure.savefig(options.figures / f"{name}.png", dpi=130)
    return sweep
