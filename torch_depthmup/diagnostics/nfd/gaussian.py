"""Products with a Gaussian matrix that is never formed, exact in law at any size.

A matrix W of independent normal entries is seen only through products W q and W^T p. Conditioning on those seen so far
gives the law of the next one: what lies in the span of earlier queries is known, the rest is fresh noise, except along
earlier queries of the transpose.

Source: Bolthausen's conditioning argument, as in approximate message passing and Tensor Programs (arXiv 2009.10685).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from torch_depthmup.diagnostics.nfd.orthonormal import directions, eigen, padded, split, total
from torch_depthmup.errors import DepthMuPError, DivergenceError

__all__ = [
    "ROUNDED",
    "Coupling",
    "GaussianMatrix",
    "MatrixSide",
    "Noise",
    "Side",
    "checked_coupling",
    "checked_dtype",
]

Coupling = Literal["reused", "decoupled"]
Side = Literal["right", "left"]

ROUNDING = 100  # times eps: what is left of a query, relative to it, that is rounding and no new direction
ROUNDED = torch.float16  # noise is rounded to it: 11 bits, which change its variance by less than 1e-7 of it
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
        raise DepthMuPError(f"dtype must be torch.float32 or torch.float64, not {dtype}: it is too coarse")
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

    @classmethod
    def of(cls, generators: Sequence[torch.Generator], like: Noise) -> Noise:
        """Streams that were begun already."""
        made = cls([], device=like.device, dtype=like.dtype)
        made.generators = list(generators)
        return made

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        """Numbers of shape (seeds, *shape), of a standard deviation."""
        out = torch.empty(len(self.generators), *shape, device=self.device, dtype=self.dtype)
        for part, generator in zip(out, self.generators, strict=True):
            part.normal_(std=std, generator=generator)
        return out

    def rows(self, some: Tensor, size: int) -> Tensor:
        """Rows of standard normal numbers for those of (seeds, rows) that are some, and zeros for the others."""
        if bool(some.all()):
            return self(some.shape[1], size)
        out = torch.zeros(*some.shape, size, device=self.device, dtype=self.dtype)
        for part, own, generator in zip(out, some, self.generators, strict=True):
            part[own] = part.new_empty(int(own.sum()), size).normal_(generator=generator)
        return out


@dataclass(frozen=True)
class _Last:
    """The rows that were asked last from a side, and their coordinates. They are no copy, so they may have changed."""

    rows: Tensor
    version: int
    coordinates: Tensor

    def intact(self) -> bool:
        return self.rows._version == self.version

    def same(self, rows: Tensor) -> bool:
        """Whether it is the same view of the same memory, unchanged; ours is alive, so memory was not given away."""
        one, other = self.rows, rows
        shaped = one.shape == other.shape and one.stride() == other.stride()
        return shaped and one.data_ptr() == other.data_ptr() and self.version == one._version == other._version


class MatrixSide:
    """Orthonormal queries from one side, as rows (seeds, queries, size), and what the matrix answers to them.

    The answers are ``std noise + shares @ (the other side's queries)``: what is drawn for a query, and what is due to
    earlier products from the other side. Kept apart, a product needs the other side's queries once, and noise takes
    half the room: it is normal numbers that were rounded to half precision before anything was made of them.
    """

    def __init__(self, size: int, product_size: int, capacity: int, noise: Noise):
        seeds = len(noise.generators)
        self.count = 0
        self.last: _Last | None = None
        self.shares = torch.zeros(seeds, 0, 0, device=noise.device, dtype=noise.dtype)
        self._queries = torch.empty(seeds, capacity, size, device=noise.device, dtype=noise.dtype)
        self._noise = torch.empty(seeds, capacity, product_size, device=noise.device, dtype=ROUNDED)

    @property
    def queries(self) -> Tensor:
        return self._queries[:, : self.count]

    def noise(self, count: int | None = None) -> Tensor:
        """What was drawn for the first queries, or for all, of standard deviation 1."""
        return self._noise[:, : self.count if count is None else count].to(self._queries.dtype)

    def append(self, queries: Tensor, noise: Tensor, shares: Tensor) -> None:
        end = self.count + queries.shape[1]
        if end > self._queries.shape[1]:
            self.reserve(max(end, self._queries.shape[1] * 3 // 2))
        self._queries[:, self.count : end], self._noise[:, self.count : end] = queries, noise
        self.shares = torch.cat([padded(self.shares, self.count, shares.shape[2]), shares], dim=1)
        self.count = end

    def reserve(self, capacity: int) -> None:
        """Memory for so many queries; less than there are changes nothing."""
        if capacity > self._queries.shape[1]:
            self._queries, self._noise = (_enlarged(rows, capacity) for rows in (self._queries, self._noise))


def _enlarged(rows: Tensor, capacity: int) -> Tensor:
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
        self.right_side = MatrixSide(columns, rows, capacity[0], noise)
        self.left_side = MatrixSide(rows, columns, capacity[1], noise)

    def sides(self, side: Side) -> tuple[MatrixSide, MatrixSide]:
        """That side and the other one."""
        return (self.right_side, self.left_side) if side == "right" else (self.left_side, self.right_side)

    def coordinates(self, side: Side, queries: Tensor) -> Tensor:
        """Coordinates of rows along the orthonormal queries of their side, to which what is new in them is added.

        Args:
            side: where they are multiplied.
            queries: (seeds, rows, size), or (rows, size) for a single seed.
        """
        here, there = self.sides(side)
        if here.last is None or not here.last.same(queries):
            rows = queries if queries.ndim == 3 else queries[None]
            here.last = _Last(queries, queries._version, self._resolved(rows, here, there))
        return here.last.coordinates

    def _resolved(self, queries: Tensor, here: MatrixSide, there: MatrixSide) -> Tensor:
        """Coordinates of new queries: of what the last ones say of them, and of the rest."""
        smallest = ROUNDING * torch.finfo(queries.dtype).eps * torch.linalg.vector_norm(queries, dim=2)
        coordinates, rest = _from_last(queries, here)
        return total(coordinates, self._asked(rest, smallest, here, there))

    def _asked(self, rows: Tensor, smallest: Tensor, here: MatrixSide, there: MatrixSide) -> Tensor:
        """Splits rows along what was asked before, asks for the rest, until nothing longer than ``smallest`` is left.

        With G the Gram matrix of the rest at unit length, G = V x V^T, new directions are x^{-1/2} V^T rest for the
        large x; for the small ones, where that would magnify rounding, V^T rest are rows for another round.
        """
        coordinates, rest, exact = split(rows, here.queries)
        lengths = torch.linalg.vector_norm(rest, dim=2)
        finite = lengths.isfinite()
        live = finite & (lengths > smallest)
        if not bool(finite.all()):  # a network that diverges: its products are nan, and no direction is learnt
            coordinates = coordinates.masked_fill(~finite[:, :, None], math.nan)
            if not coordinates.shape[2]:
                raise DivergenceError("the first vectors that a matrix is multiplied by are not finite")
            rest = rest.masked_fill(~finite[:, :, None], 0.0)
        if not bool(live.any()):
            return coordinates
        units = rest * torch.where(live, 1 / lengths, 0.0)[:, :, None]
        values, vectors = eigen(torch.bmm(units, units.mT), live)
        kept = values > SPREAD * values[:, -1:].clamp_min(torch.finfo(rows.dtype).tiny)
        old = here.queries[:, : 0 if exact else None]
        fresh, along, back, some = directions(units, live, values, vectors, kept, old)
        lengths = torch.where(live, lengths, 0.0)[:, :, None]
        coordinates = torch.cat([total(lengths * back, coordinates), lengths * along], dim=2)
        here.append(fresh, *self._answer(fresh, some, there))
        share = torch.where(live, smallest / lengths[:, :, 0], math.inf).amin(1, keepdim=True)
        more = ~kept & (values > share.square())
        if bool(more.any()):
            turned = (vectors * more[:, None])[:, :, more.any(0)]
            asked = self._asked(torch.bmm(turned.mT, units), share.expand(-1, turned.shape[2]), here, there)
            coordinates = total(coordinates, torch.bmm(lengths * turned, asked))
        return coordinates

    def _answer(self, fresh: Tensor, some: Tensor, there: MatrixSide) -> tuple[Tensor, Tensor]:
        """W Q = E + Q_b (R_b^T Q - Q_b^T E) for new orthonormal Q, as E and the bracket; R_b^T Q is E_b^T Q, since what
        else is in R_b lies along earlier queries.
        """
        noise = self.noise.rows(some, there.queries.shape[2]).to(ROUNDED).to(fresh.dtype)
        if self.coupling == "decoupled" or not there.count:
            return noise, noise[:, :, :0]
        along = torch.bmm(fresh, there.noise().mT)
        return noise, self.std * torch.baddbmm(along, noise, there.queries.mT, alpha=-1)


def _from_last(queries: Tensor, side: MatrixSide) -> tuple[Tensor, Tensor]:
    """Coordinates of each row's projection on the row asked last in its place, and the rest.

    A network's features change little from step to step. What is new in them is found from the difference in one pass,
    where from the whole rows rounding would ask for two.
    """
    if side.last is None or side.last.rows.numel() != queries.numel() or not side.last.intact():
        return queries.new_zeros(*queries.shape[:2], 0), queries
    last = side.last.rows.reshape(queries.shape)
    squares = last.square().sum(2, keepdim=True)
    factor = (queries * last).sum(2, keepdim=True) / torch.where(squares > 0, squares, 1.0)
    return factor * side.last.coordinates, torch.addcmul(queries, factor, last, value=-1)
