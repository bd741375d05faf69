"""A small weight that is never formed, and its entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_depthmup.diagnostics.nfd.gaussian import GaussianMatrix, Noise, TrainedMatrix
from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight

ROWS, COLUMNS = 12, 10


def implicit(rows: int = ROWS, columns: int = COLUMNS) -> nn.Parameter:
    start = GaussianMatrix(rows, columns, Noise([0], dtype=torch.float64), std=0.7)
    return nn.Parameter(ImplicitWeight(TrainedMatrix.at_start(start), "block.weight"))


def entries(weight: Tensor) -> Tensor:
    """All entries, by asking for every direction."""
    with torch.no_grad():
        return F.linear(torch.eye(weight.shape[1], dtype=torch.float64), weight).T.clone()
