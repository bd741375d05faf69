"""Width from a narrower base, against what ``mup.set_base_shapes`` does to the same model."""

from __future__ import annotations

import copy
import warnings

import mup
import pytest
import torch
from blocks import PreNorm
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm
from torch_depthmup.errors import PlanError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def net(depth: int, width: int, readout: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, width), *[PreNorm(width) for _ in range(depth)], readout(width, 3))


def test_a_narrow_base_gives_the_network_and_the_groups_of_mup() -> None:
    ours, theirs = net(3, 48, mup.MuReadout), net(3, 48, mup.MuReadout)
    mup.set_base_shapes(theirs, net(3, 16, mup.MuReadout), delta=net(3, 32, mup.MuReadout))
    plan = dm.parametrize(ours, base=net(3, 16, mup.MuReadout), example_inputs=X)
    assert {name: p.infshape for name, p in ours.named_parameters()} == {
        name: p.infshape for name, p in theirs.named_parameters()
    }
    torch.testing.assert_close(ours(X), theirs(X))
    reference = {id(p): g for g in mup.MuSGD(theirs.parameters(), lr=1.0).param_groups for p in g["params"]}
    for name, parameter in theirs.named_parameters():
        assert plan.multipliers(name, "sgd").lr == pytest.approx(reference[id(parameter)]["lr"])


def test_a_plain_linear_readout_computes_what_mureadout_computes() -> None:
    plain, readout = net(3, 48), net(3, 48, mup.MuReadout)
    for model in (plain, readout):
        base = net(3, 16, mup.MuReadout if model is readout else nn.Linear)
        dm.parametrize(model, base=base, example_inputs=X)
    torch.testing.assert_close(plain(X), readout(X))
    plan = dm.plan_of(plain)
    assert plan["4.weight"].folded == pytest.approx(1 / 3)
    assert plan.multipliers("4.weight", "sgd").lr == pytest.approx(1 / 3)  # 3 of mup, 1/9 of the fold
    assert plan.multipliers("4.weight", "adamw").lr == pytest.approx(1 / 3)


def test_one_base_sets_both_depth_and_width() -> None:
    plan = dm.parametrize(net(8, 64), base=net(2, 16), example_inputs=X)
    assert plan.streams[0].depth_multiplier == 4
    # Adam: inner 1 in depth and 1/4 in width; outer 1/2 of the rule, 1/2 of the fold, 1/4 of the width
    assert plan.multipliers("7.fc1.weight", "adamw").lr == pytest.approx(1 / 4)
    assert plan.multipliers("7.fc2.weight", "adamw").lr == pytest.approx(1 / 16)


def test_layers_around_the_blocks_are_matched_in_order() -> None:
    """In a Sequential the depth shifts the numbers behind the blocks: 0, 9 and 10 here are 0, 3 and 4 of the base."""

    def normed(depth: int, width: int) -> nn.Sequential:
        blocks = [PreNorm(width) for _ in range(depth)]
        return nn.Sequential(nn.Linear(8, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 3))

    plan = dm.parametrize(normed(8, 32), base=normed(2, 16), example_inputs=X)
    assert {plan[f"{i}.weight"].width.base for i in (0, 9)} == {(16, None), (16,)}
    assert plan["10.weight"].width.base == (None, 16) and plan["10.bias"].width.base == (None,)
    assert plan["8.fc1.weight"].width.base == (32, 16)


def test_base_shapes_that_are_there_are_kept() -> None:
    model = net(4, 48, mup.MuReadout)
    mup.set_base_shapes(model, net(4, 16, mup.MuReadout), delta=net(4, 32, mup.MuReadout))
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = dm.parametrize(model, base=net(1, 24, mup.MuReadout), example_inputs=X)
    assert plan["1.fc1.weight"].width.base == (32, 16)
    carriers = {name for b in plan.branches for name in b.carrier}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in carriers)


def test_the_plan_keeps_widths_that_attributes_lose() -> None:
    model = net(2, 48, mup.MuReadout)
    mup.set_base_shapes(model, net(2, 16, mup.MuReadout), delta=net(2, 32, mup.MuReadout))
    plan = dm.parametrize(model, rule="mup")
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict(), assign=True)
    assert not any(hasattr(p, "infshape") for p in copied.parameters())
    assert dm.plan_of(copied).multipliers("1.fc1.weight", "adam") == plan.multipliers("1.fc1.weight", "adam")


