"""FSDP2 in the order people write it: parametrize, shard, optimizer, clip, save. Lines marked # dm are new.

torchrun --nproc-per-node 2 examples/recipes/fsdp2_loop.py, or python examples/recipes/fsdp2_loop.py for one process
"""

import os
import tempfile

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import torch_depthmup as dm  # dm


def network(depth: int) -> nn.Module:
    blocks = [
        dm.Residual(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 4))


def train() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    labels = inputs[:, :4].argmax(1)
    model = network(8)
    dm.parametrize(model, base=network(2), example_inputs=inputs[:4])  # dm: on the whole model
    for block in model:
        if isinstance(block, dm.Residual):
            fully_shard(block)
    fully_shard(model)
    optimizer = dm.AdamW(model.parameters(), lr=3e-3)  # dm: after sharding, as without dm
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        dm.clip_grad_norm_(model.parameters(), 1.0)  # dm: in place of torch's
        optimizer.step()
        losses.append(float(loss.detach()))
    saved = get_state_dict(model, optimizer)
    set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
    if distributed.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]


def main() -> None:
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
        train()
    else:
        with tempfile.TemporaryDirectory() as folder:
            distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            train()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
