"""Plans under DDP and FSDP2, in one process with the gloo backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blocks import PreNorm, Stack
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import torch_depthmup as dm

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def rates(optimizer: torch.optim.Optimizer) -> list[tuple[float, int]]:
    return [(group["lr"], len(group["params"])) for group in optimizer.param_groups]


def scaled() -> Stack:
    torch.manual_seed(0)
    model = Stack(8, PreNorm)
    dm.parametrize(model, depth_multiplier=4, example_inputs=X)
    return model


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model(X).detach()


@pytest.mark.parametrize("shard", [DistributedDataParallel, fully_shard])
def test_a_distributed_model_trains_with_its_plan(group: None, shard) -> None:
    plain = scaled()
    model = shard(scaled())
    assert dm.plan_of(model) == dm.plan_of(plain)
    ours, wanted = dm.AdamW(model.parameters(), lr=0.01), dm.AdamW(plain.parameters(), lr=0.01)
    assert rates(ours) == rates(wanted)
    torch.testing.assert_close(train(model, ours), train(plain, wanted))


def test_a_sharded_model_is_refused_and_a_replicated_one_is_not(group: None) -> None:
    with pytest.raises(dm.DepthMuPError, match="is sharded. Call parametrize on the whole model first"):
        dm.parametrize(fully_shard(Stack(4, PreNorm)), depth_multiplier=2, example_inputs=X)
    assert dm.parametrize(DistributedDataParallel(Stack(4, PreNorm)), depth_multiplier=2, example_inputs=X).branches


def test_a_replicated_model_is_watched_as_the_module_inside(group: None) -> None:
    rows = []
    for wrap in (lambda model: model, DistributedDataParallel):
        model = wrap(scaled())
        with dm.diagnostics.FeatureMonitor(model, X) as monitor:
            train(model, dm.AdamW(model.parameters(), lr=0.01))
            monitor.record(3)
        rows.append(repr(monitor.rows))
    assert rows[0] == rows[1]


def test_a_sharded_model_is_not_watched_and_a_twin_that_loads_its_state_is(group: None) -> None:
    model = fully_shard(scaled())
    for look in (dm.find_branches, dm.diagnostics.FeatureMonitor):
        with pytest.raises(dm.DepthMuPError, match="stem.weight is sharded.*a twin on one process"):
            look(model, X)
    twin, plain = scaled(), scaled()
    watching, direct = dm.diagnostics.FeatureMonitor(twin, X), dm.diagnostics.FeatureMonitor(plain, X)
    train(model, dm.AdamW(model.parameters(), lr=0.01))
    train(plain, dm.AdamW(plain.parameters(), lr=0.01))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    twin.load_state_dict(whole)
    watching.record(3)
    direct.record(3)
    own = [[row["own"] for row in monitor.rows if row["kind"] == "layer"] for monitor in (watching, direct)]
    assert own[0] == pytest.approx(own[1], rel=1e-4) and min(own[0]) > 0


def test_a_model_is_planned_on_meta_sharded_initialized_and_then_scaled(group: None) -> None:
    """The order of torchtitan: meta, shard, materialise, initialize. It trains as the model in one process does."""

    def initialize(model: torch.nn.Module) -> None:
        torch.manual_seed(0)
        for parameter in model.parameters():
            # gains stay equal: unlike ones tell of training
            drawn = torch.randn(parameter.shape) if parameter.ndim > 1 else torch.ones(parameter.shape)
            getattr(parameter, "to_local", lambda p=parameter: p)().data.copy_(drawn * 0.1)

    base, plain = Stack(2, PreNorm), Stack(8, PreNorm)
    initialize(base)
    initialize(plain)
    wanted = dm.parametrize(plain, base=base, example_inputs=X)
    with torch.device("meta"):
        model = Stack(8, PreNorm)
    plan = dm.Plan.from_json(dm.plan(model, base=base, example_inputs=X).to_json())
    assert plan["blocks.7.fc2.weight"].scale is None
    fully_shard(model)
    model.to_empty(device="cpu")
    initialize(model)
    assert dm.apply(model, plan).entries == wanted.entries
    ours, theirs = dm.AdamW(model.parameters(), lr=0.01), dm.AdamW(plain.parameters(), lr=0.01)
    torch.testing.assert_close(train(model, ours), train(plain, theirs))


def test_a_plan_is_attached_to_a_model_that_is_scaled_already() -> None:
    model, resumed = scaled(), Stack(8, PreNorm)
    resumed.load_state_dict(model.state_dict())
    plan = dm.attach(resumed, dm.plan_of(model))
    assert rates(dm.AdamW(resumed.parameters(), lr=0.1)) == rates(dm.AdamW(model.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))
    other = Stack(8, PreNorm)
    dm.attach(other, plan, rates_only=True)
    assert dm.plan_of(other).multipliers("blocks.0.fc2.weight", "adamw").lr == 0.5  # no fold to make up for
    with pytest.raises(dm.DepthMuPError, match="made for another model"):
        dm.attach(Stack(4, PreNorm), plan)