def test_lost_base_shapes_are_reported() -> None:
    model = net(2, 48, mup.MuReadout)
    mup.set_base_shapes(model, net(2, 16, mup.MuReadout), delta=net(2, 32, mup.MuReadout))
    model[1].fc1.weight = nn.Parameter(model[1].fc1.weight.detach().clone())
    with pytest.raises(PlanError, match=r"1.fc1.weight .* has no mup base shape"):
        dm.parametrize(model, rule="mup")


def test_undo_takes_width_back() -> None:
    model, before = net(4, 48), net(4, 48)
    dm.parametrize(model, base=net(2, 16), example_inputs=X)
    dm.undo(model)
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.4e-7, atol=0)
        assert not hasattr(ours, "infshape")


def test_a_readout_that_shares_the_embedding_is_multiplied_by_a_hook() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.embed, self.block = nn.Embedding(11, width), PreNorm(width)
            self.head = nn.Linear(width, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.block(self.embed(tokens)))

    tokens, multiplied = torch.tensor([[1, 2]]), Tied(32)
    plan = dm.parametrize(multiplied, base=Tied(16), example_inputs=tokens, rule="mup")
    assert [(hook.module, hook.multiplier) for hook in plan.hooks] == [("head", 0.5)]
    product = multiplied.block(multiplied.embed(tokens)) @ multiplied.embed.weight.T
    torch.testing.assert_close(multiplied(tokens), product / 2)
    assert plan.multipliers("embed.weight", "adam").lr == 1
    assert dm.parametrize(Tied(16), base=Tied(16), example_inputs=tokens).hooks == ()


def test_a_base_of_another_family_is_refused() -> None:
    model = net(4, 48)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(dm.DepthMuPError, match=r"0\.bias has no counterpart in the base"):
        base = net(4, 16)
        base[0] = nn.Linear(8, 16, bias=False)
        dm.parametrize(model, base=base, example_inputs=X)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_stages_are_matched_block_by_block() -> None:
    def bottlenecks(per_stage: int, width: int) -> nn.Module:
        from torchvision.models.resnet import Bottleneck, ResNet

        return ResNet(Bottleneck, [per_stage] * 4, num_classes=5, groups=1, width_per_group=width)

    inputs = torch.randn(2, 3, 32, 32)
    assert dm.parametrize(bottlenecks(3, 64), base=bottlenecks(1, 64), example_inputs=inputs)["fc.weight"].width is None
    plan = dm.parametrize(bottlenecks(3, 64), base=bottlenecks(2, 32), example_inputs=inputs)
    assert plan["layer1.2.conv2.weight"].width.base == (32, 32, None, None)
    assert plan["layer1.2.conv3.weight"].width.base == (None, 32, None, None)
    with pytest.raises(PlanError, match="one more block in this stage|no counterpart"):
        dm.parametrize(bottlenecks(3, 64), base=bottlenecks(1, 32), example_inputs=inputs)


def test_an_initialization_that_ignores_width_is_brought_to_the_base() -> None:
    model, base = net(2, 64), net(2, 16)
    for module in (*model.modules(), *base.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    plan = dm.parametrize(model, base=base, example_inputs=X)
    assert plan["1.fc1.weight"].scale == pytest.approx(0.5)  # 1 / sqrt(width_mult)
    assert plan["0.weight"].scale == 1 and plan["3.weight"].scale == pytest.approx(1 / 4)  # the readout's multiplier
    assert "0.5 takes its size to that of the base at width_mult 4" in plan.explain("1.fc1.weight")


class LearnedQueries(nn.Module):
    """Pools tokens with queries that are parameters, through heads of a fixed size."""

    def __init__(self, width: int, spelling: str):
        super().__init__()
        self.spelling, self.stem, self.queries = spelling, nn.Linear(5, width), nn.Parameter(torch.randn(3, width))
        self.norm, self.q, self.kv = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.norm(self.queries) if "norm" in self.spelling else self.queries
        q = self.q(queries).expand(len(x), -1, -1) if "late" not in self.spelling else self.q(queries)[None]
        k, v = self.kv(self.stem(x)).chunk(2, -1)
        heads = (2, -1) if "larger heads" in self.spelling else (-1, 4)
        q, k, v = (z.unflatten(-1, heads).transpose(1, 2) for z in (q, k, v))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        pooled = mixed.transpose(1, 2).flatten(2)
        return self.head(pooled + queries if "residual" in self.spelling else pooled)


@pytest.mark.parametrize("spelling", ["norm, residual", "norm", "late", "plain, residual", "residual, larger heads"])
def test_learned_queries_are_embeddings_and_not_readouts(spelling):
    model, base = LearnedQueries(64, spelling), LearnedQueries(16, spelling)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "1 attentions have heads of another size")
        plan = dm.plan(model, base=base, example_inputs=torch.randn(2, 7, 5), rule="mup")
    assert plan["queries"].width.kind == "vector" and plan["queries"].folded == 1.0
    assert plan["q.weight"].width.kind == "hidden"


