"""Weights that make several values: the rows of which no norm follows are told, however the values are taken apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_depthmup.tracing.graph import record
from torch_depthmup.tracing.operations import Kind
from torch_depthmup.tracing.parts import ranges_of
from torch_depthmup.tracing.uses import uses_of

WIDTH, RANK, KEYS = 6, 4, 2
X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
Pair = tuple[Tensor, Tensor]


def normed(z: Tensor) -> Tensor:
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)


def by_rows(x: Tensor, w: Tensor) -> Pair:
    return F.linear(x, w[:RANK]), F.linear(x, w[RANK:])


def in_heads(x: Tensor, w: Tensor) -> Pair:
    z = F.linear(x, w).view(3, 5, 3, 2).transpose(1, 2)
    return z[:, :2].transpose(1, 2).reshape(3, 5, RANK), z[:, 2]


def with_a_bias(x: Tensor, w: Tensor) -> Pair:
    z = F.linear(x, w) * 0.5 + 1
    return z[..., :RANK], z[..., RANK:]


def by_convolution(x: Tensor, w: Tensor) -> Pair:
    one, two = F.conv1d(x.mT, w[..., None]).split([RANK, KEYS], 1)
    return one.mT, two.mT


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "split": lambda x, w: torch.split(F.linear(x, w), [RANK, KEYS], -1),
    "slices": lambda x, w: (F.linear(x, w)[..., :RANK], F.linear(x, w)[..., -KEYS:]),
    "narrow": lambda x, w: ((x @ w.T).narrow(-1, 0, RANK), (x @ w.T).narrow(2, RANK, KEYS)),
    "einsum": lambda x, w: torch.einsum("btn,rn->btr", x, w).tensor_split([RANK], -1),
    "tokens last": lambda x, w: tuple(z.mT for z in (w @ x.mT).split([RANK, KEYS], 1)),
    "heads": in_heads,
    "a number and a bias": with_a_bias,
    "a convolution": by_convolution,
    "by rows of the weight": by_rows,
}


class Latent(nn.Module):
    """``split`` makes two values of x and a weight; a norm follows the first."""

    def __init__(self, split: Callable[[Tensor, Tensor], Pair], use: Callable[[Tensor, Tensor], object]):
        super().__init__()
        self.split, self.use, self.weight = split, use, nn.Parameter(torch.randn(RANK + KEYS, WIDTH))

    def forward(self, x: Tensor) -> object:
        return self.use(*self.split(x, self.weight))


def rows(split: Callable[[Tensor, Tensor], Pair], use: Callable[[Tensor, Tensor], object]) -> set[tuple]:
    """What the uses of the weight say, all together."""
    return {use.unnormalised.rows for use in uses_of(record(Latent(split, use), X))["weight"]}


def attended(latent: Tensor, keys: Tensor) -> Tensor:
    return normed(latent) @ torch.ones(RANK, 1) + torch.tanh(keys[..., 0::2] * 2 + keys[..., 1::2])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rows_that_no_norm_follows_are_told(spelling: str) -> None:
    told = rows(SPELLINGS[spelling], attended)
    together = {row for ranges in told for start, end in ranges for row in range(start, end)}
    assert together == {4, 5}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_norm_may_follow_the_last_rows(spelling: str) -> None:
    told = rows(SPELLINGS[spelling], lambda latent, keys: torch.tanh(latent).sum() + normed(keys))
    together = {row for ranges in told for start, end in ranges for row in range(start, end)}
    assert together == {0, 1, 2, 3}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_norms_may_follow_all_rows_or_none(spelling: str) -> None:
    assert rows(SPELLINGS[spelling], lambda latent, keys: normed(latent).sum() + normed(keys)) == {()}
    told = rows(SPELLINGS[spelling], lambda latent, keys: torch.tanh(latent).sum() + keys.sin())
    assert {row for ranges in told for start, end in ranges for row in range(start, end)} == set(range(6))


@pytest.mark.parametrize(
    "use",
    [
        lambda latent, keys: (attended(latent, keys), latent),
        lambda latent, keys: attended(latent, keys) + latent.sin().sum(),
        lambda latent, keys: normed(latent + latent.flip(-1).sin()) + keys.sum(),
    ],
    ids=["returned", "used beside", "mixed"],
)
def test_a_norm_beside_another_use_does_not_count(use: Callable[[Tensor, Tensor], object]) -> None:
    assert rows(SPELLINGS["split"], use) == {((0, 6),)}


def test_rows_are_told_of_columns_and_of_three_parts() -> None:
    def three(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        one, keys, two = (x @ w.T.contiguous()).chunk(3, -1)
        return torch.cat([normed(one), normed(two)], -1), keys

    assert rows(three, lambda latent, keys: latent.sum() + keys.exp()) == {((2, 4),)}


def test_what_mixes_entries_is_not_followed() -> None:
    def cumulated(x: Tensor, w: Tensor) -> Pair:
        return torch.split(F.linear(x, w).cumsum(-1), [RANK, KEYS], -1)

    assert rows(cumulated, attended) == {((0, 6),)}


def test_numbers_become_ranges() -> None:
    assert ranges_of([5, 1, 2, 8, 1, 6]) == ((1, 3), (5, 7), (8, 9)) and ranges_of([]) == ()


@pytest.mark.parametrize("stacked, summed, is_sum", [(0, -1, False), (0, 2, False), (-1, 2, True), (2, -1, True)])
def test_dimensions_that_are_counted_from_the_end_are_those_that_were_meant(stacked, summed, is_sum) -> None:
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.sin(), self.layer(x)], stacked).sum(summed)

    graph = record(Stacked(), torch.randn(4, 4, requires_grad=True))
    assert any(node.kind is Kind.ADD for node in graph.nodes) == is_sum


@pytest.mark.parametrize("last", [True, False])
def test_each_part_of_a_product_has_its_own_shape(last: bool) -> None:
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.weight = nn.Linear(5, 9), nn.Parameter(torch.randn(7, 2))

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.stem(x).split([2, 7] if last else [7, 2], -1)
            return (two if last else one) @ self.weight + (one if last else two)

    (use,) = uses_of(record(Parts(), torch.randn(3, 5)))["weight"]
    assert use.taken == (3, 7)
