"""Residual blocks as people write them, each in a dozen lines, and small networks made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm


class PreNorm(nn.Module):
    """``x + f(norm(x))``, f with one or two layers."""

    def __init__(self, width: int, layers: int = 2, norm: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.fc1 = nn.Linear(width, 2 * width) if layers == 2 else None
        self.fc2 = nn.Linear(2 * width if layers == 2 else width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.fc1 is not None:
            h = F.gelu(self.fc1(h))
        return x + self.fc2(h)


class PostNorm(nn.Module):
    """``norm(x + f(x))``."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fc2(torch.tanh(self.fc1(x))))


class Attention(nn.Module):
    """Single-head self-attention."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1) @ v)


class Parallel(nn.Module):
    """Attention and MLP side by side on one norm: ``x + (a + f)``, or ``(x + a) + f``."""

    def __init__(self, width: int, chained: bool):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.chained = chained

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        a, f = self.attn(n), self.down(F.relu(self.up(n)))
        return (x + a) + f if self.chained else x + (a + f)


class LayerScale(nn.Module):
    """``x + gamma * f(x)`` with a small gain for each channel, and a bias in f."""

    def __init__(self, width: int, start: float = 1e-5):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.fc2(F.silu(self.fc1(x)))


class StochasticDepth(nn.Module):
    """``x + drop_path(f(x))``: in training the branch is dropped for whole samples."""

    def __init__(self, width: int, drop: float = 0.3):
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(width, width), nn.Linear(width, width), drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.relu(self.fc1(x)))
        if self.training:
            keep = 1 - self.drop
            y = y * torch.bernoulli(torch.full((len(x), 1), keep, device=x.device, dtype=x.dtype)) / keep
        return x + y


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 beside an identity or, where the shape changes, a projection shortcut."""

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, stride, 1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, out, 1, bias=False), nn.BatchNorm2d(out)
        changes = stride != 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return F.relu(y)


class Gated(nn.Module):
    """``x + down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class ReZero(nn.Module):
    """``x + alpha * f(x)``, where the scalar alpha starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.fc2(F.relu(self.fc1(x)))


class LoRALinear(nn.Module):
    """``W x + B A x``: a sum of two linear paths, which is no residual addition. B starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2):
        super().__init__()
        self.base, self.a = nn.Linear(inputs, outputs), nn.Linear(inputs, rank, bias=False)
        self.b = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class LoRABlock(nn.Module):
    """A two-layer branch whose first layer is a `LoRALinear`."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = LoRALinear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(x)))


class Functional(nn.Module):
    """A network without submodules: parameters in lists, torch operations, a hand-written GELU."""

    def __init__(self, depth: int, width: int):
        super().__init__()
        self.stem, self.head = nn.Parameter(torch.randn(width, 8) / 3), nn.Parameter(torch.randn(3, width) / 4)
        self.inner = nn.ParameterList([nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(depth)])
        self.outer = nn.ParameterList([nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.stem.T
        for inner, outer in zip(self.inner, self.outer, strict=True):
            h = torch.einsum("bi,oi->bo", x, inner)
            h = 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * h**3)))
            x = torch.add(x, torch.matmul(h, outer.t()))
        return x @ self.head.T


class Stack(nn.Module):
    """Stem, blocks, head on vectors of 8 numbers."""

    def __init__(self, depth: int, block: Callable[[int], nn.Module], width: int = 12):
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList([block(width) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class BottleneckNet(nn.Module):
    """Two stages of bottlenecks; the first block of each changes the shape."""

    def __init__(self, per_stage: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        rest = range(per_stage - 1)
        self.stages = nn.Sequential(
            *(Bottleneck(6, 8), *(Bottleneck(8, 8) for _ in rest)),
            *(Bottleneck(8, 16, 2), *(Bottleneck(16, 16) for _ in rest)),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def plain_mlp(depth: int, rank: int = 2) -> nn.Module:
    """A network of `LoRALinear` layers without any residual branch."""
    layers = [layer for _ in range(depth) for layer in (LoRALinear(8, 8, rank), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8, 3))


class Picture(nn.Module):
    """A convolutional ResNet with batch norm whose head is a 1x1 convolution."""

    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))

    def __init__(self, depth: int, width: int):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 10, 1)
        nn.init.normal_(self.head.weight, std=0.02)  # what it reads out at the start vanishes as 1 / sqrt(width)
        self.blocks = nn.ModuleList([self.Block(width) for _ in range(depth)])
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x))).mean((2, 3))


class Layers(nn.Module):
    """Linear layers a, b, c, d of ``width`` and a function of them: what a block adds to its input."""

    def __init__(self, function: Callable[[Layers, Tensor], Tensor], width: int, **parts: nn.Module):
        super().__init__()
        for name in "abcd":
            setattr(self, name, parts.get(name) or nn.Linear(width, width))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Residuals(nn.Module):
    """Stem, blocks and head; each block adds what its branch gives, times ``m``."""

    def __init__(self, depth: int, branch: Callable[[], nn.Module], width: int = 8):
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(branch() for _ in range(depth))

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            f = block(x)
            x = x + (f if m == 1 else m * f)
        return self.head(x)


def assert_scaled(make: Callable[[int], nn.Module], inputs: tuple, how: str, layers: int = 4) -> dm.Plan:
    """Parametrizes ``make(layers)``: it must be the same network with its branches halved where they are added.

    Its forward takes the factor of the branches as ``m``.
    """
    torch.manual_seed(0)
    model, base = make(layers).eval(), make(layers // 2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = model(*inputs, m=0.5).detach()
    plan = dm.parametrize(
        model, base=base, example_inputs=inputs, how=how, rule="complete-p", initialization="keep"
    )  # what is compared is the act; initial sizes of so small layers differ by chance
    torch.testing.assert_close(model(*inputs).detach(), wanted)
    dm.undo(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name])
    return plan
