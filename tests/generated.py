"""Random residual networks that write their own truth: which sums are residual, in which stream, and who is inner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = 3

# What a branch computes. Each module says which of its parameters come last: the outer ones.


class Mlp(nn.Module):
    outer = ("fc2",)

    def __init__(self, width: int, read: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width + read, 7), nn.Linear(7, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class Glu(nn.Module):
    outer = ("down",)

    def __init__(self, width: int, read: int):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(i, o) for i, o in ((width + read, 6), (width + read, 6), (6, width)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    outer = ("proj",)

    def __init__(self, width: int, read: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width + read, 12), nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ k.mT / 2 + self.position).softmax(-1) @ v)


class Conv(nn.Module):
    outer = ("conv2", "bn")

    def __init__(self, width: int, read: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(width + read, 5, 3, padding=1), nn.Conv1d(5, width, 1, bias=False)
        self.bn = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(F.relu(self.conv1(x.mT)))).mT


class Experts(nn.Module):
    outer = ("last",)

    def __init__(self, width: int, read: int):
        super().__init__()
        self.router, self.last = nn.Linear(width + read, 2), nn.Linear(6, width)
        self.experts = nn.ModuleList(nn.Linear(width + read, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        return self.last(sum(p[..., i : i + 1] * torch.tanh(e(x)) for i, e in enumerate(self.experts)))


class Direct(nn.Module):
    """A lone sum inside, as a state-space model's."""

    outer = ("out",)

    def __init__(self, width: int, read: int):
        super().__init__()
        self.into, self.mid, self.out = nn.Linear(width + read, 6), nn.Linear(6, 6), nn.Linear(6, width)
        self.direct = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.out(torch.sin(self.mid(h)) + self.direct * h)


class Nested(nn.Module):
    """A stream of its own."""

    outer = ("leave",)

    def __init__(self, width: int, read: int):
        super().__init__()
        self.enter, self.leave = nn.Linear(width + read, 4), nn.Linear(4, width)
        self.inside = nn.ModuleList(Mlp(4, 0) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for f in self.inside:
            h = h + f(h)
        return self.leave(h)


BODIES: dict[str, Callable[[int, int], nn.Module]] = {
    c.__name__: c for c in (Mlp, Glu, Attention, Conv, Experts, Direct, Nested)
}

# Sums, as people write them. f is the branch already multiplied.


def _in_place_on_branch(x: Tensor, f: Tensor) -> Tensor:
    f = f.clone()
    f += x
    return f


def _in_place_on_skip(x: Tensor, f: Tensor) -> Tensor:
    return x.clone().add_(f)


def _on_a_slice(x: Tensor, f: Tensor) -> Tensor:
    y = F.pad(f, (0, 1))[..., : x.shape[-1]]
    y += x
    return y


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plus": lambda x, f: x + f,
    "other order": lambda x, f: f + x,
    "list": lambda x, f: sum([x, f]),
    "alpha": lambda x, f: torch.add(x, f, alpha=0.7),
    "weaker skip": lambda x, f: 0.9 * x + f,
    "stack": lambda x, f: torch.stack([x, f]).sum(0),
    "minus": lambda x, f: x - f,
    "cast": lambda x, f: (x.float() + f.float()).double(),
    "view": lambda x, f: (x.flatten(1) + f.flatten(1)).view(x.shape),
    "in place on the branch": _in_place_on_branch,
    "in place on the skip": _in_place_on_skip,
    "on a slice": _on_a_slice,
}


@dataclass(frozen=True)
class Part:
    """One residual addition: the stream that it adds to, how the branch is made, and how the sum is written."""

    bodies: tuple[str, ...]
    sum: str
    norm: str  # before, after, none
    gain: bool
    modulated: bool
    drop: bool
    second: bool  # adds to the second stream
    reads_other: bool


@dataclass(frozen=True)
class Network:
    """A random network, for any number of layers."""

    parts: tuple[Part, ...]
    second: bool  # there is a second stream, of another width
    position: bool
    long_skips: bool
    injected: bool
    auxiliary: bool
    collected: bool
    decoy: str  # a sum at the end that is none of a skip and a branch

    def build(self, layers: int) -> Generated:
        return Generated(self, layers)


@dataclass
class Truth:
    """A residual addition: its stream, and its parameters by their side."""

    stream: str
    inner: set[str] = field(default_factory=set)
    outer: set[str] = field(default_factory=set)


