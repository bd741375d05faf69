"""What every test shares: libraries that import on CPU-only machines, no downloads, one seed."""

from __future__ import annotations

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download fails at once instead
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
import torchvision_shim  # noqa: F401  before anything that imports torchvision
from hypothesis import settings
from optimizers import model  # noqa: F401  a fixture of every test of optimizers

settings.register_profile("house", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("house"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "house")

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Every test starts from the same random state, alone or in the whole suite."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
