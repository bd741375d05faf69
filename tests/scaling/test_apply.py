"""Carrying a plan out: what changes, what does not, and that nothing does when anything is wrong."""

from __future__ import annotations

import copy
import pickle
import sys

import mup
import pytest
import torch
from blocks import Bottleneck, BottleneckNet, Gated, PostNorm, PreNorm, ReZero, Stack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

import torch_depthmup as dm
from torch_depthmup.errors import DepthMuPError, MeasurementError, PlanError
from torch_depthmup.scaling.registry import owners

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def build(depth: int = 4, block=PreNorm) -> Stack:
    torch.manual_seed(3)
    return Stack(depth, block)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(hasattr(parameter, "infshape") for parameter in model.parameters())
    with pytest.raises(PlanError, match="no plan"):
        dm.plan_of(model)


@given(
    st.integers(1, 4), st.sampled_from([PreNorm, PostNorm, Gated]), st.sampled_from(["fold", "wrap"]),
    st.sampled_from(["sp", "mup", "depth-mup", "depth-mup-corrected", "complete-p"]),
)  # fmt: skip
@settings(max_examples=25)
def test_nothing_changes_at_the_base(depth: int, block, how: str, rule: str) -> None:
    model = build(depth, block)
    before, wanted = values(model), model(X)
    dm.parametrize(model, depth_multiplier=1, example_inputs=X, how=how, rule=rule)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(X), wanted)


