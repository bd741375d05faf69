"""Every model of the zoo: its branches are those counted by hand, and scaling them does what it says, no more."""

from __future__ import annotations

import copy
import random
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from blocks import plain_mlp
from entries import Entry
from models import FIELD, ZOO, entry
from torch import Tensor, nn

import torch_depthmup as dm


def possible(network: Entry, how: str) -> bool:
    """Whether the network's branches can be scaled in this way."""
    return network.linear if how == "fold" else network.wraps


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of a ``network`` run once for each entry, tests of ``how`` too once for each way that it allows.

    Those of ``any_network`` run for the many others as well.
    """
    argument = next((name for name in ("network", "any_network") if name in metafunc.fixturenames), None)
    if argument is None:
        return
    ways = ("fold", "wrap") if "how" in metafunc.fixturenames else ("",)
    cases = []
    for e in ZOO if argument == "network" else ZOO + FIELD:
        skip = pytest.mark.skipif(not e.available, reason=f"{e.requires} is not installed")
        for how in ways:
            if not how or possible(e, how):
                values, name = ((e, how), f"{e.name}-{how}") if how else ((e,), e.name)
                cases.append(pytest.param(*values, id=name, marks=[skip]))
    metafunc.parametrize((argument, "how") if len(ways) > 1 else (argument,), cases)


def ends_with(name: str, end: str) -> bool:
    """Whether a module path ends in these components."""
    return f".{name}".endswith(f".{end}")


def module_of(parameter: str) -> str:
    """A parameter's name without ``.weight`` or ``.bias``, and without its number in a ParameterList."""
    return re.sub(r"\.(weight|bias|\d+)$", "", parameter)


# Finding


def test_branches_are_those_counted_by_hand(any_network: Entry) -> None:
    branches = dm.find_branches(any_network.build(), any_network.inputs())
    depths = any_network.depths[any_network.size]
    positions = [[b.position for b in branches if b.stream == stream] for stream in range(len(depths))]
    assert positions == [list(range(depth)) for depth in depths]
    assert all(b.additions == depths[b.stream] for b in branches)
    assert {b.levels for b in branches} == any_network.levels
    assert sum(b.skip == "projection" for b in branches) == any_network.projections


def test_carriers_are_the_last_parametrised_operations(any_network: Entry) -> None:
    branches = dm.find_branches(any_network.build(), any_network.inputs())
    used = {
        end for b in branches for name in b.carrier for end in any_network.carriers if ends_with(module_of(name), end)
    }
    unexpected = [
        name
        for b in branches
        for name in b.carrier
        if not any(ends_with(module_of(name), e) for e in any_network.carriers)
    ]
    assert not unexpected
    assert used == any_network.carriers
    assert all(b.carrier for b in branches) == any_network.linear


def test_each_parameter_has_one_side_in_one_branch(any_network: Entry) -> None:
    model = any_network.build()
    branches = dm.find_branches(model, any_network.inputs())
    sides = [name for b in branches for name in (*b.inner, *b.outer)]
    assert len(sides) == len(set(sides))
    assert set(sides) <= {name for name, _ in model.named_parameters()}
    assert all(set(b.carrier) <= set(b.outer) for b in branches)
    assert all(bool(b.inner) or b.levels <= 1 for b in branches)


def test_meta_gives_the_same_branches(network: Entry) -> None:
    model = network.build_on_meta()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert dm.find_branches(model, network.meta_inputs()) == dm.find_branches(network.build(), network.inputs())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_tracing_leaves_the_model_as_it_was(network: Entry) -> None:
    model, inputs = network.build().train(), network.inputs()
    modules = list(model.modules())
    modules[-1].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    model.register_forward_hook(lambda *_: None)
    values = {name: tensor.clone() for name, tensor in state(model).items()}
    before = surroundings(model, inputs)
    dm.find_branches(model, inputs)
    assert surroundings(model, inputs) == before
    assert_same_tensors(state(model), values)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(parameters[-1].grad, torch.ones_like(parameters[-1]))
    assert all(p.grad is None for p in parameters[:-1])


def test_a_frozen_model_without_gradients_is_read_all_the_same(network: Entry) -> None:
    model, inputs = network.build(), network.inputs()
    expected = dm.find_branches(model, inputs)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        assert dm.find_branches(model, inputs) == expected
        assert not torch.is_grad_enabled()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_sums_of_parallel_linear_layers_are_not_residual() -> None:
    assert dm.find_branches(plain_mlp(3), torch.randn(2, 8)) == ()


def test_exclude_leaves_the_other_branches_alone() -> None:
    network = entry("encoder-pre-norm")
    model = network.build()
    branches = dm.find_branches(model, network.inputs())
    kept = dm.find_branches(model, network.inputs(), exclude="*.self_attn")
    assert [b.carrier for b in kept] == [b.carrier for b in branches if "self_attn" not in b.carrier[0]]
    assert [b.additions for b in kept] == [3, 3, 3]


# Scaling


