"""Settings and data that make no sense."""

from __future__ import annotations

import pytest
import torch
from simulated import X, Y

from torch_depthmup.diagnostics.nfd import Setting, simulate
from torch_depthmup.errors import DepthMuPError


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": 0}, "depth must be a whole number of at least 1"),
        ({"depth": 2.5}, "depth must be a whole number"),
        ({"width": 0}, "width must be a positive"),
        ({"steps": -1}, "steps must be"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"activation": "gelo"}, "no activation is called 'gelo'"),
        ({"rule": "deep"}, "no rule is called"),
        ({"block_layers": 3}, "block_layers"),
        ({"loss": "hinge"}, "loss must be"),
        ({"loss": "cross_entropy"}, "class indices"),
        ({"seeds": []}, "at least one integer"),
        ({"batch_size": 0}, "batch_size"),
        ({"width": 20}, r"with 21 vectors.*smallest width is 22"),
        ({"width": 10**9}, "GB"),
        ({"coupling": "reuse"}, "coupling must be one of 'reused', 'decoupled'"),
        ({"dtype": torch.bfloat16}, "dtype must be torch.float32 or torch.float64"),
        ({"held_out": torch.zeros(2, 3)}, r"held_out must be finite, of shape \(points, 10\)"),
    ],
)
def test_bad_arguments_are_refused(change, message: str) -> None:
    with pytest.raises(DepthMuPError, match=message):
        own = {name: value for name, value in change.items() if name not in Setting.__annotations__}
        setting = {"depth": 2, "steps": 3, "lr": 1.0} | {n: v for n, v in change.items() if n not in own}
        simulate(Setting(**setting), X, Y, **{"width": 300, **own})


@pytest.mark.parametrize(
    "inputs, targets, message",
    [
        (X[0], Y, "shape"),
        (X, Y[:2], "3 inputs and 2 targets"),
        (X * float("inf"), Y, "not all finite"),
        (X, Y * float("nan"), "not all finite"),
    ],
)
def test_bad_data_is_refused(inputs: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(DepthMuPError, match=message):
        simulate(Setting(depth=2, steps=1, lr=1.0), inputs, targets, width=300)
