"""The plain training loop."""

from __future__ import annotations

import pytest
from sweeps import X
from torch import nn

import torch_depthmup as dm
from torch_depthmup.diagnostics.shared.training import Training
from torch_depthmup.errors import MeasurementError


@pytest.mark.parametrize("change", [{"optimizer": "lion"}, {"steps": 0}, {"batch_size": 2.5}])
def test_a_training_that_cannot_be_is_refused(change) -> None:
    with pytest.raises(dm.DepthMuPError, match=f"{next(iter(change))}.*not"):
        Training(X, X, **change)


def test_a_model_that_is_frozen_is_one_clear_line() -> None:
    model = nn.Linear(X.shape[1], 1).requires_grad_(False)
    dm.parametrize(model, rule="sp")
    with pytest.raises(MeasurementError, match="every parameter of Linear is frozen"):
        Training(X, X[:, :1], steps=1)(model, 0.1, 0)
