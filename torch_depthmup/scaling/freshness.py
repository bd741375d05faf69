"""Whether values are what `parametrize` takes them for: fresh."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["warn_if_trained"]

COUNTED = 10  # batches; a few may have been run to initialise or to try the model
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
# Measured: independent entries have at most 1.02 (stock models of torchvision, timm and transformers, width 16 and
# more); 100 steps of AdamW at 1e-3 at width 64 give 1.1 and more.
OUTLIER = 1.05
SMALLEST, MATRICES, ITERATIONS = 16, 24, 20  # the smallest side that tells; how many matrices are looked at


def warn_if_trained(model: nn.Module) -> None:
    """Warns where values tell of training: gains that differ, counted batches, weights that are not independent draws.

    A checkpoint of a parametrized run holds its scaling already: to scale it again is to scale it twice.
    """
    told = next(_signs_in_norms(model), None) or _sign_in_matrices(model)
    if told is not None:
        warnings.warn(
            f"this {type(model).__name__} looks trained or loaded: {told}. dm.parametrize scales values at "
            "initialization, and a checkpoint of a parametrized run is scaled already. Call dm.parametrize on the "
            "fresh model first, and load_state_dict after it",
            UserWarning,
            stacklevel=4,
        )


def _signs_in_norms(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if not isinstance(module, NORMS):
            continue
        gain = module._parameters.get("weight")  # one that is computed may write to buffers
        counted = getattr(module, "num_batches_tracked", None)
        differ = gain is not None and not gain.is_meta and gain.numel() > 1 and bool((gain != gain.flatten()[0]).any())
        if differ:
            yield f"the gains of {name} differ from channel to channel"
        elif counted is not None and not counted.is_meta and int(counted) > COUNTED:
            yield f"{name} has counted {int(counted)} batches"


@torch.no_grad()
def _sign_in_matrices(model: nn.Module) -> str | None:
    """Training adds a few large directions to weights: singular values beyond those of independent entries.

    Source: the largest singular value of an n x m matrix of independent entries of variance s^2 is s (sqrt(n) +
    sqrt(m)), Bai and Yin 1993. Looked at in a quarter of the matrices, since a few may have a structure of their own.
    """
    matrices = [
        (name, p)
        for name, p in model.named_parameters()
        if type(p.data) is Tensor and p.is_floating_point() and p.ndim > 1 and not p.is_meta
    ]
    matrices = [(name, p) for name, p in matrices if min(p.shape[0], p[0].numel()) >= SMALLEST]
    every = math.ceil(len(matrices) / MATRICES)
    found = sorted(((_outlier(p), name) for name, p in matrices[:: max(every, 1)]), reverse=True)
    if len(found) < 4:
        return None
    ratio, name = found[len(found) // 4]
    if not ratio > OUTLIER:
        return None
    return f"the largest singular value of {name} is {ratio:.2f} times that of a matrix of independent entries"


def _outlier(weight: Tensor) -> float:
    """The largest singular value over what independent entries would give, whatever the sizes of rows and columns."""
    matrix = weight.detach().flatten(1).float()
    matrix = matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-30)
    matrix = matrix / matrix.norm(dim=0, keepdim=True).clamp_min(1e-30)
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    vector = vector.to(matrix)
    for _ in range(ITERATIONS):
        vector = nn.functional.normalize(matrix.T @ (matrix @ vector), dim=0)
    rows, columns = matrix.shape
    size = float(matrix.square().mean().sqrt())
    return float((matrix @ vector).norm()) / (size * (math.sqrt(rows) + math.sqrt(columns))) if size else 0.0
