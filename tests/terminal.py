"""A user's module for the commands, and what they wrote."""

from __future__ import annotations

import pytest

MODULE = """
import math
import warnings
import torch
from torch import nn
from torch_depthmup.diagnostics.shared.digits import DigitsResNet, digits

def make(depth, width=16):
    return DigitsResNet(depth, width)

def needs_width(depth, width):
    return DigitsResNet(depth, width)

def depth_only(depth):
    return DigitsResNet(depth, 16)

def data():
    inputs, targets = digits()
    return inputs[:256], targets[:256]

PAIR = data()

class Block(nn.Module):  # its norms stand beside the branches
    def __init__(self):
        super().__init__()
        self.before_attention, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.before_feed_forward, self.feed_forward = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def forward(self, x):
        n = self.before_attention(x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        return x + self.feed_forward(self.before_feed_forward(x))

class Transformer(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block() for _ in range(depth))), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks(x.unflatten(1, (8, 8))).mean(1))

def warning(depth):
    warnings.warn("this network is slow", UserWarning)
    return make(depth)

def always_two(depth):
    return DigitsResNet(2, 16)

def no_branches(depth):
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(depth)), nn.Linear(64, 10))

def a_list(depth):
    return [make(depth)]

def elsewhere(depth):
    return make(depth).to("meta")

def not_numbers():
    inputs, targets = data()
    return torch.full_like(inputs, math.nan), targets

def only_inputs():
    return data()[0]

def of_two_lengths():
    return data()[0][:10], data()[1]

def without_arguments():
    return make(2)

class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def speechless(depth):
    raise Speechless


def claims(depth):
    assert depth > 1000


def of_no_samples():
    return torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)


def leaves(depth):
    raise SystemExit(3)

def leaves_well(depth):
    raise SystemExit(0)

def raises_the_base(depth):
    raise BaseException("all of it")

class Mute(Exception):
    def __str__(self):
        raise ValueError

def mute(depth):
    raise Mute

def data_of_nobody():
    return {}["nobody"]

class Crooked(DigitsResNet):
    def forward(self, x):
        if self.training:
            raise RuntimeError("the shapes\\ndo not fit")
        return super().forward(x)

NUMBER = 3
"""


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command wrote to stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


CHECK = ("check", "--depths", "2", "4")
SWEEP = ("sweep", "--depths", "2", "4", "--lrs", "0.01", "--steps", "2", "--seeds", "1")
BRANCHES = ("branches", "--depth", "4")
PLAN = ("plan", "--depth", "4", "--base-depth", "2")
