"""accelerate: parametrize before prepare, clip with dm after the gradients are synchronised. Lines marked # dm are new.

python examples/recipes/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_depthmup as dm  # dm


def network(depth: int) -> nn.Module:
    blocks = [
        dm.Residual(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 4))


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    inputs = torch.randn(64, 8)
    model = network(8)
    dm.parametrize(model, base=network(2), example_inputs=inputs[:4])  # dm: before prepare
    optimizer = dm.AdamW(model.parameters(), lr=3e-3)  # dm
    data = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), 16)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for _ in range(12):
        for features, labels in data:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(features), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients()
                    dm.clip_grad_norm_(model.parameters(), 1.0)  # dm: in place of accelerator.clip_grad_norm_
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]


if __name__ == "__main__":
    main()
