"""Initializations that shrink branches with depth are told from those that do not, by their weights."""

from __future__ import annotations

import math
import warnings

import blocks
import pytest
import torch
from torch import nn

import torch_depthmup as dm
from torch_depthmup.scaling.initialization import depth_exponent
from torch_depthmup.scaling.plan import Stream

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def stack(depth: int, power: float = 0.0, width: int = 16, block: type[nn.Module] = blocks.PreNorm) -> nn.Module:
    model = blocks.Stack(depth, block, width)
    with torch.no_grad():
        for inside in model.blocks:
            inside.fc2.weight.mul_(depth**power)
    return model


@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_an_initialization_that_divides_by_the_root_of_depth_warns(how: str) -> None:
    with pytest.warns(
        UserWarning, match=r"blocks\.0\.fc2\.weight: .* as depth\^-0\.\d+ .*depth-mup-corrected's multiplier 0\.5 comes"
    ) as seen:
        dm.parametrize(stack(32, -0.5), base=stack(8, -0.5), example_inputs=X, how=how)
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize(
    "model, base, rule",
    [
        (stack(32), stack(8), "depth-mup-corrected"),
        (stack(32, width=64), stack(4, width=16), "depth-mup-corrected"),
        (stack(32, -0.5), stack(8, -0.5), "mup"),  # nothing comes on top
        (stack(8, -0.5), stack(8, -0.5), "depth-mup-corrected"),
        (stack(32, block=blocks.LayerScale), stack(8, block=blocks.LayerScale), "complete-p"),
    ],
)
def test_other_initializations_do_not(model: nn.Module, base: nn.Module, rule: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dm.parametrize(model, base=base, example_inputs=X, rule=rule)


class Mixed(nn.Module):
    """One large and many small carriers: their proportion changes with depth, their sizes do not."""

    def __init__(self, depth: int):
        super().__init__()
        self.stem, self.inner = nn.Linear(8, 24), nn.ModuleList(nn.Linear(24, 24) for _ in range(depth))
        self.large, self.small = nn.Linear(24, 24), nn.ModuleList(nn.Linear(24, 24) for _ in range(depth - 1))
        nn.init.normal_(self.large.weight, std=0.2)
        for layer in self.small:
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for inner, outer in zip(self.inner, (self.large, *self.small), strict=True):
            x = x + outer(torch.relu(inner(x)))
        return x


def test_kinds_of_carriers_are_compared_with_their_own() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dm.parametrize(Mixed(8), base=Mixed(2), example_inputs=X)


def test_gpt2_warns() -> None:
    import transformers  # not before conftest has made torchvision importable

    def gpt2(layers: int) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers, **sizes))

    with pytest.warns(UserWarning, match=r"transformer\.h\.0\.attn\.c_proj\.weight: .* as depth\^-0\.5"):
        dm.parametrize(gpt2(8), base=gpt2(2), example_inputs=torch.randint(40, (2, 8)))


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.0, 0.5])
def test_the_exponent_is_that_of_the_weights_at_any_width(power: float) -> None:
    torch.manual_seed(0)
    groups = [
        [torch.randn(n, n) / math.sqrt(n) * depth**power for _ in range(depth)] for depth, n in ((32, 64), (8, 32))
    ]
    assert depth_exponent(*groups, Stream(32, 4)) == pytest.approx(power, abs=0.02)


def test_what_starts_at_zero_or_has_too_few_values_has_no_exponent() -> None:
    zero, one, meta = torch.zeros(3), torch.ones(3), torch.ones(3, device="meta")
    few, many = torch.randn(4, 4), torch.randn(32, 32)
    assert not math.isnan(depth_exponent([many], [few], Stream(64, 32)))  # over a long way a few will do
    for groups in (([zero], [one]), ([one], [zero]), ([meta], [one]), ([], [one]), ([many], [few]), ([few], [many])):
        assert math.isnan(depth_exponent(*groups, Stream(4, 2)))
