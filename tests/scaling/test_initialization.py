"""Initial sizes beside those of a base: what is there already is seen, and what is missing is supplied."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import blocks
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_depthmup as dm
from torch_depthmup.scaling.initialization import default_bounds, forward_factor, initial_size, simplest

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """``x + factor * a(x)``, then ``x + f(x)``."""

    def __init__(self, width: int, factor: float):
        super().__init__()
        self.a, self.f, self.factor = branch(width), branch(width), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.factor * self.a(x)
        return x + self.f(x)


def branch(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def network(depth: int, width: int = 32, *, forward: float = 0.0, initial: float = 0.0, std: float = 0.0) -> nn.Module:
    """Last weights are initialized times depth ** initial, the first branch of a block is times depth ** forward."""
    torch.manual_seed(depth + width)
    body = [Branches(width, depth**forward) for _ in range(depth)]
    model = nn.Sequential(nn.Linear(8, width), *body, nn.Linear(width, 3))
    with torch.no_grad():
        for module in model.modules():
            if std and isinstance(module, nn.Linear):
                module.weight.normal_(0, std)
        for inside in body:
            for last in (inside.a[3], inside.f[3]):
                last.weight.mul_(depth**initial)
    return model


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("exponent", [-0.5, -1.0])
def test_a_factor_in_the_forward_pass_is_a_part_of_the_multiplier(how: str, exponent: float) -> None:
    plan = dm.parametrize(network(32, forward=exponent), base=network(4, forward=exponent), example_inputs=X, how=how)
    first, second = plan.planned_branches[:2]
    assert first.forward == pytest.approx(8**exponent) and first.supplied == pytest.approx(8 ** (-0.5 - exponent))
    assert second.forward == 1 and second.supplied == pytest.approx(8**-0.5)


@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_a_depth_factor_in_the_weights_is_not_applied_twice(how: str) -> None:
    model, base = network(32, initial=-0.5), network(4, initial=-0.5)
    before = model[1].f[3].weight.detach().clone()
    plan = dm.parametrize(model, base=base, example_inputs=X, how=how)
    there = {branch.initial for branch in plan.planned_branches}
    assert len(there) == 1 and there.pop() == pytest.approx(8**-0.5)
    # What the forward pass computes is the same for fold and wrap, and no smaller than before.
    hung = 1.0 if how == "fold" else 8**-0.5
    torch.testing.assert_close(model[1].f[3].weight.detach() * hung, before)
    folded = plan.multipliers("1.f.3.weight", "adamw").lr / plan.multipliers("1.f.1.weight", "adamw").lr
    assert folded == pytest.approx(8**-0.5 / hung * 8**-0.5)


@pytest.mark.parametrize(
    "initialize",
    [
        lambda weight: nn.init.normal_(weight, std=0.02),
        lambda weight: nn.init.trunc_normal_(weight, std=0.05, a=-0.1, b=0.1),
        nn.init.xavier_uniform_,
        nn.init.orthogonal_,
        nn.init.kaiming_normal_,
        lambda weight: nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[1]), 1 / math.sqrt(weight.shape[1])),
    ],
)
def test_hidden_weights_start_as_the_bases_over_the_root_of_width_whatever_the_initialization(
    initialize: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    models = []
    for depth, width in ((8, 128), (2, 32)):
        model = network(depth, width)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                initialize(module.weight)
        models.append(model)
    model, base = models
    plan = dm.parametrize(model, base=base, example_inputs=X, rule="mup")
    theirs = dict(base.named_parameters())
    for name, other, wanted in (("1.f.1.weight", "1.f.1.weight", 0.5), ("0.weight", "0.weight", 1.0)):
        size, base_size = (
            p.detach().square().mean().sqrt() for p in (dict(model.named_parameters())[name], theirs[other])
        )
        assert float(size / base_size) == pytest.approx(wanted, rel=0.15)
    assert plan["9.weight"].folded == 1 / 4  # the readout


def test_nothing_is_seen_where_nothing_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = dm.parametrize(network(32), base=network(4), example_inputs=X)
    assert {(branch.initial, branch.forward) for branch in plan.planned_branches} == {(1.0, 1.0)}
    carriers = {name for branch in plan.branches for name in branch.carrier}
    assert {entry.scale for entry in plan.entries if entry.name not in carriers} == {1.0}


def test_kept_values_are_left_alone_and_a_wrong_size_is_said() -> None:
    model, base = network(4, 64, std=0.02), network(4, 16, std=0.02)
    before = model[1].f[1].weight.clone()
    with pytest.warns(UserWarning, match=r"leaves \d+ parameters at sizes .*1\.a\.1\.weight \(2 times its size\)"):
        dm.parametrize(model, base=base, example_inputs=X, rule="mup", initialization="keep")
    assert torch.equal(model[1].f[1].weight, before)


def gpt2(layers: int, width: int) -> nn.Module:
    import transformers  # not before conftest has made torchvision importable

    torch.manual_seed(layers)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": width, "n_head": width // 16}
    config = transformers.GPT2Config(n_layer=layers, bos_token_id=0, eos_token_id=0, **sizes)
    return transformers.GPT2LMHeadModel(config)


def test_stock_gpt2_works_in_depth_and_width() -> None:
    model = gpt2(8, 96)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = dm.parametrize(model, base=gpt2(2, 32), example_inputs=torch.randint(40, (2, 8)))
    assert {round(branch.initial * branch.forward, 6) for branch in plan.planned_branches} == {0.5}
    for name, parameter in model.named_parameters():
        is_hidden = name.endswith("weight") and ".c_" in name
        wanted = before[name] * (3**-0.5 if is_hidden else 1.0)
        torch.testing.assert_close(parameter.detach(), wanted)
    assert [(hook.module, hook.multiplier) for hook in plan.hooks] == [("lm_head", pytest.approx(1 / 3))]


@pytest.mark.parametrize("block", [blocks.PreNorm, blocks.LayerScale, blocks.ReZero])
def test_zero_and_constant_carriers_tell_nothing(block: type[nn.Module]) -> None:
    plan = dm.parametrize(blocks.Stack(16, block), base=blocks.Stack(4, block), example_inputs=X)
    assert {(branch.initial, branch.forward) for branch in plan.planned_branches} == {(1.0, 1.0)}


def test_ratios_are_simple_powers_where_they_may_be() -> None:
    assert simplest(0.51, 0.01, 4.0, 1.0) == pytest.approx((0.5, 1.0))
    assert simplest(1.15, 0.02, 3.0, 4.0) == pytest.approx((3**-0.5, 2.0))  # 0.02 / sqrt(2 L)
    assert simplest(0.7, 0.001, 4.0, 1.0) == (0.7, 1.0)
    assert simplest(1.3, 0.2, 4.0, 4.0) == (1.0, 1.0)  # too few values to tell


def test_sizes_are_those_of_pytorchs_default_where_values_look_like_it() -> None:
    layer = nn.Linear(64, 3)
    size = initial_size(layer.bias, 1 / 8)
    assert size is not None and size.exact == 1 / 8 / math.sqrt(3) and size.error > 0
    for other in (nn.init.uniform_(torch.empty(8), -0.03, 0.03), torch.full((3,), 0.2)):
        assert initial_size(other, 1 / 8).exact is None  # type: ignore[union-attr]
    assert initial_size(torch.ones(4)).error == 0  # type: ignore[union-attr]
    assert initial_size(torch.ones(4, device="meta")) is None


SPELLINGS = {
    "plain": (lambda layer: layer, "weight"),
    "weight norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "old weight norm": (nn.utils.weight_norm, "weight_v"),
    "spectral norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "pruned": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "weight_orig"),
}
LAYERS = [nn.Linear(8, 3), nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(6, 4, 3, groups=2)]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_the_bound_of_pytorchs_default_is_that_of_the_layer_however_its_weight_is_spelled(
    layer: nn.Module, spelling: str
) -> None:
    normed, name = SPELLINGS[spelling]
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    bounds = default_bounds(nn.Sequential(normed(copy.deepcopy(layer))))
    assert bounds[f"0.{name}"] == bounds["0.bias"] == pytest.approx(fan_in**-0.5)


def sized(*sizes: float) -> list[tuple[float, float | None]]:
    return [(1.0, size) for size in sizes]


def numbered(*numbers: float) -> list[tuple[float, float | None]]:
    return [(number, None) for number in numbers]


def test_branch_sizes_must_differ_by_more_than_chance() -> None:
    assert forward_factor(sized(*[0.5] * 8), sized(1.0, 1.0), 4.0) == (pytest.approx(0.5), False)
    assert forward_factor(sized(*[0.98] * 8), sized(1.0, 1.0), 4.0) == (1, False)
    assert forward_factor(sized(0.1, 5.0, 0.3, 2.0), sized(1.0, 9.0), 4.0) == (1, False)
    assert forward_factor([], sized(1.0), 4.0) == (1, False)


def test_numbers_in_the_forward_pass_are_known_exactly() -> None:
    assert forward_factor(numbered(*[0.5**0.5] * 4), numbered(1.0, 1.0), 2.0) == (pytest.approx(2**-0.5), False)
    assert forward_factor(numbered(*[0.7] * 4), numbered(0.7, 0.7), 2.0) == (1, False)
    shrinking = numbered(*[0.5**layer for layer in range(8)])
    assert forward_factor(shrinking, shrinking[:2], 4.0) == (1, True)  # skips that are doubled at every addition


def test_few_values_are_not_taken_for_another_size() -> None:
    """Three or eight values stray by a half: what is not PyTorch's default in both is compared with its error."""
    for seed in range(20):
        models = []
        for depth in (6, 2):
            torch.manual_seed(seed + 100 * depth)
            models.append(blocks.Stack(depth, blocks.PreNorm))
            for name, parameter in models[-1].named_parameters():
                if parameter.ndim == 1 and "norm" not in name:
                    nn.init.uniform_(parameter, -0.1, 0.1)
        plan = dm.plan(models[0], base=models[1], example_inputs=X)
        assert {round(entry.scale / entry.folded, 6) for entry in plan.entries if entry.scale is not None} == {1.0}


