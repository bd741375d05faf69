"""Lightning: the optimizer in configure_optimizers, clipping in configure_gradient_clipping. Lines marked # dm are new.

python examples/recipes/lightning_module.py
"""

import pytorch_lightning as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_depthmup as dm  # dm


def network(depth: int) -> nn.Module:
    blocks = [
        dm.Residual(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 4))


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network(8)
        dm.parametrize(self.net, base=network(2), example_inputs=torch.randn(4, 8))  # dm
        self.losses: list[float] = []

    def training_step(self, batch, index):
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        optimizer = dm.AdamW(self.net.parameters(), lr=3e-3)  # dm
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(dm.unscaled(optimizer), 40, eta_min=1e-4)  # dm: unscaled
        return [optimizer], [scheduler]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        dm.clip_grad_norm_(self.net, gradient_clip_val)  # dm: this method


def main() -> None:
    lightning.seed_everything(0)
    inputs = torch.randn(64, 8)
    data = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), 16)
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=8, gradient_clip_val=1.0, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    assert model.losses[-1] < 0.8 * model.losses[0]


if __name__ == "__main__":
    main()
