"""The network of plain_torch.py in unit-scaling's modules (u-muP): its residual rule, depth rule, readout and loss."""

import unit_scaling as uu
import unit_scaling.functional as U
from torch import Tensor, nn, optim
from unit_scaling.core.functional import transformer_residual_scaling_rule


class Block(nn.Module):
    def __init__(self, width: int, norm: bool, tau: float) -> None:
        super().__init__()
        self.norm = uu.LayerNorm(width, elementwise_affine=True) if norm else nn.Identity()
        self.up, self.down = uu.Linear(width, 2 * width, bias=True), uu.Linear(2 * width, width, bias=True)
        self.tau = tau

    def forward(self, h: Tensor) -> Tensor:
        return U.residual_apply(lambda x: self.down(U.gelu(self.up(self.norm(x)))), h, self.tau)


class Network(nn.Module):
    def __init__(self, depth: int, norm: bool, width: int = 128) -> None:
        super().__init__()
        tau = transformer_residual_scaling_rule()
        self.stem, self.head = uu.Linear(768, width, bias=True), uu.LinearReadout(width, 10, bias=True)
        self.blocks = uu.DepthSequential(*[Block(width, norm, tau(i, depth)) for i in range(depth)])
        self.norm = uu.LayerNorm(width, elementwise_affine=True) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))


loss = U.cross_entropy


def make(depth: int, norm: bool, lr: float) -> tuple[nn.Module, optim.Optimizer]:
    model = Network(depth, norm)
    return model, uu.optim.Adam(model.parameters(), lr=lr)