class ComputedBias(nn.Module):
    """A fused projection whose bias is put together from parameters, as BEiT's, EVA's and Swin V2's."""

    def __init__(self, width: int, spelling: str):
        super().__init__()
        self.spelling, self.stem, self.qkv = spelling, nn.Linear(5, width), nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.stem(x), self.qkv.weight
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        made = {
            "linear": lambda: F.linear(h, w, bias),
            "addmm": lambda: torch.addmm(bias, h.flatten(0, 1), w.T).unflatten(0, h.shape[:2]),
            "convolution": lambda: F.conv1d(h.transpose(1, 2), w[..., None], 2 * bias).transpose(1, 2),
            "baddbmm": lambda: torch.baddbmm(bias.sin(), h, w.T.expand(len(h), -1, -1)),
        }[self.spelling]()
        q, k, v = made.chunk(3, -1)
        return self.head(self.out(torch.sigmoid(q) * k + v))


@pytest.mark.parametrize("spelling", ["linear", "addmm", "convolution", "baddbmm"])
def test_a_bias_that_is_computed_is_no_readout(spelling):
    pair = ComputedBias(32, spelling), ComputedBias(8, spelling)
    plan = dm.parametrize(pair[0], base=pair[1], example_inputs=torch.randn(2, 7, 5), rule="mup")
    assert {plan[name].width.kind for name in ("q_bias", "v_bias")} == {"vector"}
    assert plan["qkv.weight"].width.kind == "hidden" and plan["head.weight"].folded == pytest.approx(1 / 4)


NORMS = {
    "fused": lambda z: F.layer_norm(z, (3,)),
    "root mean square": lambda z: z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer norm": lambda z: (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, keepdim=True) + 1e-6),
    "cast": lambda z: (z.double() / z.double().square().mean(-1, keepdim=True).add(1e-6).sqrt()).to(z.dtype),
    "unit length": lambda z: F.normalize(z, dim=-1),
    "largest": lambda z: z / z.abs().amax(-1, keepdim=True).clamp_min(1e-6),
    "product with itself": lambda z: (z * z).mean(-1, keepdim=True).add(1e-6).pow(-0.5) * z,
    "none": lambda z: z * 0.5,
    "by another size": lambda z: z / (1 + z.square().mean(-1, keepdim=True)).exp(),
    "square": lambda z: z * z,
    "beside it": lambda z: z + z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6),
}


class Compressed(nn.Module):
    """A projection to a fixed size, a norm, and a projection back, as in multi-head latent attention."""

    def __init__(self, width: int, norm: str):
        super().__init__()
        self.norm, self.stem, self.head = norm, nn.Linear(5, width), nn.Linear(width, 2)
        self.down, self.up = nn.Linear(width, 3), nn.Linear(3, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(NORMS[self.norm](self.down(self.stem(x))))))


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_after_a_projection_to_a_fixed_size_is_seen_however_it_is_written(norm):
    plan = dm.plan(Compressed(32, norm), base=Compressed(8, norm), example_inputs=torch.randn(4, 5), rule="mup")
    is_norm = norm not in ("none", "by another size", "square", "beside it")
    assert plan["down.weight"].width.kind == ("hidden" if is_norm else "readout")
    assert plan["up.weight"].width.kind == "vector" and plan["head.weight"].width.kind == "readout"


@pytest.mark.parametrize("also", [lambda z: z, lambda z: z / 2], ids=["itself", "half of it"])
def test_a_value_that_the_model_returns_beside_its_norm_is_read_out(also):
    class Returning(Compressed):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.down(self.stem(x))
            return self.head(torch.tanh(self.up(NORMS["root mean square"](z)))), also(z)

    pair = (Returning(width, "") for width in (32, 8))
    plan = dm.plan(next(pair), base=next(pair), example_inputs=torch.randn(4, 5), rule="mup")
    assert plan["down.weight"].width.kind == "readout"
