"""Products of a Gaussian matrix that is never formed: exact identities, and the law of a dense one."""

from __future__ import annotations

import math

import pytest
import torch
from formed import Start
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_depthmup.diagnostics.nfd.gaussian import Noise


@given(
    st.lists(st.tuples(st.sampled_from(["right", "left"]), st.integers(1, 3)), min_size=2, max_size=8),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 5),
    st.booleans(),
)
@settings(max_examples=60)
def test_left_and_right_products_are_adjoint(calls, dtype: torch.dtype, seed: int, repeat: bool) -> None:
    noise = Noise([seed, seed + 1], dtype=dtype)
    matrix = Start(64, 48, noise, std=1 / 8)  # 64 rows, 48 columns
    size = {"right": 48, "left": 64}
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"right": [], "left": []}
    for side, count in calls:
        queries = noise(count, size[side])
        if repeat and seen[side]:  # a query in the span of earlier ones, and one almost in it
            queries[:, 0] = 2 * seen[side][-1][0][:, 0]
        seen[side].append((queries, getattr(matrix, side)(queries)))
    tolerance = 64 * 200 * torch.finfo(dtype).eps
    for q, wq in seen["right"]:
        for p, wtp in seen["left"]:
            assert float((torch.bmm(p, wq.mT) - torch.bmm(wtp, q.mT)).abs().max()) < tolerance


@given(st.sampled_from(["reused", "decoupled"]), st.integers(0, 9))
@settings(max_examples=20)
def test_products_are_linear(coupling, seed: int) -> None:
    noise = Noise([seed], dtype=torch.float64)
    matrix = Start(50, 40, noise, std=0.2, coupling=coupling)
    a, b = noise(2, 40), noise(2, 40)
    matrix.left(noise(2, 50))
    wa, wb = matrix.right(a), matrix.right(b)
    torch.testing.assert_close(matrix.right(3 * a - b), 3 * wa - wb)


def test_the_law_is_that_of_a_dense_matrix() -> None:
    """A query chain q, W q, W^T W q, W W^T W q: second moments over many draws against dense matrices."""
    n, draws = 24, 4000

    def chain(right, left, q):
        a = right(q)
        b = left(a)
        c = right(b)
        return torch.cat([q, a, b, c], dim=1)

    q = torch.randn(1, 1, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(draws, 1, n)
    matrix = Start(n, n, Noise(range(draws), dtype=torch.float64), std=n**-0.5)
    ours = chain(lambda x: matrix.right(x), lambda x: matrix.left(x), q)
    dense = torch.randn(draws, n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / math.sqrt(n)
    theirs = chain(lambda x: x @ dense.mT, lambda x: x @ dense, q)
    for x in (ours, theirs):
        assert x.shape == (draws, 4, n)
    grams = [torch.bmm(x, x.mT) / n for x in (ours, theirs)]
    error = torch.stack([gram.std(0) for gram in grams]).square().sum(0).sqrt() / math.sqrt(draws)
    difference = (grams[0].mean(0) - grams[1].mean(0)).abs()
    assert bool((difference <= 4.5 * error + 1e-12).all())
    # and the exact mean of |W q|^2 / n
    assert float(grams[0][:, 1, 1].mean()) == pytest.approx(float(q[0].square().mean()), rel=0.03)


def test_decoupled_left_products_know_nothing_of_the_right_ones() -> None:
    noise = Noise(range(3000), dtype=torch.float64)
    q = noise(1, 16)
    values = {}
    for coupling in ("reused", "decoupled"):
        matrix = Start(16, 16, Noise(range(9000, 12000), dtype=torch.float64), std=0.25, coupling=coupling)
        a = matrix.right(q)
        values[coupling] = torch.bmm(matrix.left(a), q.mT).flatten() / 16
    assert float(values["reused"].mean()) == pytest.approx(1.0, abs=0.05)  # <W^T W q, q> = |W q|^2
    assert abs(float(values["decoupled"].mean())) < 4 * float(values["decoupled"].std()) / math.sqrt(3000)


def test_a_seeds_numbers_do_not_depend_on_its_neighbours() -> None:
    alone, together = Noise([5], dtype=torch.float32), Noise([3, 5], dtype=torch.float32)
    assert torch.equal(alone(2, 4)[0], together(2, 4)[1])


@pytest.mark.parametrize("speed", [1e-3, 1e-1, 1.0])
def test_queries_that_move_slowly_stay_exact(speed: float) -> None:
    """Features of successive training steps: what is new in them is small beside what is known."""
    noise = Noise([0, 1], dtype=torch.float32)
    matrix = Start(400, 500, noise, std=1 / 20)
    q, p, rights, lefts = noise(4, 500), noise(4, 400), [], []
    for _ in range(20):
        rights.append((q, matrix.right(q)))
        lefts.append((p, matrix.left(p)))
        q, p = q + speed * noise(4, 500), p + speed * noise(4, 400)
    for side in (matrix.right_side, matrix.left_side):
        gram = torch.bmm(side.queries, side.queries.mT)
        assert float((gram - torch.eye(side.count)).abs().max()) < 1e-4
    ours, theirs = (torch.cat(x, 1) for x in (list(zip(*rights, strict=True))[1], list(zip(*lefts, strict=True))[0]))
    other = torch.cat([value for _, value in lefts], 1)
    assert (
        float((torch.bmm(theirs, ours.mT) - torch.bmm(other, torch.cat([x for x, _ in rights], 1).mT)).abs().max())
        < 0.02 * (1 + speed) ** 2
    )


def test_a_query_overwritten_in_place_is_not_taken_for_the_last_one() -> None:
    matrix = Start(30, 40, Noise([0], dtype=torch.float64), std=1.0)
    q = torch.randn(1, 2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, start = matrix.right(q), q.clone()
    q.add_(q.flip(1))
    torch.testing.assert_close(matrix.right(q), before + before.flip(1))
    torch.testing.assert_close(matrix.right(start), before)


def test_rows_of_which_most_hold_nothing_new_are_multiplied_in_single_precision() -> None:
    """As zero rows of their Gram matrix these made LAPACK fail one time in fifteen: nan, or an error."""
    for seed in range(100):
        noise = Noise([seed], dtype=torch.float32)
        rows = noise(64, 200)
        old = torch.rand(64, generator=torch.Generator().manual_seed(seed)) < 0.75
        matrix = Start(8, 200, noise, std=0.1)
        matrix.right(rows[:, old])
        assert bool(matrix.right(rows).isfinite().all())


@pytest.mark.parametrize("new", [1e-1, 1e-3, 3e-5, 1e-6])
def test_rows_with_little_new_in_them_leave_orthonormal_bases_and_adjoint_products(new: float) -> None:
    noise = Noise([0, 1], dtype=torch.float32)
    matrix = Start(300, 400, noise, std=0.05)
    first, left = noise(40, 400), noise(30, 300)
    alike = torch.bmm(noise(40, 3), noise(3, 400)) + 0.03 * noise(40, 400)  # that little is of nearly low rank
    second = torch.bmm(noise(40, 40), first) / 6 + new * alike
    asked = [(q, matrix.right(q)) for q in (first, second)]
    back = matrix.left(left)
    queries = matrix.right_side.queries.double()
    gram = torch.bmm(queries, queries.mT)
    lengths = gram.diagonal(dim1=1, dim2=2)
    assert float((gram - torch.diag_embed((lengths > 0.5).double())).abs().max()) < 3e-6
    for q, answer in asked:
        torch.testing.assert_close(torch.bmm(left, answer.mT), torch.bmm(back, q.mT), rtol=0, atol=2e-3)