class Branch(nn.Module):
    """What one part adds, as the value of a module."""

    def __init__(self, part: Part, width: int, other: int):
        super().__init__()
        self.part = part
        read = other if part.reads_other else 0
        self.bodies = nn.ModuleDict({str(i): BODIES[kind](width, read) for i, kind in enumerate(part.bodies)})
        self.norm = nn.LayerNorm(width) if part.norm == "before" else None
        self.gain = nn.Parameter(torch.full((width,), 0.8)) if part.gain else None
        self.modulation = nn.Linear(4, 2 * width) if part.modulated else None
        self.drop = nn.Dropout(0.2) if part.drop else None

    def forward(self, x: Tensor, other: Tensor | None, condition: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        if self.modulation is not None:
            scale, shift = self.modulation(condition)[:, None].chunk(2, -1)
            x = x * (1 + scale) + shift
        if self.part.reads_other and other is not None:
            x = torch.cat([x, other], -1)
        values = [body(x) for body in self.bodies.values()]
        value = values[0] if len(values) == 1 else values[0] + values[1]
        value = value if self.drop is None else self.drop(value)
        return value if self.gain is None else self.gain * value

    def truth(self, prefix: str) -> Truth:
        found = Truth("second" if self.part.second else "first")
        for name, _ in self.named_parameters():
            ends = {f"bodies.{key}.{end}" for key, body in self.bodies.items() for end in body.outer}
            is_outer = name == "gain" or any(name.startswith(f"{end}.") for end in ends)
            (found.outer if is_outer else found.inner).add(f"{prefix}.{name}")
        return found


class Generated(nn.Module):
    """Stem, layers of the same parts, head; ``forward(x, condition, m)`` multiplies each branch at its addition."""

    def __init__(self, network: Network, layers: int, width: int = 6, other: int = 5):
        super().__init__()
        self.network = network
        self.stem, self.head, self.condition = nn.Linear(5, width), nn.Linear(width, 2), nn.Linear(3, 4)
        self.other = nn.Linear(5, other) if network.second else None
        self.position = nn.Parameter(torch.randn(TOKENS, width)) if network.position else None
        self.tap = nn.Linear(width, 2) if network.auxiliary or network.collected else None
        self.decoy = nn.ModuleList(nn.Linear(width, width) for _ in range(2)) if network.decoy != "none" else None
        widths = [(other, width) if part.second else (width, other) for part in network.parts]
        self.layers = nn.ModuleList(
            nn.ModuleList(Branch(part, *w) for part, w in zip(network.parts, widths, strict=True))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(
                nn.LayerNorm(w[0]) if part.norm == "after" else nn.Identity()
                for part, w in zip(network.parts, widths, strict=True)
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor, condition: Tensor, m: float = 1.0) -> tuple[Tensor, ...]:
        network, layers = self.network, len(self.layers)
        condition = torch.sin(self.condition(condition))
        y = None if self.other is None else self.other(x)
        start = x = self.stem(x) if self.position is None else self.stem(x) + self.position
        kept: list[Tensor] = []
        collected: Any = 0
        for i, parts in enumerate(self.layers):
            if network.long_skips and i < layers // 2:
                kept.append(x)
            elif network.long_skips and i >= layers - layers // 2:
                x = x + kept.pop()
            if network.injected:
                x = x + 0.1 * start
            for branch, norm in zip(parts, self.norms[i], strict=True):
                write = SUMS[branch.part.sum]
                if branch.part.second and y is not None:
                    f = branch(y, x, condition)
                    y = norm(write(y, f if m == 1 else m * f))
                else:
                    f = branch(x, y, condition)
                    x = norm(write(x, f if m == 1 else m * f))
            if self.tap is not None and network.collected:
                collected = collected + self.tap(x)
        if self.decoy is not None:
            a, b = (layer(x) for layer in self.decoy)
            x = {"linear": a + b, "gelu": a + 0.1 * a**3, "bias": a + b.mean((0, 1)).detach()}[network.decoy]
        out = self.head(x) if y is None else self.head(x) * y.mean(-1, keepdim=True)
        extra = () if self.tap is None else (collected,) if network.collected else (torch.tanh(self.tap(x)),)
        return out, *extra

    def truth(self) -> list[Truth]:
        """The residual additions in forward order; those inside of branches are left out."""
        return [
            branch.truth(f"layers.{i}.{j}") for i, parts in enumerate(self.layers) for j, branch in enumerate(parts)
        ]


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Networks of one or two streams."""
    second = draw(st.booleans())
    flags = st.booleans()

    def part(in_second: bool) -> Part:
        return Part(
            bodies=tuple(draw(st.lists(st.sampled_from(sorted(BODIES)), min_size=1, max_size=2))),
            sum=draw(st.sampled_from(sorted(SUMS))),
            norm=draw(st.sampled_from(["before", "before", "none", "after"])),
            gain=draw(flags),
            modulated=draw(flags),
            drop=draw(flags),
            second=in_second,
            reads_other=second and draw(flags),
        )

    parts = [part(False) for _ in range(draw(st.integers(1, 2)))] + ([part(True)] if second else [])
    return Network(
        parts=tuple(draw(st.permutations(parts))),
        second=second,
        position=draw(flags),
        long_skips=draw(flags),
        injected=draw(flags),
        auxiliary=draw(flags),
        collected=draw(flags),
        decoy=draw(st.sampled_from(["none", "none", "linear", "gelu", "bias"])),
    )