class DeepNorm(nn.Module):
    """``norm(alpha x + f(x))`` with alpha = (2 L)^(1/4), and weights times (8 L)^(-1/4): arXiv 2203.00555, figure 2."""

    def __init__(self, depth: int):
        super().__init__()
        self.f, self.norm = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), nn.LayerNorm(32)
        self.alpha = (2 * depth) ** 0.25
        for i in (0, 2):
            nn.init.xavier_normal_(self.f[i].weight, gain=(8 * depth) ** -0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.alpha * x + self.f(x))


@pytest.mark.parametrize("rule, wanted", [("depth-mup", -0.5), ("complete-p", -1.0)])
@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_what_deepnorm_has_of_the_multiplier_is_not_supplied_again(rule: str, wanted: float, how: str) -> None:
    def net(depth: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 32), *[DeepNorm(depth) for _ in range(depth)], nn.Linear(32, 3))

    plan = dm.parametrize(net(32), base=net(2), example_inputs=X, rule=rule, how=how)
    branch = plan.planned_branches[0]
    assert branch.forward == pytest.approx(16**-0.25)  # alpha, which stands on the skip
    assert branch.initial == pytest.approx(16**-0.25)  # beta, in the outer weights
    assert branch.supplied == pytest.approx(16 ** (wanted + 0.25))
    assert plan["1.f.0.weight"].scale == pytest.approx(2)  # inner weights start as the base's


def initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def test_a_base_on_meta_has_no_sizes_to_compare_with_unless_it_is_told_how_to_start() -> None:
    model, real = network(4, 128), network(2, 32)
    initialize(model)
    initialize(real)
    with torch.device("meta"):
        base = plain(2, 32)
    with pytest.warns(UserWarning, match="the sizes that its values start with are not known: .* Pass init="):
        assert dm.plan(model, base=base, example_inputs=X, rule="mup")["1.a.1.weight"].scale == 1
    state = torch.get_rng_state()
    plan = dm.plan(model, base=base, example_inputs=X, rule="mup", init=initialize)
    assert torch.equal(torch.get_rng_state(), state) and base[0].weight.is_meta
    wanted = dm.plan(model, base=real, example_inputs=X, rule="mup")
    assert plan["1.a.1.weight"].scale == 0.5
    assert {e.name: e.scale for e in plan.entries} == {e.name: e.scale for e in wanted.entries}
    with pytest.raises(dm.DepthMuPError, match=r"init= left 0.weight without values. Let it set every"):
        dm.plan(model, base=base, example_inputs=X, rule="mup", init=lambda module: None)
    with pytest.raises(dm.DepthMuPError, match="This base has values: leave init= out"):
        dm.plan(model, base=real, example_inputs=X, rule="mup", init=initialize)


def plain(depth: int, width: int) -> nn.Sequential:
    body = [Branches(width, 1.0) for _ in range(depth)]
    return nn.Sequential(nn.Linear(8, width), *body, nn.Linear(width, 3))


def zeroed(model: nn.Module, ends: str) -> nn.Module:
    """With zeros in the parameters whose names end so."""
    for name, parameter in model.named_parameters():
        if name.endswith(ends):
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("ends", ["a.3.weight", "f.0.weight", "f.1.bias"])
@pytest.mark.parametrize("width", [32, 128])
def test_zeros_in_one_of_model_and_base_are_told(ends: str, width: int) -> None:
    x = torch.randn(4, 8)

    def plan(ours: str, theirs: str, told: int) -> dm.Plan:
        model, base = zeroed(network(8, width), ours), zeroed(network(2, 32), theirs)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            plan = dm.parametrize(model, base=base, example_inputs=x, rule="depth-mup")
        messages = [str(warning.message) for warning in seen]
        assert len(messages) == told and all("start at zero here and not in the base" in m for m in messages), messages
        return plan

    alike = plan(ends, ends, 0)
    for ours, theirs in ((ends, "none"), ("none", ends)):
        unlike = plan(ours, theirs, 1)
        assert [(b.multiplier, b.forward) for b in unlike.planned_branches] == [
            (b.multiplier, 1.0) for b in alike.planned_branches
        ]