def test_every_branch_is_multiplied(any_network: Entry, how: str) -> None:
    model, reference, plain = scaled_by_hand(any_network)
    parametrize(model, any_network, how)
    if how == "wrap":
        assert_same_tensors(state(model), state(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    compare(model, reference, plain, any_network)


def test_at_the_base_depth_nothing_changes(network: Entry, how: str) -> None:
    model = network.build()
    before, inputs = copy.deepcopy(model), network.inputs()
    dm.parametrize(model, base=network.build(), example_inputs=inputs, how=how)
    assert_same_tensors(state(model), state(before))
    assert torch.equal(output(model, inputs), output(before, inputs))


def test_undo_gives_the_plain_model_back(network: Entry, how: str) -> None:
    model, _, plain = scaled_by_hand(network)
    parametrize(model, network, how)
    dm.undo(model)
    for name, tensor in state(model).items():
        torch.testing.assert_close(tensor, state(plain)[name], rtol=4 * torch.finfo(network.dtype).eps, atol=0)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert hooks(model) == hooks(plain)


@pytest.mark.parametrize(
    ("name", "how"), [(e.name, how) for e in ZOO for how in ("fold", "wrap") if not possible(e, how)]
)
def test_what_cannot_be_done_is_refused(name: str, how: str) -> None:
    network = entry(name)
    if not network.available:
        pytest.skip(f"{network.requires} is not installed")
    model, _, plain = scaled_by_hand(network)
    other = "wrap" if how == "fold" else "fold"
    with pytest.raises(dm.DepthMuPError, match=other):
        parametrize(model, network, how)
    assert_same_tensors(state(model), state(plain))
    assert hooks(model) == hooks(plain)


def test_a_gain_that_starts_at_zero_is_wrapped_too() -> None:
    """Zero stays zero; the multiplier shows once the gain has moved."""
    network = entry("bottleneck")
    model = network.build().double().eval()
    gains = [module.weight for name, module in model.named_modules() if name.endswith("bn3")]
    for gain in gains:
        nn.init.zeros_(gain)
    plain = copy.deepcopy(model)
    dm.parametrize(model, depth_multiplier=4, example_inputs=exact(network.inputs(), network), how="wrap")
    assert_same_tensors(state(model), state(plain))
    wrapped, by_hand = model.stages[1], plain.stages[1]
    for module in (wrapped, by_hand):
        nn.init.ones_(module.bn3.weight)
    x = torch.rand(2, 8, 4, 4, dtype=torch.float64)  # positive, so that the block's ReLU passes the skip
    branch = by_hand(x + 100) - (x + 100)
    torch.testing.assert_close(wrapped(x + 100) - (x + 100), branch * 0.5, rtol=1e-10, atol=1e-12)


def test_a_gain_that_starts_at_zero_learns_with_the_folded_multiplier() -> None:
    network = entry("rezero")
    model = network.build()
    plan = dm.parametrize(model, depth_multiplier=3, example_inputs=network.inputs())
    assert all(block.alpha.item() == 0 for block in model.blocks)
    # Adam's step is that of the outer side, r ** (-1/2), times the folded m = r ** (-1/2), with r = 6 / 2.
    assert plan.multipliers("blocks.0.alpha", "adam").lr == pytest.approx(1 / 3)


# Helpers


def without_zeros(model: nn.Module) -> nn.Module:
    """The model with random values in place of zeros: zero gains hide what they multiply."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (parameter == 0) * 0.1 * torch.randn_like(parameter)
    return model


def scaled_by_hand(network: Entry) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model, the same with all its branches multiplied by hand, and the same as it was; no parameter is zero.

    The multiplier of depth-muP is (base depth / depth) ** (1/2), with the depths counted by hand. It is put on what the
    carrier's module returns, by a hook, or into the bare parameter where no module returns it.
    """
    plain = without_zeros(network.build().to(network.dtype).eval())
    model, reference = copy.deepcopy(plain), copy.deepcopy(plain)
    modules, parameters = dict(reference.named_modules()), dict(reference.named_parameters())
    called = calls(reference, exact(network.inputs(), network))
    returning = (name for name in modules if any(ends_with(name, end) for end in network.outputs.split()))
    for b in dm.find_branches(reference, exact(network.inputs(), network)):
        multiplier = (network.depths[network.base][b.stream] / network.depths[network.size][b.stream]) ** 0.5
        targets = list(dict.fromkeys(module_of(name) for name in b.carrier)) or [next(returning)]
        for target in targets:
            if target in called:  # a function may be given the module's weights instead, as in nn.MultiheadAttention
                modules[target].register_forward_hook(lambda _, __, value, m=multiplier: multiplied(value, m))
                continue
            for name in b.carrier:
                if module_of(name) == target:
                    parameters[name].data.mul_(multiplier)
    assert next(returning, None) is None
    return model, reference, plain


def calls(model: nn.Module, inputs: Any) -> set[str]:
    """The names of the modules that a forward pass calls."""
    names: set[str] = set()
    seen = [
        module.register_forward_hook(lambda *_, name=name: names.add(name)) for name, module in model.named_modules()
    ]
    output(model, inputs)
    for hook in seen:
        hook.remove()
    return names


def multiplied(value: Any, multiplier: float) -> Any:
    """What a module returned, its first tensor multiplied."""
    return (value[0] * multiplier, *value[1:]) if isinstance(value, tuple) else value * multiplier


def parametrize(model: nn.Module, network: Entry, how: str) -> Any:
    """`dm.parametrize` against the entry's base. Of all initializations GPT-2's alone shrinks with depth."""
    base = without_zeros(network.build(network.base).to(network.dtype))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        inputs = exact(network.inputs(), network)
        plan = dm.parametrize(model, base=base, example_inputs=inputs, how=how, initialization="keep")
    # Zero gains were filled by hand, so some models look trained.
    messages = [text for warning in said if "looks trained" not in (text := str(warning.message))]
    shrinking = ["at sizes that the rule does not give" in text for text in messages]
    assert shrinking == [True] or not network.name.startswith("gpt2")
    assert {branch.forward for branch in plan.planned_branches} == {1.0}
    return plan


def compare(model: nn.Module, reference: nn.Module, plain: nn.Module, network: Entry) -> None:
    """The model computes what the reference does, and what differs from the plain one is far above rounding."""
    inputs = exact(network.inputs(), network)
    got, wanted, unscaled = (output(m, inputs) for m in (model, reference, plain))
    size = (wanted - unscaled).norm()
    rounding = torch.finfo(network.dtype).eps
    assert size > 1e6 * rounding * wanted.norm() * (1e-2 if network.dtype == torch.float32 else 1)
    assert (got - wanted).norm() < 1e-3 * size


def output(model: nn.Module, inputs: Any) -> Tensor:
    """The first output, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        if isinstance(inputs, dict):
            value = model(**inputs)
        else:
            value = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return value if isinstance(value, Tensor) else value[0]


def exact(value: Any, network: Entry) -> Any:
    """Inputs in the entry's most exact dtype."""
    if isinstance(value, Tensor):
        return value.to(network.dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: exact(item, network) for key, item in value.items()}
    return tuple(exact(item, network) for item in value) if isinstance(value, tuple) else value


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those outside the state_dict too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_tensors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Same names, same bits."""
    assert got.keys() == wanted.keys()
    assert [name for name in got if not torch.equal(got[name], wanted[name])] == []


def hooks(model: nn.Module) -> list[tuple[int, ...]]:
    """How many hooks of each kind every module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return [tuple(len(getattr(module, kind)) for kind in kinds) for module in model.modules()]


def surroundings(model: nn.Module, inputs: Any) -> list[Any]:
    """All that a forward pass could leave behind, but for the values of parameters and buffers."""
    global_hooks = torch.nn.modules.module
    tensors = [t for t in (inputs.values() if isinstance(inputs, dict) else [*inputs]) if isinstance(t, Tensor)]
    return [
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        hooks(model),
        [parameter.requires_grad for parameter in model.parameters()],
        [(t.requires_grad, t.sum().item()) for t in tensors],
        torch.get_rng_state().tolist(),
        random.getstate(),
        [str(item) for item in np.random.get_state()],
        (len(global_hooks._global_forward_hooks), len(global_hooks._global_forward_pre_hooks)),
        torch.is_grad_enabled(),
    ]


# Networks that cannot be scaled in depth, and are told so


def convmixer(depth: int) -> nn.Module:
    from timm.models.convmixer import ConvMixer

    return ConvMixer(16, depth, kernel_size=3, patch_size=4, num_classes=10)


class Plain(nn.Module):
    """A residual block, and layers without a skip after it."""

    def __init__(self, after: nn.Module):
        super().__init__()
        self.inside, self.after = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)), after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x + self.inside(x))


