"""What is handed to the instruments: taken in every usual form, refused in one line otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from torch_depthmup.diagnostics.shared.arguments import checked_samples, positive_integers, positive_numbers, seeds_of
from torch_depthmup.errors import DepthMuPError


@pytest.mark.parametrize("values", [[8, 2, 2, 4], (2, 4, 8), 2 ** np.arange(1, 4), {2, 4, 8}, iter([4, 2, 8])])
def test_integers_come_in_any_form_and_leave_in_order(values) -> None:
    found = positive_integers("depths", values)
    assert found == [2, 4, 8] and all(type(value) is int for value in found)


@pytest.mark.parametrize("values, wanted", [([0.5, 0.1, 0.5], [0.5, 0.1]), (np.array([2, 1]), [2.0, 1.0])])
def test_numbers_keep_their_order(values, wanted: list[float]) -> None:
    assert positive_numbers("lrs", values) == wanted


@pytest.mark.parametrize(
    "seeds, wanted", [(3, [0, 1, 2]), (np.int64(2), [0, 1]), ([5, 0, 5], [5, 0]), (np.array([7]), [7])]
)
def test_seeds_are_counted_or_named(seeds, wanted: list[int]) -> None:
    found = seeds_of(seeds)
    assert found == wanted and all(type(seed) is int for seed in found)


X, Y = torch.zeros(4, 2), torch.zeros(4)


@pytest.mark.parametrize(
    "inputs",
    [X, (X, Y), {"a": X, "b": [Y]}, {"a": X, "scale": torch.tensor(1.0)}],
    ids=["tensor", "tuple", "nested", "scalar beside"],
)
def test_samples_may_be_a_tensor_or_hold_several(inputs) -> None:
    assert checked_samples((inputs, Y)) == (inputs, Y)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: positive_integers("depths", 4), "depths must be a list of positive integers, not 4"),
        (lambda: positive_integers("depths", [1, 0]), "depths must be positive integers, not [1, 0]"),
        (lambda: positive_integers("depths", [True]), "depths must be positive integers"),
        (lambda: positive_integers("depths", "ab"), "depths must be positive integers, not 'ab'"),
        (lambda: positive_integers("depths", []), "depths must hold at least one value"),
        (lambda: positive_integers("depths", [4, 4], 2), "depths must hold at least two different values"),
        (lambda: positive_numbers("lrs", [0.1, math.inf]), "lrs must hold positive numbers"),
        (lambda: positive_numbers("lrs", 0.1), "lrs must hold positive numbers"),
        (lambda: seeds_of(0), "seeds must be how many or which"),
        (lambda: seeds_of(2.5), "seeds must be how many or which, at least one integer, not 2.5"),
        (lambda: seeds_of("ab"), "seeds must be how many or which"),
        (
            lambda: checked_samples((X,)),
            "data must be a pair (inputs, targets) with a tensor of targets, not a tuple of 1",
        ),
        (lambda: checked_samples((X, 3)), "with a tensor of targets"),
        (lambda: checked_samples(({}, Y)), "the inputs hold no tensor"),
        (lambda: checked_samples((X[:0], Y[:0])), "there are no samples in it"),
        (
            lambda: checked_samples((X, Y[:3]), "net:data"),
            "net:data: inputs and targets must have equally many samples",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(act: Callable[[], object], message: str) -> None:
    with pytest.raises(DepthMuPError) as caught:
        act()
    assert message in str(caught.value) and "\n" not in str(caught.value)
