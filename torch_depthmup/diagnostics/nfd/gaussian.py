"""Products with a Gaussian matrix that is never formed, exact in law at any size.

A matrix W of independent normal entries is seen only through products W q and W^T p. Conditioning on those seen so far
gives the law of the next one: what lies in the span of earlier queries is known, the rest is fresh noise, except along
earlier queries of the transpose.

Source: Bolthausen's conditioning argument, as in approximate message passing and Tensor Programs (arXiv 2009.10685).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_depthmup.errors import DepthMuPError

__all__ = ["Coupling", "GaussianMatrix", "Noise", "TrainedMatrix", "checked_coupling", "checked_dtype"]

Coupling = Literal["reused", "decoupled"]

ROUNDING = 100  # times eps: what is left of a query, relative to it, that is rounding and no new direction
MOSTLY_NEW = 0.1  # share of a query off the basis above which one Gram-Schmidt pass is as good as ten times rounding
SPREAD = 1e-2  # directions are made orthonormal together down to this ratio of their Gram matrix's eigenvalues


def checked_coupling(coupling: str) -> Coupling:
    """The coupling of that name.

    Raises:
        DepthMuPError: there is none.
    """
    if coupling not in get_args(Coupling):
        raise DepthMuPError(f"coupling must be one of {', '.join(map(repr, get_args(Coupling)))}, not {coupling!r}")
    return coupling  # type: ignore[return-value]


def checked_dtype(dtype: torch.dtype) -> torch.dtype:
    """A precision in which conditioning works: orthogonal directions are told apart by rounding.

    Raises:
        DepthMuPError: it is another one.
    """
    if dtype not in (torch.float32, torch.float64):
        raise DepthMuPError(f"dtype must be torch.float32 or torch.float64, not {dtype}: less hides directions")
    return dtype


class Noise:
    """A stream of standard normal numbers for each seed, the same whatever seeds are simulated beside it.

    Args:
        seeds: one integer for each stream.
        device: where the numbers are made; ``None`` is the default device.
        dtype: of the numbers.
    """

    def __init__(self, seeds: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype):
        self.device = torch.device(device or "cpu")
        self.dtype = checked_dtype(dtype)
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def __call__(self, *shape: int) -> Tensor:
        """Numbers of shape (seeds, *shape)."""
        out = torch.empty(len(self.generators), *shape, device=self.device, dtype=self.dtype)
        for part, generator in zip(out, self.generators, strict=True):
            part.normal_(generator=generator)
        return out


class _Side:
    """Orthonormal queries from one side with their products, as rows: (seeds, queries, size)."""

    def __init__(self, size: int, product_size: int, capacity: int, noise: Noise):
        seeds = len(noise.generators)
        self.count = 0
        self._queries = torch.empty(seeds, capacity, size, device=noise.device, dtype=noise.dtype)
        self._products = torch.empty(seeds, capacity, product_size, device=noise.device, dtype=noise.dtype)

    @property
    def queries(self) -> Tensor:
        return self._queries[:, : self.count]

    @property
    def products(self) -> Tensor:
        return self._products[:, : self.count]

    def append(self, queries: Tensor, products: Tensor) -> None:
        end = self.count + queries.shape[1]
        if end > self._queries.shape[1]:
            self._queries, self._products = (_enlarged(rows, end) for rows in (self._queries, self._products))
        self._queries[:, self.count : end], self._products[:, self.count : end] = queries, products
        self.count = end


def _enlarged(rows: Tensor, least: int) -> Tensor:
    capacity = max(least, rows.shape[1] * 3 // 2)
    larger = rows.new_empty(rows.shape[0], capacity, rows.shape[2])
    larger[:, : rows.shape[1]] = rows
    return larger


class GaussianMatrix:
    """A matrix W of independent normal entries, one for each seed, known by its products.

    Args:
        rows: of W.
        columns: of W.
        noise: where fresh randomness comes from.
        std: standard deviation of the entries.
        capacity: how many queries from the right, and from the left, memory is taken for at once; more may be made.
        coupling: ``"reused"``: left products are those of the transpose, as in a network. ``"decoupled"``: of an
            independent matrix, as gradient independence assumes.

    Invariant (reused): <p, W q> = <W^T p, q> for all queries ever made, to rounding.

    >>> matrix = GaussianMatrix(10**6, 10**6, Noise([0], dtype=torch.float64), std=1e-3)  # 8 TB, if it were formed
    >>> p, q = torch.ones(1, 1, 10**6).double(), torch.ones(1, 1, 10**6).double()
    >>> forward, backward = matrix.right(q).value, matrix.left(p).value
    >>> torch.allclose((p * forward).sum(), (backward * q).sum())
    True
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        noise: Noise,
        *,
        std: float,
        capacity: tuple[int, int] = (0, 0),
        coupling: Coupling = "reused",
    ):
        self.rows, self.columns, self.noise, self.std = rows, columns, noise, std
        self.coupling = checked_coupling(coupling)
        self.right_side = _Side(columns, rows, capacity[0], noise)
        self.left_side = _Side(rows, columns, capacity[1], noise)

    def right(self, queries: Tensor) -> Product:
        """W q for rows q: (seeds, queries, columns) -> (seeds, queries, rows)."""
        return self._product(queries, self.right_side, self.left_side)

    def left(self, queries: Tensor) -> Product:
        """W^T p for rows p: (seeds, queries, rows) -> (seeds, queries, columns)."""
        return self._product(queries, self.left_side, self.right_side)

    def _product(self, queries: Tensor, here: _Side, there: _Side) -> Product:
        """Splits the queries along what was asked before, asks for the rest, and repeats until nothing is left."""
        smallest = ROUNDING * torch.finfo(queries.dtype).eps * torch.linalg.vector_norm(queries, dim=2)
        coordinates, remainder = _split(queries, here.queries)
        while (fresh := _directions(remainder, smallest)) is not None:
            here.append(fresh, self._fresh_products(fresh, there))
            along = torch.bmm(remainder, fresh.mT)
            coordinates = torch.cat([coordinates, along], dim=2)
            remainder = torch.baddbmm(remainder, along, fresh, alpha=-1)
            if not bool((torch.linalg.vector_norm(remainder, dim=2) > smallest).any()):
                break
            more, remainder = _split(remainder, here.queries)
            coordinates = coordinates + more
        return Product(torch.bmm(coordinates, here.products), coordinates)

    def _fresh_products(self, fresh: Tensor, there: _Side) -> Tensor:
        """W Q = E - Q_b (Q_b^T E) + Q_b (R_b^T Q) for new orthonormal Q; E alone if nothing was asked from there."""
        noise = self.noise(fresh.shape[1], there.queries.shape[2]).mul_(self.std)
        if self.coupling == "decoupled" or not there.count:
            return noise
        wanted = torch.baddbmm(torch.bmm(fresh, there.products.mT), noise, there.queries.mT, alpha=-1)
        return torch.baddbmm(noise, wanted, there.queries)


