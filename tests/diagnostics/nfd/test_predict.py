"""A user's own model without its hidden matrices, against the same code with them."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from wide import MODELS, WIDTH, Norms, X, Y, dense, sgd

import torch_depthmup as dm
from torch_depthmup.diagnostics.nfd import Setting, implicit_model, predict, simulate
from torch_depthmup.diagnostics.nfd.building import hidden_matrices
from torch_depthmup.diagnostics.nfd.network import CanonicalResNet
from torch_depthmup.errors import DepthMuPError


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_same_code_with_matrices(name: str) -> None:
    make = MODELS[name]
    measured = torch.stack([dense(make, seed) for seed in range(40)])
    predicted = predict(make, X, Y, width=WIDTH, optimizer=sgd, steps=3, seeds=range(100, 140)).outputs
    moved = (measured - measured[:, :1])[:, -1].mean(0)
    assert float(moved.abs().max()) > 0.1
    error = (measured.var(0) / len(measured) + predicted.var(0) / len(predicted)).sqrt()
    assert float(((measured.mean(0) - predicted.mean(0)) / error).abs().max()) < 4


@pytest.mark.parametrize("coupling", ["reused", "decoupled"])
def test_the_canonical_network_is_that_of_the_canonical_solver(coupling) -> None:
    setting = Setting(depth=4, steps=3, lr=2.0, block_layers=2, rule="mup", horizon=0.25)
    wanted = simulate(setting, X, Y, width=500, seeds=60, coupling=coupling).outputs

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0 * 500)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return (output - targets).square().mean() / 2

    found = predict(lambda n: CanonicalResNet(setting, 10, 1, n), X, Y, width=500, optimizer=optimizer, steps=3,
                    loss=loss, seeds=range(20), coupling=coupling).outputs  # fmt: skip
    error = (wanted.var(0) / len(wanted) + found.var(0) / len(found)).sqrt()
    assert float(((wanted.mean(0) - found.mean(0)) / error).abs().max()) < 4


class ByHand(Norms):
    """Its branches can be multiplied."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            h = h + self.factor * down(F.gelu(up(norm(h))))
        return self.head(h)


def by_hand(model: ByHand) -> torch.optim.Optimizer:
    dm.parametrize(model, depth_multiplier=2, example_inputs=X.double(), how="wrap")  # draws the same noise
    dm.undo(model)
    model.factor = math.sqrt(0.5)
    inner = [*model.norms.parameters(), *model.up.parameters()]
    rest = [p for part in (model.stem, model.head, model.down) for p in part.parameters()]
    return torch.optim.SGD([{"params": inner, "lr": 0.005 * math.sqrt(2)}, {"params": rest}], lr=0.005, momentum=0.9)


@pytest.mark.parametrize("multiplier, plain", [(1, Norms), (2, ByHand)])
def test_folded_and_wrapped_multipliers_and_those_written_by_hand_give_the_same_prediction(multiplier, plain) -> None:
    def parametrized(how: str):
        def optimizer(model: nn.Module) -> torch.optim.Optimizer:
            dm.parametrize(model, depth_multiplier=multiplier, example_inputs=X.double(), how=how)
            return dm.SGD(model, lr=0.005, momentum=0.9)

        return optimizer

    def unscaled(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)

    def outputs(make, optimizer) -> Tensor:
        return predict(make, X, Y, width=256, optimizer=optimizer, steps=3, seeds=2, dtype=torch.float64).outputs

    wanted = outputs(plain, unscaled if multiplier == 1 else by_hand)
    assert float((wanted[:, -1] - wanted[:, 0]).abs().max()) > 0.01
    for how in ("fold", "wrap"):
        torch.testing.assert_close(outputs(Norms, parametrized(how)), wanted, rtol=1e-6, atol=1e-8)


