"""The order of torchtitan: plan on meta, shard, initialize, scale; save shards and resume. Lines marked # dm are new.

torchrun --nproc-per-node 2 examples/recipes/torchtitan_order.py, or python examples/recipes/torchtitan_order.py
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import torch_depthmup as dm  # dm


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self, depth: int, width: int):
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draws whole tensors and keeps the own shard, so that values do not depend on the number of processes."""
        torch.manual_seed(1)
        for parameter in self.parameters():
            parameter.zero_()
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Linear):
                whole = 0.02 * torch.randn(module.weight.shape)
                if isinstance(module.weight, DTensor):
                    whole = distribute_tensor(whole, module.weight.device_mesh, module.weight.placements)
                module.weight.copy_(whole)


def sharded() -> Network:
    with torch.device("meta"):
        model = Network(8, 64)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model.to_empty(device="cpu")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    labels = inputs[:, :4].argmax(1)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        dm.clip_grad_norm_(model.parameters(), 1.0)  # dm: in place of torch's
        optimizer.step()
    return float(loss.detach())


def run(folder: Path) -> None:
    base = Network(2, 16)
    base.initialize()
    with torch.device("meta"):
        shape = Network(8, 64)
    plan = dm.plan(shape, base=base, example_inputs=torch.randn(2, 8))  # dm: before sharding
    model = sharded()
    model.initialize()
    plan = dm.apply(model, plan)  # dm: once there are values; what it found is in the plan that it returns
    optimizer = dm.AdamW(model.parameters(), lr=3e-3)  # dm
    losses = [train(model, optimizer, 1), train(model, optimizer, 20)]
    values, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": values, "optimizer": state}, checkpoint_id=folder / "shards")
    if distributed.get_rank() == 0:
        (folder / "plan.json").write_text(plan.to_json())  # dm
    distributed.barrier()

    resumed = sharded()
    dm.attach(resumed, dm.Plan.from_json((folder / "plan.json").read_text()))  # dm: the values are scaled already
    optimizer = dm.AdamW(resumed.parameters(), lr=3e-3)  # dm
    values, state = get_state_dict(resumed, optimizer)
    checkpoint.load({"model": values, "optimizer": state}, checkpoint_id=folder / "shards")
    set_state_dict(resumed, optimizer, model_state_dict=values, optim_state_dict=state)
    losses.append(train(resumed, optimizer, 20))
    if distributed.get_rank() == 0:
        print("loss", *(f"{loss:.6f}" for loss in losses))
    assert losses[0] > losses[1] > losses[2]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if "RANK" in os.environ:
            distributed.init_process_group("gloo")
        else:
            distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        shared = [folder]
        distributed.broadcast_object_list(shared)
        run(Path(shared[0]))
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
