"""skorch: an initialized module, dm's constructor as the optimizer, dm's clipping as a callback. # dm is new.

python examples/recipes/skorch_net.py
"""

import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from torch import nn

import torch_depthmup as dm  # dm


def network(depth: int) -> nn.Module:
    blocks = [
        dm.Residual(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 4))


class Clip(Callback):
    def on_grad_computed(self, net, named_parameters, **rest):
        dm.clip_grad_norm_(net.module_, 1.0)  # dm: in place of skorch's GradientNormClipping


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    model = network(8)
    dm.parametrize(model, base=network(2), example_inputs=inputs[:4])  # dm
    net = NeuralNetClassifier(
        model, criterion=nn.CrossEntropyLoss, optimizer=dm.AdamW, lr=3e-3, max_epochs=12, batch_size=16,  # dm
        train_split=None, callbacks=[Clip()], verbose=0,
    )  # fmt: skip
    net.fit(inputs.numpy(), inputs[:, :4].argmax(1).numpy())
    losses = net.history[:, "train_loss"]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]


if __name__ == "__main__":
    main()
