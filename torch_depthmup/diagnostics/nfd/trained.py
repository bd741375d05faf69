"""A Gaussian matrix that is never formed, and what training made of it: a part of low rank, and one by entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.entries import Node, Outer, blocks, from_left, from_right, pointwise
from torch_depthmup.diagnostics.nfd.gaussian import GaussianMatrix, Side
from torch_depthmup.diagnostics.nfd.orthonormal import padded

__all__ = ["TrainedMatrix"]


@dataclass(frozen=True)
class TrainedMatrix:
    """gain * W + Q_b^T change Q_f + entries: a Gaussian matrix and what training made of it.

    Gradients and velocities are such matrices too, of gain 0, so the algebra of an optimizer works on them. Values are
    never changed; what grows with a product is the basis in `start`, in which all of them are written.

    >>> from torch_depthmup.diagnostics.nfd.gaussian import Noise
    >>> start = GaussianMatrix(10**6, 10**6, Noise([0], dtype=torch.float64), std=1e-3)  # 8 TB, if it were formed
    >>> p, q = torch.ones(1, 1, 10**6).double(), torch.ones(1, 1, 10**6).double()
    >>> matrix = TrainedMatrix.at_start(start)
    >>> forward, backward = matrix.product("right", q), matrix.product("left", p)
    >>> torch.allclose((p * forward).sum(), (backward * q).sum())
    True

    Args:
        start: W.
        gain: factor on it.
        change: (seeds, left queries, right queries), coordinates of what has low rank; directions that were asked later
            have coordinate zero.
        entries: what has not, as its entries are computed.
        how: of gain 0, the change once more as its entries are computed with least work.
    """

    start: GaussianMatrix
    gain: float
    change: Tensor
    entries: Node | None = None
    how: Node | None = None

    @classmethod
    def at_start(cls, start: GaussianMatrix, gain: float = 1.0) -> TrainedMatrix:
        """gain * W."""
        return cls(start, gain, torch.zeros(len(start.noise.generators), 0, 0, device=start.noise.device,
                                            dtype=start.noise.dtype))  # fmt: skip

    @classmethod
    def outer(cls, start: GaussianMatrix, p: Tensor, q: Tensor) -> TrainedMatrix:
        """Sum of p q^T over rows of coordinates p (seeds, rows, left queries) and q."""
        few = p.shape[1] < min(p.shape[2], q.shape[2])
        return cls(start, 0.0, torch.bmm(p.mT, q), how=Outer(p, q) if few else None)

    @property
    def known(self) -> Node | None:
        """How its entries are computed; ``None`` where those of W would be needed."""
        if self.gain * self.start.std:
            return None
        low = self._low()
        return low if self.entries is None else pointwise(torch.add, low, self.entries) if low else self.entries

    def _low(self) -> Node:
        """The change by entries."""
        if self.how is not None:
            return self.how
        left, right = self.change.shape[1:]
        eye = torch.eye(min(left, right), device=self.change.device, dtype=self.change.dtype)
        eye = eye.expand(len(self.change), -1, -1)
        return Outer(self.change.mT, eye) if right < left else Outer(eye, self.change)

    def product(self, side: Side, queries: Tensor) -> Tensor:
        """The product with rows q from the right, the transposed one with rows p from the left."""
        return self.value(side, self.start.coordinates(side, queries), queries)

    def value(self, side: Side, coordinates: Tensor, queries: Tensor | None = None) -> Tensor:
        """The product with rows of which the coordinates are known, and maybe the rows."""
        here, there = self.start.sides(side)
        mixed = self.own(side, coordinates)
        if self.gain:
            shares = here.shares[:, : coordinates.shape[2]]
            width = max(mixed.shape[2], shares.shape[2])
            known = self.gain * torch.bmm(coordinates[:, :, : shares.shape[1]], shares)
            mixed = padded(mixed, mixed.shape[1], width) + padded(known, mixed.shape[1], width)
            fresh = torch.bmm(self.start.std * coordinates, here.noise(coordinates.shape[2]))
            low = torch.baddbmm(fresh, mixed, there.queries[:, :width], beta=self.gain)
        else:
            low = torch.bmm(mixed, there.queries[:, : mixed.shape[2]])
        if self.entries is None:
            return low
        if queries is None:
            queries = torch.bmm(coordinates, here.queries[:, : coordinates.shape[2]])
        multiply = from_right if side == "right" else from_left
        return low + multiply(self.entries, *self._bases(), queries.reshape(*low.shape[:2], -1))

    def _bases(self) -> tuple[Tensor, Tensor]:
        return self.start.left_side.queries, self.start.right_side.queries

    def own(self, side: Side, coordinates: Tensor) -> Tensor:
        """What the change adds to the product, in coordinates along the other side's orthonormal queries."""
        change = self.change.mT if side == "right" else self.change
        return torch.bmm(coordinates[:, :, : change.shape[1]], change)

    def plus(self, other: TrainedMatrix, factor: float = 1.0) -> TrainedMatrix:
        """self + factor * other, of the same start."""
        left, right = (max(a, b) for a, b in zip(self.change.shape[1:], other.change.shape[1:], strict=True))
        change = padded(self.change, left, right) + factor * padded(other.change, left, right)
        gradients = self.gain == other.gain == 0 and (self.how or other.how)
        return TrainedMatrix(
            self.start,
            self.gain + factor * other.gain,
            change,
            _added(self.entries, other.entries, factor),
            _added(self._low(), other._low(), factor) if gradients else None,
        )

    def times(self, factor: float) -> TrainedMatrix:
        """factor * self."""
        if factor == 0:
            return TrainedMatrix.at_start(self.start, 0.0)
        entries, how = (part and pointwise(torch.mul, part, factor) for part in (self.entries, self.how))
        return TrainedMatrix(self.start, factor * self.gain, factor * self.change, entries, how)

    def norm(self) -> Tensor:
        """Frobenius norm, (seeds,): of the entries not seen yet the mean square stands for the square."""
        start, left, right = self.start, self.start.left_side, self.start.right_side
        square = self.change.square().sum((1, 2))
        known_left = torch.bmm(padded(self.change, left.count, right.count), right.queries)
        answers = []
        if self.gain:
            answers = [self._answers(side) for side in ("right", "left")]
            seen = torch.bmm(left.queries, answers[0].mT)  # Q_b W Q_f^T
            known = answers[0].square().sum((1, 2)) + answers[1].square().sum((1, 2)) - seen.square().sum((1, 2))
            found = [side.queries.square().sum((1, 2)).round() for side in (left, right)]  # without a seed's zero rows
            unseen = start.std**2 * (start.rows - found[0]) * (start.columns - found[1])
            change = padded(self.change, left.count, right.count)
            square = square + self.gain**2 * (known + unseen) + 2 * self.gain * (change * seen).sum((1, 2))
            known_left = known_left + self.gain * (answers[1] - torch.bmm(seen, right.queries))
        if self.entries is not None:  # |A + D|^2 = |A|^2 + <D, D + 2 A>, and D is independent of what is not seen of A
            bases = self._bases()
            square = square + sum(d.square().sum((1, 2)) for _, d in blocks(self.entries, *bases))
            square = square + 2 * (from_left(self.entries, *bases, left.queries) * known_left).sum((1, 2))
            if self.gain:
                along = from_right(self.entries, *bases, right.queries)
                square = square + 2 * self.gain * (along * answers[0]).sum((1, 2))
        return square.clamp_min(0).sqrt()

    def _answers(self, side: Side) -> Tensor:
        """The start's products with all orthonormal queries of a side."""
        here, there = self.start.sides(side)
        queries = there.queries[:, : here.shares.shape[2]]
        return torch.baddbmm(here.noise(), here.shares, queries, beta=self.start.std)


def _added(one: Node | None, other: Node | None, factor: float) -> Node | None:
    """one + factor * other, where nothing is zero."""
    if other is None:
        return one
    if one is None:
        return other if factor == 1 else pointwise(torch.mul, other, factor)
    return pointwise(torch.add, one, other, alpha=factor)
