"""Tensors that are not dense, real and of single precision: sparse, ragged, complex, double."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from blocks import Layers, Residuals, assert_scaled
from torch import Tensor, nn

import torch_depthmup as dm

pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested:UserWarning")

N, NODES = 8, 6
G = torch.Generator().manual_seed(0)
X = torch.randn(NODES, 5, generator=G)
EDGES = torch.softmax(torch.randn(NODES, NODES, generator=G), -1) * (torch.rand(NODES, NODES, generator=G) < 0.6)


def repeated(edges: Tensor) -> Tensor:
    """Every entry in two halves, as edges that are listed twice."""
    entries = edges.to_sparse()
    return torch.sparse_coo_tensor(entries.indices().repeat(1, 2), entries.values().repeat(2) / 2, edges.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "coo, repeated": repeated,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda edges: edges.to_sparse_bsr((2, 2)),
    "dense": lambda edges: edges,
}


class GraphNet(nn.Module):
    """Message passing over a fixed or given graph."""

    def __init__(self, depth: int, layout: str, way: str):
        super().__init__()
        self.stem, self.head = nn.Linear(5, N), nn.Linear(N, 3)
        self.ups, self.downs = (nn.ModuleList(nn.Linear(N, N) for _ in range(depth)) for _ in range(2))
        self.way = way
        self.register_buffer("edges", LAYOUTS[layout](EDGES))

    def forward(self, x: Tensor, edges: Tensor | None = None, m: float = 1.0) -> Tensor:
        edges, x = self.edges if edges is None else edges, self.stem(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            if self.way == "inside":
                f = down(torch.relu(torch.sparse.mm(edges, up(x)) if edges.layout != torch.strided else edges @ up(x)))
            elif self.way == "last":
                f = edges @ down(torch.relu(up(x)))
            else:
                x = torch.sparse.addmm(x, edges, down(torch.relu(up(x))), alpha=m)
                continue
            x = x + (f if m == 1 else m * f)
        return self.head(x)


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("way", ["inside", "last", "fused"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_of_any_layout_is_a_constant(layout: str, way: str, how: str) -> None:
    if layout == "dense" and way == "fused":
        return  # torch.addmm, as any dense matrix
    plan = assert_scaled(lambda depth: GraphNet(depth, layout, way), (X,), how)
    assert set(plan.branches[0].carrier) == {"downs.0.weight", "downs.0.bias"}
    assert [(branch.levels, branch.additions) for branch in plan.branches] == [(2, 4)] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_may_be_an_input(layout: str) -> None:
    for way in ("inside", "last"):
        plan = assert_scaled(lambda depth, way=way: GraphNet(depth, "coo", way), (X, LAYOUTS[layout](EDGES)), "fold")
        assert {branch.levels for branch in plan.branches} == {2}


class Features(GraphNet):
    """Sparse features instead of sparse edges: the first layer is a product of a constant and a weight."""

    def forward(self, x: Tensor, edges: Tensor | None = None, m: float = 1.0) -> Tensor:
        x = torch.sparse.mm(x, self.stem.weight.T)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + m * down(torch.relu(up(x)))
        return self.head(x)


def test_sparse_features_are_data() -> None:
    plan = assert_scaled(lambda depth: Features(depth, "coo", "inside"), (X.relu().to_sparse(),), "fold")
    assert [branch.levels for branch in plan.branches] == [2] * 4


# Ragged


class Ragged(nn.Module):
    """A pre-norm transformer on sequences of different lengths."""

    def __init__(self, depth: int, gives: str = "nested"):
        super().__init__()
        self.stem, self.head, self.gives = nn.Linear(5, N), nn.Linear(N, 3), gives
        self.norms = nn.ModuleList(nn.LayerNorm(N) for _ in range(depth))
        self.q, self.k, self.v, self.outs = (nn.ModuleList(nn.Linear(N, N) for _ in range(depth)) for _ in range(4))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(N, 12), nn.GELU(), nn.Linear(12, N)) for _ in range(depth))

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        x = self.stem(x)
        for norm, *qkv, out, mlp in zip(self.norms, self.q, self.k, self.v, self.outs, self.mlps, strict=True):
            q, k, v = (layer(norm(x)).unflatten(-1, (2, N // 2)).transpose(1, 2) for layer in qkv)
            f = out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
            x = x + (f if m == 1 else m * f)
            f = mlp(x)
            x = x + (f if m == 1 else m * f)
        x = self.head(x)
        return x if self.gives == "nested" else x.values() if self.gives == "values" else x.to_padded_tensor(0.0)


class Entering(Ragged):
    """Makes the ragged tensor itself."""

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        return super().forward(torch.nested.as_nested_tensor([x[0, :2], x[1, :4]], layout=torch.jagged), m)


SEQUENCES = [torch.randn(length, 5, generator=G) for length in (3, 5, 2)]


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("kind", [Ragged, Entering])
@pytest.mark.parametrize("gives", ["values", "padded"])
def test_sequences_of_different_lengths_are_read(kind: type[Ragged], gives: str, how: str) -> None:
    inputs = torch.nested.nested_tensor(SEQUENCES, layout=torch.jagged) if kind is Ragged else X[None].repeat(2, 1, 1)
    plan = assert_scaled(lambda depth: kind(depth, gives), (inputs,), how)
    assert [(branch.levels, branch.additions) for branch in plan.branches] == [(2, 8)] * 8
    assert plan["k.1.weight"].role == "inner" and plan["outs.1.weight"].role == "outer"


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_ragged_outputs_are_compared_too(layout: torch.layout) -> None:
    inputs = torch.nested.nested_tensor(SEQUENCES, layout=layout)
    blocks = [nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 5)) for _ in range(4)]
    model = nn.Sequential(*map(dm.Residual, blocks))
    plain = [part.clone() for part in model(inputs).unbind()]
    dm.parametrize(model, depth_multiplier=2, example_inputs=inputs, rule="complete-p")
    assert not any(torch.allclose(a, b) for a, b in zip(model(inputs).unbind(), plain, strict=True))
    dm.undo(model)
    torch.testing.assert_close(list(model(inputs).unbind()), plain)


# Complex, double


class ComplexLinear(nn.Module):
    def __init__(self, kind: torch.dtype):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(N, N, dtype=kind) / N**0.5)
        self.offset = nn.Parameter(torch.randn(N, dtype=kind) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.offset


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "parts": lambda z: torch.complex(z.real.relu(), z.imag.relu()),
    "size": lambda z: torch.relu(z.abs() - 0.1) * torch.sgn(z),
    "tanh": torch.tanh,
}


class Complex(nn.Module):
    def __init__(self, depth: int, kind: torch.dtype, activation: str, real: bool):
        super().__init__()
        self.stem = nn.Linear(5, N, dtype=kind)
        self.ups, self.downs = (nn.ModuleList(ComplexLinear(kind) for _ in range(depth)) for _ in range(2))
        self.activation, self.real = ACTIVATIONS[activation], real

    def forward(self, x: Tensor, m: float = 1.0) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + m * down(self.activation(up(x)))
        return x.abs() if self.real else x


@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [torch.complex64, torch.complex128])
def test_complex_numbers_are_read_and_compared(kind: torch.dtype, activation: str, how: str) -> None:
    for real in (False, True):
        inputs = (X.to(kind) * (1 + 0.5j),)
        plan = assert_scaled(lambda depth, real=real: Complex(depth, kind, activation, real), inputs, how)
        assert set(plan.branches[0].carrier) == {"downs.0.matrix", "downs.0.offset"}


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_another_default_precision_is_the_users_own_affair(kind: torch.dtype) -> None:
    def make(depth: int) -> nn.Module:
        model = Residuals(depth, lambda: Layers(lambda self, x: self.b(torch.tanh(self.a(x))), 24), 24)
        nn.init.zeros_(model.blocks[0].b.weight)  # measured with values of our own
        nn.init.zeros_(model.blocks[0].b.bias)
        return model

    torch.set_default_dtype(kind)
    try:
        model, inputs = make(4), X.to(kind)
        dm.parametrize(model, base=make(2), example_inputs=inputs)
        model(inputs).square().mean().backward()
        dm.AdamW(model.parameters(), lr=1e-3).step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(parameter.dtype is kind for parameter in model.parameters())
