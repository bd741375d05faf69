"""Tasks that cannot be memorised, for the demo: digits that are distorted anew in every batch, or CIFAR-10 in one pass.

Each gives batches that no run sees twice, and held-out samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.shared.digits import digits
from torch_depthmup.diagnostics.shared.extras import needs
from torch_depthmup.diagnostics.shared.training import DIVERGED, OPTIMIZERS
from torch_depthmup.errors import DepthMuPError

__all__ = ["OnlineTraining", "Pictures", "cifar10", "distorted", "distorted_digits"]

HELD_OUT = 300  # of the digits
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")  # of a .npz file
LAST = 5  # the online loss is the mean over the last fifth of the steps


@dataclass(frozen=True)
class Pictures:
    """Flattened pictures to train on and others to test on.

    Args:
        images: (samples, pixels).
        labels: (samples,).
        held_out_images: (others, pixels).
        held_out_labels: (others,).
        distort: whether each batch is distorted anew; without it a pass over the data must be enough.
    """

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    distort: bool

    def batches(self, count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``count`` batches of ``size`` samples.

        Raises:
            DepthMuPError: there are too few samples for one pass.
        """
        if not self.distort and count * size > len(self.labels):
            raise DepthMuPError(
                f"{count} steps of {size} samples are more than one pass over {len(self.labels)}: use fewer steps"
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator)
        for step in range(count):
            if self.distort:
                which = torch.randint(len(self.labels), (size,), generator=generator)
                yield distorted(self.images[which], generator), self.labels[which]
            else:
                which = order[step * size : (step + 1) * size]
                yield self.images[which], self.labels[which]


def distorted_digits() -> Pictures:
    """The scanned digits, the last 300 held out."""
    images, labels = digits()
    return Pictures(images[:-HELD_OUT], labels[:-HELD_OUT], images[-HELD_OUT:], labels[-HELD_OUT:], True)


def distorted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Square pictures, rotated by up to 15 degrees, scaled, sheared and shifted a little, with noise.

    Args:
        images: (samples, pixels).
        generator: of the random numbers.
    """
    count, side = len(images), math.isqrt(images.shape[1])

    def within(size: float) -> Tensor:
        return size * (2 * torch.rand(count, generator=generator) - 1)

    angle, scale, shear = within(math.pi / 12), 1 + within(0.15), within(0.2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, shear - sin, within(0.2), sin, cos, within(0.2)], 1).view(count, 2, 3)
    grid = nn.functional.affine_grid(rows, [count, 1, side, side], align_corners=False)
    moved = nn.functional.grid_sample(images.view(count, 1, side, side), grid, align_corners=False)
    return moved.flatten(1) + 0.3 * torch.randn(images.shape, generator=generator)


def cifar10(path: Path | None = None) -> Pictures:
    """CIFAR-10, each pixel centred and scaled.

    Args:
        path: a ``.npz`` file with the arrays `ARRAYS`, or a folder as torchvision makes it; ``None`` lets torchvision
            download it to ``./data``.

    Raises:
        DepthMuPError: the file is something else.
        ImportError: torchvision is needed and not installed.
    """
    if path is not None and path.suffix == ".npz":
        parts = _from_npz(path)
    else:
        datasets = needs("torchvision.datasets")
        loaded = [datasets.CIFAR10(path or "data", train=train, download=path is None) for train in (True, False)]
        parts = tuple(torch.as_tensor(v) for part in loaded for v in (part.data, part.targets))
    x, y, held_x, held_y = parts
    x, held_x = x.flatten(1).float(), held_x.flatten(1).float()
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    return Pictures((x - mean) / scale, y.long(), (held_x - mean) / scale, held_y.long(), False)


def _from_npz(path: Path) -> tuple[Tensor, ...]:
    with needs("numpy").load(path) as file:
        missing = [name for name in ARRAYS if name not in file]
        if missing:
            raise DepthMuPError(f"{path} has no {missing[0]}, only {', '.join(file)}")
        return tuple(torch.from_numpy(file[name]) for name in ARRAYS)


@dataclass(frozen=True)
class OnlineTraining:
    """Trains on batches that it sees once; calling it with (model, lr, seed) returns the online loss.

    Args:
        pictures: what to train on.
        optimizer: ``"sgd"`` (momentum 0.9), ``"adam"`` or ``"adamw"``.
        steps: optimizer steps.
        batch_size: samples in each.
    """

    pictures: Pictures
    optimizer: str = "adam"
    steps: int = 80
    batch_size: int = 128

    def __call__(self, model: nn.Module, lr: float, seed: int) -> float:
        """The mean loss over the last fifth of the steps, infinite where it diverged."""
        options = {"momentum": 0.9} if self.optimizer == "sgd" else {}
        optimizer = OPTIMIZERS[self.optimizer](model, lr=lr, **options)
        losses: list[float] = []
        for images, labels in self.pictures.batches(self.steps, self.batch_size, seed):
            loss = nn.functional.cross_entropy(model(images), labels)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return math.inf
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        last = losses[-max(1, len(losses) // LAST) :]
        mean = sum(last) / len(last)
        return mean if mean <= DIVERGED * losses[0] else math.inf

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> tuple[float, float]:
        """Loss and share of right answers on the held-out samples."""
        output = model.eval()(self.pictures.held_out_images)
        right = output.argmax(1) == self.pictures.held_out_labels
        loss = nn.functional.cross_entropy(output, self.pictures.held_out_labels)
        return loss.item(), right.float().mean().item()