class Counted(nn.Module):
    """A parametrization that notes in a buffer how often its value was computed, as spectral norm does its vectors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("times", torch.zeros(()))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.times += 1
        return value


def counted(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Counted())


def muread(model: nn.Module) -> None:
    model.head = counted(mup.MuReadout(model.head.in_features, model.head.out_features))


COMPUTED = {
    "a layer under spectral norm": lambda model: parametrizations.spectral_norm(model.blocks[0].fc1),
    "a convolution under spectral norm": lambda model: parametrizations.spectral_norm(model.stem[1]),
    "a layer": lambda model: counted(model.blocks[0].fc1),
    "the gain of a norm": lambda model: counted(model.blocks[0].norm),
    "mup's readout": muread,
}


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_keep_their_buffers(kind: str, how: str) -> None:
    def make(depth: int, width: int) -> nn.Module:
        model = Stack(depth, PreNorm, width)
        model.stem = nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv1d(8, width, 1), nn.Flatten())
        COMPUTED[kind](model)
        return model

    model, base = make(4, 24), make(2, 12)
    before, base_before = {name: buffer.clone() for name, buffer in model.named_buffers()}, values(base)
    dm.parametrize(model, base=base, example_inputs=X, how=how)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(value, base_before[name]) for name, value in base.state_dict().items())


def test_folding_scales_the_carriers_and_nothing_else() -> None:
    model, before = build(8), values(build(8))
    plan = dm.parametrize(model, depth_multiplier=4, example_inputs=X)
    carriers = {name for branch in plan.branches for name in branch.carrier}
    assert len(carriers) == 16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] * 0.5 if name in carriers else before[name])


@pytest.mark.parametrize(
    "rule, m", [("depth-mup-corrected", 0.5), ("complete-p", 0.25), (dm.Rule("third", alpha=1.5), 0.125)]
)
def test_fold_and_wrap_compute_the_network_with_explicit_multipliers(rule, m: float) -> None:
    plain, x = build(8).double(), X.double()
    stream = plain.stem(x)
    for block in plain.blocks:
        stream = stream + m * (block(stream) - stream)
    for how in ("fold", "wrap"):
        model = copy.deepcopy(plain)
        dm.parametrize(model, depth_multiplier=4, example_inputs=x, rule=rule, how=how)
        torch.testing.assert_close(model(x), plain.head(stream), rtol=1e-12, atol=1e-12)


def test_zero_carriers_are_measured_and_stay_zero() -> None:
    model = build(4, ReZero)
    plan = dm.parametrize(model, depth_multiplier=4, example_inputs=X)
    assert plan.branches[0].carrier == ("blocks.0.alpha",)
    assert all(block.alpha.item() == 0 for block in model.blocks)
    assert plan.multipliers("blocks.0.alpha", "sgd").lr == 0.25  # m squared


class UsedUnseen(PreNorm):
    """The last weight is used twice, the second time where nothing shows it: measuring finds out."""

    def forward(self, x):
        return x + torch.nn.functional.relu(self.fc2(self.fc1(x).tanh()) + 0.0 * x) + self.fc2.weight.detach().mean()


class Clamped(PreNorm):
    def forward(self, x):
        offset = torch.full_like(x, 0.5).detach()
        return x + torch.where(offset > 0, self.fc2(self.fc1(x).tanh()), offset).clamp_min(0.1)


@pytest.mark.parametrize("block", [UsedUnseen, Clamped])
def test_a_branch_that_is_not_linear_in_its_carrier_is_refused_and_the_model_left_alone(block) -> None:
    model = build(4, block)
    before = values(model)
    with pytest.raises(DepthMuPError, match=r"blocks\.\d"):
        dm.parametrize(model, depth_multiplier=4, example_inputs=X)
    assert_untouched(model, before)


def test_a_wrong_multiplier_is_found_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    room = sys.modules["torch_depthmup.scaling.measuring"]
    real = room.scaled
    monkeypatch.setattr(room, "scaled", lambda pairs: real([(parameter, m * 1.001) for parameter, m in pairs]))
    model = build(4)
    before = values(model)
    with pytest.raises(MeasurementError, match=r"blocks.0: the branch should be 0.5 times what it was, and is 0.5005"):
        dm.parametrize(model, depth_multiplier=4, example_inputs=X)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depth_multiplier": 2}, "example_inputs"),
        ({"example_inputs": X}, "base=small_model, or depth_multiplier"),
        ({"example_inputs": X, "depth_multiplier": 2, "base": nn.Linear(2, 2)}, "not both"),
        ({"example_inputs": X, "depth_multiplier": 2, "rule": "deep-mup"}, "no rule is called 'deep-mup'"),
        ({"example_inputs": X, "depth_multiplier": 2, "how": "folded"}, "how='folded' is not known"),
        ({"example_inputs": X[:, :3], "depth_multiplier": 2}, "failed on the example inputs"),
        ({"example_inputs": X * float("nan"), "depth_multiplier": 2}, "has norm nan"),
        ({"example_inputs": X, "depth_multiplier": 2, "exclude": ["layers.*"]}, "no module of Stack matches"),
        ({"example_inputs": X, "depth_multiplier": 2, "exclude": ["*"]}, "no residual branches"),
    ],
)
def test_bad_arguments_leave_the_model_alone(options, message: str) -> None:
    model = build()
    before = values(model)
    with pytest.raises(DepthMuPError, match=message):
        dm.parametrize(model, **options)
    assert_untouched(model, before)


class Asking(Stack):
    """Has an argument more."""

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + more


def of_another_input(depth: int) -> nn.Module:
    base = Stack(depth, PreNorm)
    base.stem = nn.Linear(9, 12)
    return base


@pytest.mark.parametrize(
    "base", [Stack(2, PreNorm).double(), Asking(2, PreNorm), of_another_input(2)], ids=["dtype", "argument", "shape"]
)
def test_a_base_that_does_not_take_the_models_inputs_is_named(base: nn.Module) -> None:
    model = build()
    before = values(model)
    with pytest.raises(DepthMuPError, match="^in the base, .*of its dtype.* failed on the example inputs"):
        dm.parametrize(model, base=base, example_inputs=X)
    assert_untouched(model, before)


def test_networks_without_branches_are_refused() -> None:
    with pytest.raises(PlanError, match="no residual branches"):
        dm.parametrize(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), depth_multiplier=1, example_inputs=X)


@pytest.mark.parametrize("rule", ["sp", "mup"])
def test_rules_without_depth_need_no_base_and_no_inputs(rule: str) -> None:
    plan = dm.parametrize(build(), rule=rule)
    assert {entry.role for entry in plan.entries} == {"outside"}
    assert dm.parametrize(build(), rule=rule, example_inputs=X).branches


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy, nn.Sequential], ids=["same", "copy", "parent"])
def test_twice_is_refused(again) -> None:
    model = build()
    dm.parametrize(model, depth_multiplier=2, example_inputs=X)
    with pytest.raises(PlanError, match="parametrized before"):
        dm.parametrize(again(model), depth_multiplier=2, example_inputs=X)


def test_meta_lazy_and_sharded_models_are_refused() -> None:
    with torch.device("meta"):
        model = Stack(4, PreNorm)
    with pytest.raises(PlanError, match="meta device"):
        dm.parametrize(model, depth_multiplier=2, example_inputs=X.to("meta"))
    with pytest.raises(PlanError, match="lazy"):
        dm.parametrize(nn.LazyLinear(3), depth_multiplier=2, example_inputs=X)
    with pytest.raises(PlanError, match="are nn.Modules, and this is a str"):
        dm.parametrize("model", depth_multiplier=2, example_inputs=X)  # type: ignore[arg-type]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [torch.compile, compiled_in_place])
def test_a_compiled_model_cannot_be_wrapped(compiled) -> None:
    with pytest.raises(PlanError, match="compiled"):
        dm.parametrize(compiled(build()), depth_multiplier=4, example_inputs=X, how="wrap")


def test_a_compiled_model_can_be_folded() -> None:
    plain = build()
    dm.parametrize(plain, depth_multiplier=4, example_inputs=X)
    compiled = torch.compile(build(), backend="eager")
    assert dm.parametrize(compiled, depth_multiplier=4, example_inputs=X) == dm.plan_of(compiled)
    assert torch.equal(compiled(X), plain(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_half_precision_works_within_its_rounding(dtype: torch.dtype, how: str) -> None:
    model = build().to(dtype)
    dm.parametrize(model, depth_multiplier=4, example_inputs=X.to(dtype), how=how)
    reference = build()
    dm.parametrize(reference, depth_multiplier=4, example_inputs=X)
    torch.testing.assert_close(model(X.to(dtype)).float(), reference(X), rtol=0.05, atol=0.02)


def test_batch_norm_is_measured_on_batches_of_one_pixel_too() -> None:
    def pixels(depth: int) -> nn.Sequential:
        return nn.Sequential(*[Bottleneck(8, 8) for _ in range(depth)])

    model = pixels(4)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dm.parametrize(model, depth_multiplier=4, example_inputs=torch.randn(1, 8, 1, 1))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_four_hundred_blocks_do_not_overflow_the_measurement() -> None:
    model = BottleneckNet(200)
    dm.parametrize(model, base=BottleneckNet(2), example_inputs=torch.randn(4, 3, 4, 4))


# Finding the plan again


def test_the_plan_is_found_after_copies_and_replacements() -> None:
    model = build()
    plan = dm.parametrize(model, depth_multiplier=4, example_inputs=X)
    replaced = copy.deepcopy(model)
    replaced.load_state_dict(model.state_dict(), assign=True)
    emptied = copy.deepcopy(model).to_empty(device="cpu")
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), replaced, emptied, AveragedModel(model)]
    others += [torch.compile(model), nn.DataParallel(model), nn.Sequential(model)]
    for other in others:
        assert dm.plan_of(other) == plan
    known = {id(module) for module, _ in owners()}
    assert {id(model), id(replaced), id(emptied), id(others[0]), id(others[1]), id(others[4].module)} <= known


def test_dead_models_are_forgotten() -> None:
    import gc

    before = len(owners())
    dm.parametrize(build(), depth_multiplier=4, example_inputs=X)
    gc.collect()
    assert len(owners()) <= before


# Undo


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("depth_multiplier", [4, 4 / 3])
def test_undo_restores_values_to_rounding_and_everything_else_exactly(how: str, depth_multiplier: float) -> None:
    model = build()
    before = values(model)
    dm.parametrize(model, depth_multiplier=depth_multiplier, example_inputs=X, how=how)
    dm.undo(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1.2e-7, atol=0)
    assert not any(module._forward_hooks for module in model.modules())
    dm.parametrize(model, depth_multiplier=depth_multiplier, example_inputs=X, how=how)


def test_undo_of_a_trained_loaded_or_copied_model_is_refused() -> None:
    model = build()
    dm.parametrize(model, depth_multiplier=4, example_inputs=X)
    with pytest.raises(PlanError, match="copy"):
        dm.undo(copy.deepcopy(model))
    model.load_state_dict(model.state_dict())
    with pytest.raises(PlanError, match="has changed since parametrize"):
        dm.undo(model)
    with pytest.raises(PlanError, match="no plan"):
        dm.undo(build())


class Built:
    """Makes a model when it is called, and is none."""

    def __call__(self) -> nn.Module:
        return build()


@pytest.mark.parametrize("other", [build, Stack, Built()], ids=["a function", "a class", "an object"])
def test_what_makes_a_model_is_not_taken_for_one(other) -> None:
    options = {"depth_multiplier": 2, "example_inputs": X}
    for act in (
        lambda: dm.parametrize(other, **options),
        lambda: dm.parametrize(build(), base=other, example_inputs=X),
        lambda: dm.plan(other, **options),
        lambda: dm.plan(build(), base=other, example_inputs=X),
        lambda: dm.find_branches(other, X),
    ):
        with pytest.raises(PlanError, match=f"are nn.Modules, and this is a {type(other).__name__}"):
            act()


@pytest.mark.parametrize("act", [dm.apply, dm.attach])
@pytest.mark.parametrize("write", [dm.Plan.to_json, str, lambda plan: None])
def test_a_written_plan_is_not_taken_for_one(act, write) -> None:
    plan = dm.plan(build(), depth_multiplier=2, example_inputs=X)
    with pytest.raises(PlanError, match=r"takes a Plan, not a .*dm.Plan.from_json\(text\)"):
        act(build(), write(plan))
    assert act(build(), dm.Plan.from_json(plan.to_json())).branches == plan.branches