@dataclass(frozen=True)
class Product:
    """What a matrix answers, and the queries' coordinates along the orthonormal ones of their side."""

    value: Tensor
    coordinates: Tensor


def _split(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates along an orthonormal basis, and the remainder; twice where once leaves too much rounding behind."""
    if not basis.shape[1]:
        return rows.new_zeros(*rows.shape[:2], 0), rows
    first = torch.bmm(rows, basis.mT)
    remainder = torch.baddbmm(rows, first, basis, alpha=-1)
    left = torch.linalg.vector_norm(remainder, dim=2) >= MOSTLY_NEW * torch.linalg.vector_norm(rows, dim=2)
    if bool(left.all()):
        return first, remainder
    second = torch.bmm(remainder, basis.mT)
    return first + second, torch.baddbmm(remainder, second, basis, alpha=-1)


def _directions(rows: Tensor, smallest: Tensor) -> Tensor | None:
    """Orthonormal directions in the span of the rows that are longer than ``smallest``, or ``None`` without such rows.

    By the eigenvectors of the Gram matrix of the normalised rows, as far as that is well conditioned: directions below
    are left for another round. Of several seeds the one with most directions counts, and the others get zero rows.
    """
    norms = torch.linalg.vector_norm(rows, dim=2)
    live = norms > smallest
    if not bool(live.any()):
        return None
    units = (rows * torch.where(live, 1 / norms, 0.0)[:, :, None])[:, live.any(0)]
    values, vectors = torch.linalg.eigh(torch.bmm(units, units.mT))
    kept = values > SPREAD * values[:, -1:].clamp_min(torch.finfo(rows.dtype).tiny)
    rank = int(kept.sum(1).max())
    scales = torch.where(kept, values.clamp_min(torch.finfo(rows.dtype).tiny).rsqrt(), 0.0)[:, -rank:]
    vectors = vectors[:, :, -rank:]
    turned = vectors * scales[:, None]
    # An eigenvector's sign is rounding, and what a seed draws must not hang on it: G^{-1/2}, or a sign by convention.
    if bool(kept.all()):
        turned = torch.bmm(turned, vectors.mT)
    else:
        uneven = torch.arange(1, vectors.shape[1] + 1, device=rows.device, dtype=rows.dtype).sqrt()
        turned = turned * torch.where((uneven[:, None] * vectors).sum(1, keepdim=True) < 0, -1.0, 1.0)
    basis = torch.bmm(turned.mT, units)
    # One step of Newton's iteration towards the nearest orthonormal rows: (3 - G) / 2, which also maps 0 to 0.
    gram = torch.bmm(basis, basis.mT)
    return torch.baddbmm(basis, gram, basis, beta=1.5, alpha=-0.5)


@dataclass(frozen=True)
class TrainedMatrix:
    """gain * W + Q_b^T change Q_f: a Gaussian matrix and what training made of it, in coordinates of the queries.

    Gradients and velocities are such matrices too, of gain 0, so the algebra of an optimizer works on them. Values are
    never changed; what grows with a product is the basis in `start`, in which all of them are written.

    Args:
        start: W.
        gain: factor on it.
        change: (seeds, left queries, right queries); directions that were asked later have coordinate zero.
    """

    start: GaussianMatrix
    gain: float
    change: Tensor

    @classmethod
    def at_start(cls, start: GaussianMatrix, gain: float = 1.0) -> TrainedMatrix:
        """gain * W."""
        return cls(start, gain, torch.zeros(len(start.noise.generators), 0, 0, device=start.noise.device,
                                            dtype=start.noise.dtype))  # fmt: skip

    @classmethod
    def outer(cls, start: GaussianMatrix, p: Tensor, q: Tensor) -> TrainedMatrix:
        """Sum of p q^T over rows of coordinates p (seeds, rows, left queries) and q."""
        return cls(start, 0.0, torch.bmm(p.mT, q))

    def right(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For rows q the product, what of it is due to the change, and the coordinates of q."""
        answer = self.start.right(queries)
        own = self._own(answer)
        return own.add(answer.value, alpha=self.gain), own, answer.coordinates

    def right_value(self, answer: Product) -> Tensor:
        """The product, from what the start answered."""
        return self._own(answer).add_(answer.value, alpha=self.gain)

    def _own(self, answer: Product) -> Tensor:
        inner = torch.bmm(answer.coordinates[:, :, : self.change.shape[2]], self.change.mT)
        return torch.bmm(inner, self.start.left_side.queries[:, : self.change.shape[1]])

    def left(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """For rows p the transposed product, and the coordinates of p."""
        answer = self.start.left(queries)
        return self.left_value(answer), answer.coordinates

    def left_value(self, answer: Product) -> Tensor:
        """The transposed product, from what the start answered."""
        inner = torch.bmm(answer.coordinates[:, :, : self.change.shape[1]], self.change)
        own = torch.bmm(inner, self.start.right_side.queries[:, : self.change.shape[2]])
        return own.add_(answer.value, alpha=self.gain)

    def plus(self, other: TrainedMatrix, factor: float = 1.0) -> TrainedMatrix:
        """self + factor * other, of the same start."""
        left, right = (max(a, b) for a, b in zip(self.change.shape[1:], other.change.shape[1:], strict=True))
        change = _padded(self.change, left, right) + factor * _padded(other.change, left, right)
        return TrainedMatrix(self.start, self.gain + factor * other.gain, change)

    def times(self, factor: float) -> TrainedMatrix:
        """factor * self."""
        return TrainedMatrix(self.start, factor * self.gain, factor * self.change)

    def norm(self) -> Tensor:
        """Frobenius norm, (seeds,): of the entries not seen yet the mean square stands for the square."""
        start, left, right = self.start, self.start.left_side, self.start.right_side
        square = self.change.square().sum((1, 2))
        if self.gain:
            seen = torch.bmm(left.queries, right.products.mT)  # Q_b W Q_f^T
            known = right.products.square().sum((1, 2)) + left.products.square().sum((1, 2)) - seen.square().sum((1, 2))
            unseen = start.std**2 * (start.rows - left.count) * (start.columns - right.count)
            change = _padded(self.change, left.count, right.count)
            square = square + self.gain**2 * (known + unseen) + 2 * self.gain * (change * seen).sum((1, 2))
        return square.clamp_min(0).sqrt()


def _padded(change: Tensor, left: int, right: int) -> Tensor:
    return F.pad(change, (0, right - change.shape[2], 0, left - change.shape[1]))