def test_the_monitor_watches_it_like_a_network_with_matrices() -> None:
    sizes = {"implicit": [], "dense": []}
    for seed in range(6):
        torch.manual_seed(seed)
        for kind, model in (("dense", Norms(256)), ("implicit", implicit_model(Norms, 256, seed=50 + seed))):
            optimizer = sgd(model)
            monitor = dm.diagnostics.FeatureMonitor(model, probe=X)
            for _ in range(2):
                optimizer.zero_grad()
                F.mse_loss(model(X), Y).backward()
                optimizer.step()
            monitor.record(2)
            frame = monitor.frame()
            sizes[kind].append(frame)
    ours, theirs = sizes["implicit"], sizes["dense"]
    assert list(ours[0].layer) == list(theirs[0].layer) and list(ours[0].kind) == list(theirs[0].kind)
    for column in ("size", "update", "own", "initial", "below", "added", "gradient", "weight", "weight_update"):
        a, b = (torch.tensor([list(frame[column]) for frame in runs], dtype=torch.float64) for runs in (ours, theirs))
        assert torch.equal(a.isnan(), b.isnan()), column
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt() + 1e-3 * b.mean(0)
        far = ((a.mean(0) - b.mean(0)) / error).abs().nan_to_num()
        assert float(far.max()) < 4.5, (column, far)


def test_what_is_hidden_is_what_has_two_widths() -> None:
    assert set(hidden_matrices(Norms, 32)) == {f"{side}.{i}.weight" for side in ("up", "down") for i in range(2)}


@pytest.mark.parametrize(
    "start, std",
    [
        (lambda w: nn.init.normal_(w, std=0.3), 0.3),
        (lambda w: nn.init.uniform_(w, -0.3, 0.3), 0.3 / math.sqrt(3)),
        (lambda w: nn.init.trunc_normal_(w, std=0.3, a=-0.6, b=0.6), 0.3 * 0.87966),
        (lambda w: nn.init.zeros_(w), 0.0),
        (lambda w: w.data.copy_(torch.randn(w.shape) / 4), 0.25),
        (lambda w: w.data.normal_().mul_(0.1), 0.1),
    ],
)
def test_initial_standard_deviations_are_read_off_the_factory(start, std: float) -> None:
    def make(n: int) -> nn.Module:
        model = Norms(n)
        with torch.no_grad():
            start(model.up[0].weight)
        return model

    found = implicit_model(make, 64).up[0].weight.matrix.start.std
    assert found == pytest.approx(std, rel=2e-3, abs=1e-12)


def orthogonal(n: int) -> nn.Module:
    model = Norms(n)
    nn.init.orthogonal_(model.up[0].weight)
    return model


def shifted(n: int) -> nn.Module:
    model = Norms(n)
    nn.init.normal_(model.up[0].weight, mean=0.1)
    return model


def copies(n: int) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(n, 2, 2 * n, batch_first=True), 2)


def changed(change) -> object:
    def make(n: int) -> nn.Module:
        model = Norms(n)
        change(model.up[0])
        return model

    return make


def with_table(n: int) -> nn.Module:
    model = Norms(n)
    model.register_buffer("mask", torch.zeros(n, n))
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (orthogonal, "up.0.weight: its initialization is not one of independent entries"),
        (shifted, "up.0.weight: its entries have mean 0.1"),
        (
            changed(parametrizations.orthogonal),
            "make_model registers a parametrization, by which torch computes a weight",
        ),
        (
            changed(parametrizations.weight_norm),
            "up.0.*original1 is what torch computes a weight from.* Leave that out",
        ),
        (
            changed(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
            "up.0.weight_orig is what torch computes",
        ),
        (changed(lambda layer: nn.init.eye_(layer.weight)), "up.0.weight: its init.* it holds what aten.eye gives"),
        (with_table, "mask of shape .* Take another width"),
        (copies, "layers.1.self_attn.in_proj_weight starts with the same entries as layers.0"),
        (lambda n: Norms(16), "no parameter has two dimensions that change"),
        (lambda n: nn.Sequential(nn.Bilinear(n, n, n)), "0.weight of shape .* experts side by side"),
        (lambda n: Norms(1 // (n - WIDTH)), r"make_model\(128\) fails"),
    ],
)
def test_models_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(DepthMuPError, match=message):
        predict(make, X, Y, width=WIDTH, optimizer=sgd, steps=1, seeds=1)


@pytest.mark.parametrize(
    "make, width, message",
    [
        (Norms, 10**10, r"make_model\(10000000000\) fails without values"),
        (Norms, 3 * 10**7, "would take .* GB and there are 1.0 GB. .*formed"),  # biases
        (lambda n: nn.Sequential(nn.Linear(10, n), *(nn.Linear(n, n) for _ in range(9)), nn.Linear(n, 1)), 10**5,
         "would take .* Take fewer samples"),
        (MODELS["transformer"], 63, "the model of this width fails on the inputs: unflatten"),
    ],
)  # fmt: skip
def test_widths_that_will_not_do_are_told_before_memory_is_taken(monkeypatch, make, width: int, message: str) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 250_000, "SC_PAGE_SIZE": 4000}.get)
    with pytest.raises(DepthMuPError, match=message):
        predict(make, X, Y, width=width, optimizer=sgd, steps=40, seeds=1)


