"""Predictions of a user's model beside many networks with matrices that are trained at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from wide import X, Y

from torch_depthmup.diagnostics.nfd import predict
from torch_depthmup.diagnostics.nfd.gaussian import Coupling


class Norms(nn.Module):
    """Pre-norm MLP blocks with biases and a readout in mean-field scale: seeds differ like width^-1/2."""

    def __init__(self, n: int, layer: Callable[[int], nn.Module] = lambda n: nn.Linear(n, n)):
        super().__init__()
        self.stem, self.head = nn.Linear(10, n), nn.Linear(n, 1, bias=False)
        self.up, self.down = (nn.ModuleList(layer(n) for _ in range(2)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(n) for _ in range(2))
        for matrix in (*self.up, *self.down):
            nn.init.normal_(matrix.weight, std=n**-0.5)
            nn.init.normal_(matrix.bias, std=0.5)
        nn.init.normal_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            h = h + down(F.gelu(up(norm(h))))
        return self.head(h) / h.shape[-1]


class OneWay(nn.Linear):
    """A linear layer whose backward pass goes through another start, with the same trained part."""

    def __init__(self, n: int):
        super().__init__(n, n)
        self.register_buffer("start", torch.empty(n, n))
        self.register_buffer("other", torch.randn(n, n) * n**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        back = x @ (self.other + self.weight - self.start).detach().T
        return F.linear(x.detach(), self.weight, self.bias) + back - back.detach()


def one_way(n: int) -> nn.Module:
    model = Norms(n, OneWay)
    for layer in (*model.up, *model.down):
        layer.start.copy_(layer.weight.detach())
    return model


STEPS = 4


def sgd(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr)


def trained(make: Callable[[int], nn.Module], n: int, seeds: int, lr: float) -> Tensor:
    """Outputs of many networks after all steps, (seeds, samples)."""
    torch.manual_seed(n)
    models = [make(n) for _ in range(seeds)]
    params, buffers = stack_module_state(models)

    def output(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], (p, b), (X,))

    slopes = vmap(grad(lambda p, b: F.mse_loss(output(p, b), Y)))
    params = {name: value.detach() for name, value in params.items()}
    for _ in range(STEPS):
        found = slopes(params, buffers)
        params = {name: value - lr * found[name] for name, value in params.items()}
    return vmap(output)(params, buffers)[:, :, 0]


def predicted(n: int, seeds: int, lr: float, coupling: Coupling = "reused") -> Tensor:
    result = predict(Norms, X, Y, width=n, optimizer=sgd(lr), steps=STEPS, seeds=seeds, coupling=coupling)
    return result.outputs[:, -1, :, 0]


def apart(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The difference of means, and its standard error."""
    return one.mean(0) - other.mean(0), (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()


def test_decoupled_predictions_are_those_of_networks_with_an_independent_backward_pass() -> None:
    measured = trained(one_way, 64, 300, lr=0.2)
    gap, error = apart(measured, predicted(64, 24, 0.2, "decoupled"))
    assert float((gap / error).abs().max()) < 4
    gap, error = apart(measured, predicted(64, 12, 0.2))
    assert float((gap / error).abs().min()) > 4


def test_the_mean_of_networks_comes_nearer_like_one_over_width() -> None:
    wide = predicted(8192, 3, 0.02)
    gaps = {}
    for n, seeds in ((16, 400), (64, 1500)):
        gap, error = apart(trained(Norms, n, seeds, lr=0.02), wide)
        gaps[n] = float(gap.norm())
        assert gaps[n] > 3 * float(error.norm()), n  # it is no noise
    assert 2.5 < gaps[16] / gaps[64] < 6.5
