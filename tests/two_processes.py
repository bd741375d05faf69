"""One of two processes of tests/scaling/test_two_processes.py: sharded models beside whole ones.

Of tensor parallel shards it prints the last loss, and that of the whole model: folded and wrapped, under AdamW and
under clipped SGD.
"""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torch_depthmup as dm

Network = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "recipes" / "torchtitan_order.py"))["Network"]
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


def trained(model: nn.Module, clip: bool) -> float:
    optimizer = dm.SGD(model.parameters(), lr=1.0) if clip else dm.AdamW(model.parameters(), lr=3e-3)
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            dm.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return float(loss.detach())


def small_parameters() -> None:
    """Of a parameter of one row the second process holds nothing."""

    def network(depth: int, width: int) -> nn.Module:
        torch.manual_seed(0)
        blocks = [dm.Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))) for _ in range(depth)]
        return nn.Sequential(nn.Linear(8, width), *blocks, nn.Linear(width, 1))

    plan = dm.plan(network(8, 32).to("meta"), base=network(2, 8), example_inputs=X[:2])
    whole, sharded = network(8, 32), network(8, 32)
    fully_shard(sharded)
    assert dm.apply(sharded, plan) == dm.apply(whole, plan)


def main() -> None:
    distributed.init_process_group("gloo")
    small_parameters()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    base = Network(2, 16)
    base.initialize()
    for how, clip in itertools.product(("fold", "wrap"), (False, True)):
        with torch.device("meta"):
            shape, sharded = Network(8, 64), Network(8, 64)
        plan = dm.plan(shape, base=base, example_inputs=X[:2], how=how)
        for block in sharded.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        whole = Network(8, 64)
        sharded.to_empty(device="cpu")
        for model in (sharded, whole):
            model.initialize()
            dm.apply(model, plan)
        assert dm.plan_of(sharded) == dm.plan_of(whole)
        print(f"{trained(sharded, clip):.7f} {trained(whole, clip):.7f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