def test_too_little_width_is_refused_with_the_width_that_will_do() -> None:
    with pytest.raises(DepthMuPError, match="3 rows in a pass.*30 steps.*93 of its 64 directions.*2 times"):
        predict(Norms, X, Y, width=64, optimizer=sgd, steps=30, seeds=1)


def test_divergence_is_told() -> None:
    with pytest.raises(DepthMuPError, match="diverged at step"):
        predict(Norms, X, Y, width=512, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e12), steps=8, seeds=1)


class Patchwise(nn.Module):
    """A vision transformer: patches of 4 x 4 pixels, a class token, one of torch's pre-norm layers."""

    def __init__(self, n: int):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, n, 4, 4), nn.Parameter(torch.randn(1, 1, n))
        self.positions = nn.Parameter(0.5 * torch.randn(5, n))
        self.layer = nn.TransformerEncoderLayer(n, 4, 2 * n, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(n), nn.Linear(n, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.patches(x).flatten(2).transpose(1, 2)
        rows = torch.cat([self.token.expand(len(rows), -1, -1), rows], dim=1) + self.positions
        return self.head(self.norm(self.layer(rows))[:, 0])


@pytest.mark.evidence
@pytest.mark.parametrize("width", [256, 512, 1024])
@pytest.mark.parametrize("name", ["biases", "pre-norm", "vision"])
def test_wide_networks_are_predicted(name: str, width: int) -> None:
    make = {**MODELS, "vision": Patchwise}[name]
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) if name == "vision" else X

    def slow(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=4.0 / width)

    measured = torch.stack([dense(make, seed, 3, width, slow, x) for seed in range(24)])
    predicted = predict(make, x, Y, width=width, optimizer=slow, steps=3, seeds=range(100, 124)).outputs
    assert float((measured[:, -1] - measured[:, 0]).mean(0).abs().max()) > 0.1
    error = (measured.var(0) / len(measured) + predicted.var(0) / len(predicted)).sqrt()
    assert float(((measured.mean(0) - predicted.mean(0)) / error).abs().max()) < 4


@pytest.mark.evidence
@pytest.mark.parametrize("width", [256, 1024])
def test_the_llama_of_transformers_is_predicted(width: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(n: int) -> nn.Module:
        config = LlamaConfig(vocab_size=50, hidden_size=n, intermediate_size=2 * n, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
                             initializer_range=0.05, use_cache=False)  # fmt: skip
        return LlamaForCausalLM(config)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(output, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())

    x, y = (torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(2))
    runs = []
    for seed in range(16):
        torch.manual_seed(seed)
        model = make(width)
        stepping, outputs = optimizer(model), []
        for _ in range(4):
            output = model(x)
            outputs.append(output.logits.detach().clone())
            stepping.zero_grad()
            loss(output, y).backward()
            stepping.step()
        runs.append(torch.stack(outputs))
    measured = torch.stack(runs)
    predicted = predict(make, x, y, width=width, optimizer=optimizer, steps=3, loss=loss, seeds=range(100, 116)).outputs
    error = (measured.var(0) / 16 + predicted.var(0) / 16).sqrt()
    z = (measured.mean(0) - predicted.mean(0)) / error
    assert float(z.square().mean()) < 1.5  # of 2,400 outputs; a few of so many lie beyond three standard errors
    assert float((z.abs() > 4).float().mean()) < 0.005
