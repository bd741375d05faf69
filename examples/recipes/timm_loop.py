"""timm: a vision transformer, layer decay, timm's scheduler with warm-up start and floor, EMA. # dm is new.

python examples/recipes/timm_loop.py
"""

import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import torch_depthmup as dm  # dm


def vit(depth: int) -> torch.nn.Module:
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, in_chans=1, num_classes=4, embed_dim=32, depth=depth, num_heads=2
    )


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(32) % 4
    images = torch.randn(32, 1, 16, 16) * 0.3 + labels[:, None, None, None] * torch.linspace(-1, 1, 16)
    model = vit(8)
    dm.parametrize(model, base=vit(2), example_inputs=images[:4])  # dm
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.9)
    optimizer = dm.AdamW(groups, lr=5e-3)  # dm: in place of create_optimizer_v2
    scheduler = CosineLRScheduler(
        dm.unscaled(optimizer),
        t_initial=20,
        lr_min=1e-5,
        warmup_t=4,
        warmup_lr_init=1e-5,  # dm: unscaled
    )
    average = ModelEmaV3(model, decay=0.9)
    losses = []
    for epoch in range(20):
        scheduler.step(epoch)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        dm.clip_grad_norm_(model, 1.0)  # dm: in place of timm.utils.dispatch_clip_grad
        optimizer.step()
        average.update(model)
        losses.append(float(loss.detach()))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.7 * losses[0]


if __name__ == "__main__":
    main()
