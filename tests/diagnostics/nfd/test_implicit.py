"""A weight that is never formed, against the dense matrix of the same values."""

from __future__ import annotations

import pytest
import torch
from formed import COLUMNS, ROWS, entries, implicit
from torch import nn
from torch.nn import functional as F

from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight
from torch_depthmup.errors import DepthMuPError

X, BIAS = torch.randn(2, 3, COLUMNS, dtype=torch.float64), torch.randn(ROWS, dtype=torch.float64)
P = torch.randn(2, 3, ROWS, dtype=torch.float64)

PRODUCTS = {
    "linear": (X, lambda x, w: F.linear(x, w, BIAS)),
    "linear without bias": (X, lambda x, w: F.linear(x, w)),
    "linear of one vector": (X[0, 0], lambda x, w: F.linear(x, w, BIAS)),
    "matmul": (X, lambda x, w: x @ w.T),
    "matmul from the left": (X[0], lambda x, w: (w @ x.T).T),
    "the transpose": (P, lambda x, w: torch.matmul(x, w)),
    "addmm as in Conv1D": (P[0], lambda x, w: torch.addmm(BIAS[:COLUMNS], x, w)),
    "einsum": (X, lambda x, w: torch.einsum("btd,ed->ebt", x, w)),
    "einsum, weight first": (P, lambda x, w: torch.einsum("ed,bte->btd", w, x)),
    "a factor": (X, lambda x, w: F.linear(x, 2 * w / 3)),
    "used twice": (X, lambda x, w: F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, w)), w.T)), w)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_gradients_are_those_of_the_entries(name: str) -> None:
    x, product = PRODUCTS[name]
    weight = implicit()
    dense = entries(weight).requires_grad_()
    results = []
    for matrix in (weight, dense):
        leaf = x.clone().requires_grad_()
        value = product(leaf, matrix)
        gradients = torch.autograd.grad(value.sin().sum(), (leaf, matrix))
        results.append((value, gradients[0], gradients[1]))
    (value, to_input, to_weight), wanted = results
    assert isinstance(to_weight, ImplicitWeight)
    torch.testing.assert_close(value, wanted[0])
    torch.testing.assert_close(to_input, wanted[1])
    torch.testing.assert_close(entries(to_weight), wanted[2])


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3},
     {"weight_decay": 0.1, "momentum": 0.5}, {"maximize": True}],
    ids=str,
)  # fmt: skip
def test_sgd_trains_it_like_the_entries(options: dict) -> None:
    weight = implicit()
    dense = nn.Parameter(entries(weight))
    for matrix in (weight, dense):
        optimizer = torch.optim.SGD([matrix], lr=0.1, **options)
        for step in range(4):
            optimizer.zero_grad()
            F.linear(X[0] + step, matrix).tanh().sum().backward()
            optimizer.step()
    torch.testing.assert_close(entries(weight), dense.detach())


def test_a_query_that_was_overwritten_is_asked_anew() -> None:
    weight = implicit()
    dense = entries(weight)
    x = X[0].clone()
    with torch.no_grad():
        F.linear(x, weight)
        x.add_(1)
        torch.testing.assert_close(F.linear(x, weight), x @ dense.T)


@pytest.mark.parametrize(
    "use, operation",
    [
        (lambda w: torch.softmax(w, -1), "softmax"),
        (lambda w: w[0], "select"),
        (lambda w: w.abs().mean(), "abs"),
        (lambda w: w + torch.ones(ROWS, COLUMNS), "add"),
        (lambda w: w.T @ w, "mm"),
        (lambda w: torch.einsum("bed,ed->b", P[:, :, None] * X[:, :, :, None][:, :, :1], w), "einsum"),
    ],
)
def test_what_needs_entries_is_refused_by_name(use, operation: str) -> None:
    with pytest.raises(DepthMuPError, match=f"block.weight.*{operation}"):
        use(implicit())
