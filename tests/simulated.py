"""Inputs, rules and options that tests of the simulation share."""

from __future__ import annotations

import math

import torch

GENERATOR = torch.Generator().manual_seed(0)
X = torch.nn.functional.normalize(torch.randn(3, 10, generator=GENERATOR)) * math.sqrt(10)
Y = torch.tensor([1.0, -1.0, 0.5])
RULES = ["depth-mup", "depth-mup-corrected", "complete-p", "mup"]
OPTIONS = {
    "readout, input, momentum": {"train_readout": True, "train_input": True, "momentum": 0.5},
    "mini-batches": {"batch_size": 2, "momentum": 0.9},
    "silu, horizon": {"activation": "silu", "horizon": 2.0},
}
