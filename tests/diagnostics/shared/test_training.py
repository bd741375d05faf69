"""The plain training loop."""

from __future__ import annotations

import pytest
from sweeps import X

import torch_depthmup as dm
from torch_depthmup.diagnostics.shared.training import Training


@pytest.mark.parametrize("change", [{"optimizer": "lion"}, {"steps": 0}, {"batch_size": 2.5}])
def test_a_training_that_cannot_be_is_refused(change) -> None:
    with pytest.raises(dm.DepthMuPError, match=f"{next(iter(change))}.*not"):
        Training(X, X, **change)
