"""Layers beside the stream that serve one block, as a diffusion transformer's adaptive norms and gates do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm

WIDTH, CLASSES = 16, 5
STREAM = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
TIME = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
LABEL = torch.tensor([0, 3, 1, 4])


def layers(given: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, given))


class Conditioned(nn.Module):
    """Two branches, whose shifts, scales and gates one layer makes of the condition."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.mix, self.mlp = kind, layers(), layers()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        if kind == "table":
            self.adapt = nn.Embedding(CLASSES, 6 * WIDTH)
        elif kind == "embeds time anew":
            self.adapt = nn.Sequential(nn.Linear(3, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        elif kind == "parameter":
            self.adapt = nn.Parameter(torch.randn(WIDTH, 6, WIDTH) / math.sqrt(WIDTH))
        else:
            self.adapt = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        if self.kind == "parameter":
            made = torch.einsum("bi,ijo->bjo", condition, self.adapt).unbind(1)
        else:
            made = self.adapt(condition).chunk(6, -1)
        shift, scale, gate, shift2, scale2, gate2 = (part[:, None] for part in made)
        h = h + gate * self.mix(self.norm(h) * (1 + scale) + shift).cumsum(1) / 3
        return h + gate2 * self.mlp(self.norm(h) * (1 + scale2) + shift2)


class Diffusion(nn.Module):
    """Blocks on one condition; with ``stages`` one layer for several blocks adapts it once more."""

    def __init__(self, depth: int, kind: str = "chunks", stages: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.stem, self.time = kind, nn.Linear(3, WIDTH), nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Conditioned(kind) for _ in range(depth))
        self.stages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(stages))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        h, condition = self.stem(x), self.time(time)
        if self.kind in ("table", "embeds time anew"):
            condition = label if self.kind == "table" else time
        of_stages = [stage(condition) for stage in self.stages] or [condition]
        for i, block in enumerate(self.blocks):
            h = block(h, of_stages[i * len(of_stages) // len(self.blocks)])
        return self.head(h)


class Joint(nn.Module):
    """Joint attention of two streams, each adapted by a layer of its own; the last block only reads the second."""

    def __init__(self, is_last: bool):
        super().__init__()
        self.is_last, self.norm = is_last, nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.adapt, self.adapt_text = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(WIDTH, 5 * WIDTH)
        self.qkv, self.qkv_text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.mlp = nn.Linear(WIDTH, WIDTH), layers()
        if not is_last:
            self.out_text, self.mlp_text = nn.Linear(WIDTH, WIDTH), layers()

    def forward(self, h: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate, shift2, gate2 = self.adapt(condition)[:, None].chunk(5, -1)
        t_shift, t_scale, t_gate, t_shift2, t_gate2 = self.adapt_text(condition)[:, None].chunk(5, -1)
        x, x_text = self.norm(h) * (1 + scale) + shift, self.norm(text) * (1 + t_scale) + t_shift
        q, k, v = torch.cat((self.qkv(x), self.qkv_text(x_text)), 1).chunk(3, -1)
        mixed, mixed_text = F.scaled_dot_product_attention(q, k, v).split([h.shape[1], text.shape[1]], 1)
        h = h + gate * self.out(mixed)
        h = h + gate2 * self.mlp(self.norm(h) + shift2)
        if not self.is_last:
            text = text + t_gate * self.out_text(mixed_text)
            text = text + t_gate2 * self.mlp_text(self.norm(text) + t_shift2)
        return h, text


class TwoStreams(nn.Module):
    def __init__(self, depth: int, *, reads_last: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.words, self.time = nn.Linear(3, WIDTH), nn.Embedding(CLASSES, WIDTH), nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Joint(reads_last and i == depth - 1) for i in range(depth))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        h, text, condition = self.stem(x), self.words(label)[:, None].expand(-1, 3, -1), self.time(time)
        for block in self.blocks:
            h, text = block(h, text, condition)
        return self.head(h) if self.blocks[-1].is_last else self.head(h) + self.head(text).mean(1, keepdim=True)


INPUTS = (STREAM, TIME, LABEL)


@pytest.mark.parametrize("kind", ["chunks", "table", "embeds time anew", "parameter"])
def test_what_conditions_one_block_is_trained_as_the_inner_layers_of_its_branches_are(kind):
    plan = dm.plan(Diffusion(8, kind), base=Diffusion(2, kind), example_inputs=INPUTS)
    adapting = [name for name in plan.parameters if ".adapt" in name]
    assert {(plan[name].role, plan[name].depth_multiplier) for name in adapting} == {("inner", 4.0)}
    assert len(plan.branches) == 16
    assert plan["time.weight"].role == "outside"


def test_without_a_base_it_is_no_hidden_branch_either():
    assert dm.plan(Diffusion(8), depth_multiplier=4, example_inputs=INPUTS)["blocks.3.adapt.1.bias"].role == "inner"


def test_what_conditions_a_stage_of_several_blocks_stays_outside():
    plan = dm.plan(Diffusion(8, stages=2), base=Diffusion(4, stages=2), example_inputs=INPUTS)
    assert {plan[f"stages.{i}.weight"].role for i in range(2)} == {"outside"}


@pytest.mark.parametrize("reads_last", [False, True])
def test_joint_attention_of_two_streams_that_are_each_adapted(reads_last):
    model, base = (TwoStreams(depth, reads_last=reads_last) for depth in (8, 2))
    plan = dm.parametrize(model, base=base, example_inputs=INPUTS)
    sides = {name: entry.role for name, entry in plan.parameters.items() if name.startswith("blocks.5.")}
    outer = {name for name in sides if ".out" in name or name.endswith((".2.weight", ".2.bias"))}
    assert {name for name, role in sides.items() if role == "outer"} == outer
    assert set(sides.values()) == {"inner", "outer"}
    image, text = (16, 4.0), (16, 4.0) if not reads_last else (14, 7.0)
    assert [(s.additions, s.depth_multiplier) for s in plan.streams] == [image, text]
    assert plan["blocks.5.qkv_text.weight"].depth_multiplier == 4.0  # that of the longer stream, which it serves too


@pytest.mark.parametrize("rule", ["depth-mup", "complete-p"])
def test_training_what_conditions_each_block_moves_the_function_alike_at_every_depth(rule):
    moved = []
    for depth in (4, 16, 64):
        model = Diffusion(depth)
        dm.parametrize(model, base=Diffusion(4), example_inputs=INPUTS, rule=rule)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".adapt" in name)
        optimizer = dm.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        before = model(*INPUTS)
        before.square().mean().backward()
        optimizer.step()
        moved.append(float((model(*INPUTS) - before).detach().norm()))
    slope = math.log(moved[-1] / moved[0]) / math.log(16)
    assert abs(slope) < 0.2  # with the rates of what is outside it would be 1/2
