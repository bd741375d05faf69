"""A reference loop as in torchvision: SGD, no decay for norms, warm-up and cosine with a floor, EMA, AMP. # dm is new.

python examples/recipes/torchvision_loop.py
"""

import torch
from torch import nn
from torch.optim import lr_scheduler

import torch_depthmup as dm  # dm


class BasicBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def resnet(blocks: int, channels: int = 8) -> nn.Module:
    stem = [nn.Conv2d(1, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    body = [BasicBlock(channels) for _ in range(blocks)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    images = torch.randn(64, 1, 8, 8) * 0.3 + labels[:, None, None, None] * torch.linspace(-1, 1, 8)
    model = resnet(8)
    dm.parametrize(model, base=resnet(2), example_inputs=images[:8])  # dm: before DDP, compile and EMA
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    others = [p for p in model.parameters() if all(p is not q for q in norms)]
    optimizer = dm.SGD(  # dm: in place of torch.optim.SGD
        [{"params": others}, {"params": norms, "weight_decay": 0.0}], lr=0.1, momentum=0.9, weight_decay=1e-4
    )
    scheduled = dm.unscaled(optimizer)  # dm: floors and warm-up starts are the base model's
    warmup = lr_scheduler.LinearLR(scheduled, start_factor=0.1, total_iters=5)
    cosine = lr_scheduler.CosineAnnealingLR(scheduled, T_max=15, eta_min=1e-3)
    scheduler = lr_scheduler.SequentialLR(scheduled, [warmup, cosine], milestones=[5])
    average = torch.optim.swa_utils.AveragedModel(model)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        dm.clip_grad_norm_(model.parameters(), 1.0)  # dm: in place of torch's
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        scheduler.step()
        losses.append(float(loss.detach()))
    floors = {round(group["lr"] / group["lr_multiplier"], 8) for group in optimizer.param_groups}
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; last rates of the base model: {floors}")
    assert losses[-1] < losses[0] and floors == {0.001}


if __name__ == "__main__":
    main()
