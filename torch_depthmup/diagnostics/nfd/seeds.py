"""The same Gaussian matrix of several seeds' networks as one matrix of as many seeds, and each seed's part of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.gaussian import GaussianMatrix, MatrixSide, Noise, Side
from torch_depthmup.errors import DepthMuPError

__all__ = ["OneOf", "joined"]


def joined(starts: Sequence[GaussianMatrix]) -> GaussianMatrix:
    """One matrix of all their seeds, which goes on drawing from their streams.

    Raises:
        DepthMuPError: they are of different shapes or laws, or were not asked for as many products each.
    """
    first, *others = starts
    kind = (first.rows, first.columns, first.coupling, first.right_side.count, first.left_side.count)
    for other in others:
        if kind != (other.rows, other.columns, other.coupling, other.right_side.count, other.left_side.count):
            raise DepthMuPError("matrices that differ in more than their seed cannot be joined")
        if other.std != first.std:
            raise DepthMuPError(f"matrices of standard deviations {first.std} and {other.std} cannot be joined")
    noise = Noise.of([generator for start in starts for generator in start.noise.generators], like=first.noise)
    made = GaussianMatrix(first.rows, first.columns, noise, std=first.std, coupling=first.coupling)
    for side, parts in (
        (made.right_side, [start.right_side for start in starts]),
        (made.left_side, [start.left_side for start in starts]),
    ):
        if parts[0].count:
            queries, drawn, shares = (
                torch.cat(tensors)
                for tensors in zip(*((part.queries, part.noise(), part.shares) for part in parts), strict=True)
            )
            side.append(queries, drawn, shares)
    return made


class OneOf(GaussianMatrix):
    """One seed's part of a joined matrix: what was asked can be read off it, and nothing can be asked."""

    def __init__(self, all_seeds: GaussianMatrix, seed: int):
        self.rows, self.columns, self.std = all_seeds.rows, all_seeds.columns, all_seeds.std
        self.coupling = all_seeds.coupling
        self.noise = Noise.of([all_seeds.noise.generators[seed]], like=all_seeds.noise)
        self.right_side, self.left_side = _Part(all_seeds.right_side, seed), _Part(all_seeds.left_side, seed)

    def coordinates(self, side: Side, queries: Tensor) -> Tensor:
        """Refused.

        Raises:
            DepthMuPError: always.
        """
        raise DepthMuPError("a matrix is multiplied for all seeds at once here, and not for one of them")


class _Part(MatrixSide):
    """One seed's part of a side."""

    def __init__(self, all_seeds: MatrixSide, seed: int):
        self._all, self._seed = all_seeds, slice(seed, seed + 1)

    @property
    def count(self) -> int:  # type: ignore[override]
        return self._all.count

    @property
    def shares(self) -> Tensor:  # type: ignore[override]
        return self._all.shares[self._seed]

    @property
    def queries(self) -> Tensor:
        return self._all.queries[self._seed]

    def noise(self, count: int | None = None) -> Tensor:
        return self._all.noise(count)[self._seed]
