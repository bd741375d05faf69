"""DeepSpeed with ZeRO: it clips by itself, so wrap; its WarmupLR writes one rate into all groups, so the unscaled view.

    DS_ACCELERATOR=cpu python examples/recipes/deepspeed_engine.py

Lines marked # dm are new.
"""

import os

import deepspeed
import torch
from deepspeed.runtime.lr_schedules import WarmupLR
from torch import nn

import torch_depthmup as dm  # dm

CONFIG = {
    "train_micro_batch_size_per_gpu": 32,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


def network(depth: int) -> nn.Module:
    blocks = [
        dm.Residual(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 4))


def main() -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)  # without the deepspeed launcher: one process
    os.environ.setdefault("MASTER_PORT", "29517")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(0)
    inputs = torch.randn(128, 8)
    labels = inputs[:, :4].argmax(1)
    model = network(8)
    dm.parametrize(model, base=network(2), example_inputs=inputs[:4], how="wrap")  # dm: before initialize
    optimizer = dm.AdamW(model.parameters(), lr=1e-2)  # dm
    scheduler = WarmupLR(dm.unscaled(optimizer), warmup_max_lr=1e-2, warmup_num_steps=8)  # dm: the base model's rates
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=CONFIG)
    losses = []
    for _ in range(10):
        for rows in torch.randperm(128).split(32):
            loss = nn.functional.cross_entropy(engine(inputs[rows]), labels[rows])
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    rates = {group["lr"] / group["lr_multiplier"] for group in optimizer.param_groups}
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; rates of the base {rates}")
    assert losses[-1] < 0.8 * losses[0] and max(rates) < 1.001 * min(rates)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
