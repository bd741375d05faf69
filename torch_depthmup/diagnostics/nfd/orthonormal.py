"""Orthonormal directions of rows: what a basis holds of them already, and which directions are new in them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["directions", "eigen", "padded", "split", "total"]

MOSTLY_NEW = 0.1  # share of a query off the basis above which one Gram-Schmidt pass is as good as ten times rounding


def padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros to that size."""
    if values.shape[1:] == (rows, columns):
        return values
    return F.pad(values, (0, columns - values.shape[2], 0, rows - values.shape[1]))


def total(one: Tensor, other: Tensor) -> Tensor:
    """The sum of coordinates, of which the second ones may go on."""
    return padded(one, one.shape[1], other.shape[2]) + other


def split(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Coordinates along an orthonormal basis, the remainder, and whether rounding left little of the basis in it."""
    if not basis.shape[1]:
        return rows.new_zeros(*rows.shape[:2], 0), rows, True
    along = torch.bmm(rows, basis.mT)
    remainder = torch.baddbmm(rows, along, basis, alpha=-1)
    left = torch.linalg.vector_norm(remainder, dim=2) >= MOSTLY_NEW * torch.linalg.vector_norm(rows, dim=2)
    return along, remainder, bool(left.all())


def eigen(gram: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and vectors of a Gram matrix of which some rows are zero: these come first, with -1.

    Left at zero they make LAPACK fail in single precision, one time in twenty: it gives nan, or says so.
    """
    values, vectors = torch.linalg.eigh(gram.double() - torch.diag_embed((~live).double()))
    return values.to(gram.dtype), vectors.to(gram.dtype)


def directions(
    units: Tensor, live: Tensor, values: Tensor, vectors: Tensor, kept: Tensor, old: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orthonormal directions of rows, from the eigenvalues of their Gram matrix that are kept; the rows along them.

    An eigenvector's sign is rounding, and what a seed draws must not hang on it: G^{-1/2} where all live rows are kept,
    or else a sign by convention. Nor must it hang on other seeds: where one has fewer directions it gets zero rows, and
    the last thing given says which are none. What rounding left of an old basis is taken out once more, and given
    third, by coordinates along it.
    """
    whole = kept.sum(1) == live.sum(1)
    uneven = live.cumsum(1).to(units.dtype).sqrt()
    vectors = vectors * torch.where((uneven[:, :, None] * vectors).sum(1, keepdim=True) < 0, -1.0, 1.0)
    roots = torch.where(kept, values, 1.0).sqrt()[:, None]
    turned, back = vectors * (kept[:, None] / roots), vectors * (kept[:, None] * roots)
    if bool(whole.any()):
        turned, back = (torch.where(whole[:, None, None], torch.bmm(x, vectors.mT), x) for x in (turned, back))
    some = torch.where(whole[:, None], live, kept)
    used = some.any(0)
    turned, back, some = turned[:, :, used], back[:, :, used], some[:, used]
    along, basis, _ = split(torch.bmm(turned.mT, units), old)
    # One step of Newton's iteration towards the nearest orthonormal rows: (3 - G) / 2, which also maps 0 to 0.
    gram = torch.bmm(basis, basis.mT)
    found = torch.baddbmm(basis, gram, basis, beta=1.5, alpha=-0.5)
    new = torch.bmm(back, torch.baddbmm(gram, gram, gram, beta=1.5, alpha=-0.5))
    return found, new, torch.bmm(back, along), some
