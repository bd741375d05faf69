"""fastai: its schedules write one rate into all groups, so it is handed the unscaled view. Lines marked # dm are new.

python examples/recipes/fastai_learner.py
"""

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle  # noqa: F401 (adds itself to Learner)
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_depthmup as dm  # dm


def network(depth: int) -> nn.Module:
    blocks = [
        dm.Residual(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 4))


class Clip(Callback):  # dm: in place of fastai's GradientClip
    def before_step(self) -> None:
        dm.clip_grad_norm_(self.model, 1.0)


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    model = network(8)
    dm.parametrize(model, base=network(2), example_inputs=inputs[:4])  # dm
    optimizer = dm.AdamW(model.parameters(), lr=3e-3)  # dm
    data = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), 32)
    learner = Learner(
        DataLoaders(data, data),
        model,
        loss_func=nn.functional.cross_entropy,
        opt_func=lambda params, **options: OptimWrapper(opt=dm.unscaled(optimizer)),  # dm
        cbs=[Clip()],  # dm
    )
    with learner.no_bar():
        before = learner.validate()[0]
        learner.fit_one_cycle(6, lr_max=1e-2)  # the base model's rates
    rates = {group["lr"] / group["lr_multiplier"] for group in optimizer.param_groups}
    after = learner.validate()[0]
    print(f"loss {before:.3f} -> {after:.3f}; rates of the base {rates}")
    assert after < 0.8 * before and max(rates) < 1.001 * min(rates)


if __name__ == "__main__":
    main()
