"""Does the learning rate transfer in depth on real images? CIFAR-10 at 16 pixels, one pass: nothing can be memorised.

    python examples/evidence/cifar_transfer.py --data DIR                # loads CIFAR-10 through torchvision into DIR
    python examples/evidence/cifar_transfer.py --data cifar10_16px.npz   # or the arrays train_images, train_labels

Trains networks of two-layer blocks, h + V relu(W h) / 2 (so that depth 4 is depth-muP's own scale), of width 128 with
batches of 128, at depths 4, 8, 16 and 64 under four rules. Three set-ups (--setup): "adam" and "sgd" without
normalization, and "adam-norm" with a LayerNorm before each block and before the readout. The loss of a run is the mean
of the last fifth of its training losses; as every image is seen once, each of these was taken before the image was
trained on.

Finished runs are kept in a file (--runs): the same command goes on where it was stopped, also with more --seeds. Writes
cifar_transfer_SETUP.csv beside this file and figures/cifar_transfer_SETUP.png. A set-up takes half an hour on one core.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm

HERE = Path(__file__).parent
WIDTH, BATCH, CLASSES, PIXELS = 128, 128, 10, 3 * 16 * 16
SETUPS = {"adam": (-13, -9), "adam-norm": (-8, -4), "sgd": (-8, -2)}
"""Set-ups, and the powers of two of their learning rates."""
EPS = 1e-12  # Adam's own 1e-8 is not small beside the gradients of a readout that is divided by the width
SCALE = 0.5  # 1 / sqrt(4): at the base depth of 4 the branches together are as large as the stream they start from


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


class Block(nn.Module):
    """h + V relu(W norm(h)) / 2, W with the variance 1 / fan-in and V with twice that."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(self.inner.weight, std=WIDTH**-0.5)
        nn.init.normal_(self.outer.weight, std=(2 / WIDTH) ** 0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h + SCALE * self.outer(F.relu(self.inner(self.norm(h))))


class Network(nn.Module):
    """Linear stem, blocks, and a readout of unit variance that is divided by the width."""

    def __init__(self, depth: int, norm: bool):
        super().__init__()
        self.stem, self.readout = nn.Linear(PIXELS, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES, bias=False)
        self.blocks = nn.Sequential(*[Block(norm) for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        nn.init.normal_(self.stem.weight, std=PIXELS**-0.5)
        nn.init.normal_(self.readout.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.norm(self.blocks(self.stem(x)))) / WIDTH


@dataclass(frozen=True)
class OnePass:
    """Trains once through the data. Returns the mean of the last fifth of the losses; infinite where chance is less."""

    source: str
    setup: str

    def __call__(self, model: nn.Module, lr: float, seed: int) -> float:
        torch.set_num_threads(1)
        inputs, targets = images(self.source)
        hidden = {"params": list(model.blocks.parameters()), "lr": lr}
        ends = {"params": [p for name, p in model.named_parameters() if not name.startswith("blocks.")]}
        if self.setup == "sgd":
            optimizer = dm.SGD([hidden, {**ends, "lr": lr * WIDTH}])
        else:
            optimizer = dm.Adam([hidden, {**ends, "lr": lr * WIDTH**0.5}], eps=EPS)
        losses = []
        for batch in torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).split(BATCH):
            loss = F.cross_entropy(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return math.inf
        final = sum(losses[-len(losses) // 5 :]) / len(losses[-len(losses) // 5 :])
        return final if final < math.log(CLASSES) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file, or torchvision's folder for CIFAR-10")
    parser.add_argument("--setup", choices=SETUPS, default="adam")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=int, nargs=2, metavar=("LOW", "HIGH"), help="powers of two, ends included")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each (default 1)")
    parser.add_argument("--runs", type=Path, help="finished runs (default cifar_transfer_SETUP.jsonl)")
    parser.add_argument(
        "--out", type=Path, default=HERE, metavar="DIR", help="of the CSV (default: beside this script)"
    )
    parser.add_argument("--figures", type=Path, default=HERE.parent / "figures", metavar="DIR")
    options = parser.parse_args()
    low, high = options.lrs or SETUPS[options.setup]
    name = f"cifar_transfer_{options.setup}"
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        sweep = dm.diagnostics.transfer_sweep(
            partial(Network, norm=options.setup == "adam-norm"), OnePass(options.data, options.setup),
            depths=options.depths, lrs=[2.0**i for i in range(low, high + 1)], seeds=options.seeds, executor=pool,
            path=options.runs or f"{name}.jsonl",
            example_inputs=torch.zeros(4, PIXELS).normal_(generator=torch.Generator().manual_seed(0)),
        )  # fmt: skip
    print(sweep)
    print(f"{sum(run.seconds for run in sweep.runs):.0f} s of work, {time.perf_counter() - start:.0f} s now")
    sweep.frame().to_csv(options.out / f"{name}.csv", index=False, float_format="%.6g")
    title = f"CIFAR-10 at 16 pixels, one pass, width {WIDTH}, {options.setup}"
    figure = dm.diagnostics.plots.transfer_figure(sweep, title=title)
    figure.axes[0].yaxis.set_major_formatter("{x:.3f}")
    figure.savefig(options.figures / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