def with_a_plain_layer_after_each_block(depth: int) -> nn.Module:
    blocks = (Plain(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())) for _ in range(depth))
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), *blocks)


def with_two_blocks_before_each_plain_layer(depth: int) -> nn.Module:
    pairs = (
        nn.Sequential(Plain(nn.Identity()), Plain(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())))
        for _ in range(depth)
    )
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), *pairs)


def densenet(depth: int) -> nn.Module:
    from timm.models.densenet import DenseNet

    return DenseNet(8, (depth, depth), num_classes=10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (convmixer, "4 residual streams and the base 2.*depth adds streams.*rule='mup'"),
        (with_a_plain_layer_after_each_block, "4 residual streams and the base 2.*depth adds streams.*rule='mup'"),
        (with_two_blocks_before_each_plain_layer, "4 residual streams and the base 2.*depth adds streams.*rule='mup'"),
        (densenet, "no residual branches that could be found.*rule='mup'"),  # concatenates
    ],
)
def test_networks_without_a_stream_to_scale_are_refused(make, message: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(dm.DepthMuPError, match=message):
        dm.parametrize(make(4), base=make(2), example_inputs=x)
    plan = dm.plan(make(4), base=make(4), example_inputs=x, rule="mup")
    assert not any(b.supplied != 1 for b in plan.planned_branches)
