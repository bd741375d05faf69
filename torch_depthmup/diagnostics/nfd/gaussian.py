"""Products with a Gaussian matrix that is never formed, exact in law at any size.

A matrix W with standard normal entries is seen through products W q / sqrt(n) and W^T p / sqrt(n) only. Conditioning on
those seen so far gives the law of the next one: what lies in the span of earlier queries is known, the rest is fresh
noise, except along earlier queries of the transpose.

Source: Bolthausen's conditioning argument, as in approximate message passing and Tensor Programs (arXiv 2009.10685).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Coupling", "GaussianMatrix", "Noise"]

Coupling = Literal["reused", "decoupled"]


class Noise:
    """A stream of standard normal numbers for each seed, the same whatever seeds are simulated beside it.

    Args:
        seeds: one integer for each stream.
        device: where the numbers are made; ``None`` is the default device.
        dtype: of the numbers.
    """

    def __init__(self, seeds: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype):
        self.device = torch.device(device or "cpu")
        self.dtype = dtype
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def __call__(self, *shape: int) -> Tensor:
        """Numbers of shape (seeds, *shape)."""
        out = torch.empty(len(self.generators), *shape, device=self.device, dtype=self.dtype)
        for part, generator in zip(out, self.generators, strict=True):
            part.normal_(generator=generator)
        return out


class _Side:
    """Orthonormal queries from one side with their products, as rows: (seeds, queries, n)."""

    def __init__(self, capacity: int, width: int, noise: Noise):
        shape = len(noise.generators), capacity, width
        self.queries = torch.empty(shape, device=noise.device, dtype=noise.dtype)
        self.products = torch.empty(shape, device=noise.device, dtype=noise.dtype)
        self.count = 0

    @property
    def q(self) -> Tensor:
        return self.queries[:, : self.count]

    @property
    def r(self) -> Tensor:
        return self.products[:, : self.count]

    def append(self, queries: Tensor, products: Tensor) -> None:
        new = slice(self.count, self.count + queries.shape[1])
        self.queries[:, new], self.products[:, new] = queries, products
        self.count = new.stop


class GaussianMatrix:
    """A Gaussian n x n matrix W / sqrt(n), one for each seed, known by its products.

    Args:
        width: n.
        capacity: how many queries may be made from the right, and from the left; memory is taken for both.
        noise: where fresh randomness comes from.
        coupling: ``"reused"``: left products are those of the transpose, as in a network. ``"decoupled"``: of an
            independent matrix, as gradient independence assumes.

    Invariant (reused): <p, W q> = <W^T p, q> for all queries ever made, to rounding.
    """

    def __init__(self, width: int, capacity: tuple[int, int], noise: Noise, coupling: Coupling = "reused"):
        self.width, self.noise, self.coupling = width, noise, coupling
        self._right, self._left = (_Side(count, width, noise) for count in capacity)

    def right(self, queries: Tensor) -> Tensor:
        """W q / sqrt(n) for rows q: (seeds, queries, n) -> the same shape."""
        return self._product(queries, self._right, self._left)

    def left(self, queries: Tensor) -> Tensor:
        """W^T p / sqrt(n) for rows p: (seeds, queries, n) -> the same shape."""
        return self._product(queries, self._left, self._right)

    def _product(self, queries: Tensor, here: _Side, there: _Side) -> Tensor:
        known, remainder = _split(queries, here.q)
        fresh, triangle = _orthonormal(remainder, queries)
        products = self.noise(fresh.shape[1], self.width) / math.sqrt(self.width)
        if self.coupling == "reused" and there.count:
            # Along earlier queries p from the other side the product is known: <p, W q> = <W^T p, q>.
            wanted = torch.bmm(fresh, there.r.mT) - torch.bmm(products, there.q.mT)
            products = torch.baddbmm(products, wanted, there.q)
        result = torch.bmm(triangle, products)
        if here.count:
            result = torch.baddbmm(result, known, here.r)
        here.append(fresh, products)
        return result


def _split(queries: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients along an orthonormal basis, and the remainder; twice, since once leaves rounding behind."""
    first = torch.bmm(queries, basis.mT)
    remainder = torch.baddbmm(queries, first, basis, alpha=-1)
    second = torch.bmm(remainder, basis.mT)
    return first + second, torch.baddbmm(remainder, second, basis, alpha=-1)


def _orthonormal(remainder: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt over the rows, twice each: rows of the remainder = triangle @ basis.

    A direction that is numerically zero gets a zero row: it asks nothing, and what is known of it is rounding.
    """
    count = remainder.shape[1]
    basis = torch.zeros_like(remainder)
    triangle = remainder.new_zeros(remainder.shape[0], count, count)
    smallest = 100 * torch.finfo(remainder.dtype).eps * torch.linalg.vector_norm(queries, dim=2)
    for j in range(count):
        row = remainder[:, j : j + 1]
        if j:
            along, row = _split(row, basis[:, :j])
            triangle[:, j, :j] = along[:, 0]
        norm = torch.linalg.vector_norm(row[:, 0], dim=1)
        keep = norm > smallest[:, j]
        triangle[:, j, j] = torch.where(keep, norm, 0.0)
        basis[:, j] = torch.where(keep[:, None], row[:, 0] / norm.clamp_min(torch.finfo(row.dtype).tiny)[:, None], 0.0)
    return basis, triangle
