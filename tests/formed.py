"""A small weight that is never formed, and its entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_depthmup.diagnostics.nfd.gaussian import GaussianMatrix, Noise
from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix

ROWS, COLUMNS = 12, 10


def implicit(rows: int = ROWS, columns: int = COLUMNS) -> nn.Parameter:
    start = GaussianMatrix(rows, columns, Noise([0], dtype=torch.float64), std=0.7)
    return nn.Parameter(ImplicitWeight(TrainedMatrix.at_start(start), "block.weight"))


def entries(weight: Tensor) -> Tensor:
    """All entries, by asking for every direction."""
    with torch.no_grad():
        return F.linear(torch.eye(weight.shape[1], dtype=torch.float64), weight).T.clone()


class Start(GaussianMatrix):
    """With its own products, of shapes (seeds, queries, columns) and (seeds, queries, rows)."""

    def right(self, queries: Tensor) -> Tensor:
        """W q for rows q."""
        return TrainedMatrix.at_start(self).product("right", queries)

    def left(self, queries: Tensor) -> Tensor:
        """W^T p for rows p."""
        return TrainedMatrix.at_start(self).product("left", queries)
