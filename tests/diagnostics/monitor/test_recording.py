"""The monitor against direct computations in float64, and training that does not notice it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import blocks
import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from trained import rms, train

import torch_depthmup as dm
from torch_depthmup.diagnostics.monitor.probe import signed_sum
from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.errors import MeasurementError

BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "pre-norm": blocks.PreNorm,
    "one layer": lambda width: blocks.PreNorm(width, layers=1),
    "layer scale": lambda width: blocks.LayerScale(width, start=0.3),
    "stochastic depth": blocks.StochasticDepth,
    "gated": blocks.Gated,
}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.detach().flatten(1), b.flatten(1), dim=1, eps=1e-300).mean())


class Direct:
    """What the linear and convolution modules of a network and its blocks see and return, by plain hooks."""

    def __init__(self, model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor]):
        model = copy.deepcopy(model).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.modules = dict(model.named_modules())

        def hook(name: str) -> Callable:
            def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                self.inputs[name], self.outputs[name] = args[0].detach(), output
                output.retain_grad()

            return see

        for name, module in model.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                module.register_forward_hook(hook(name))
        self.result = model(x)
        objective(self.result).backward()

    def weight(self, name: str) -> Tensor:
        return self.modules[name].weight.detach()

    def times(self, name: str, weight: Tensor, value: Tensor) -> Tensor:
        module = self.modules[name]
        if isinstance(module, nn.Linear):
            return value @ weight.T
        return nn.functional.conv2d(value, weight, None, module.stride, module.padding)


def check_layer(row: dict, first: Direct, last: Direct, now: Direct, gradient: Tensor | None) -> None:
    name = row["layer"].removesuffix(".weight")
    h0, h = first.inputs[name], now.inputs[name]
    w0, w = first.weight(name), now.weight(name)
    update = now.times(name, w, h) - first.times(name, w0, h0)
    own, below = now.times(name, w - w0, h), now.times(name, w0, h - h0)
    g = now.outputs[name].grad
    expected = {
        "size": rms(now.times(name, w, h)),
        "update": rms(update),
        "change": rms(now.times(name, w, h) - last.times(name, last.weight(name), last.inputs[name])),
        "own": rms(own),
        "initial": rms(now.times(name, w0, h)),
        "below": rms(below),
        "own_share": float((own * update).sum() / update.square().sum()),
        "gradient_alignment": cosine(now.times(name, w0, h), g),
        "gradient": rms(g),
        "weight": float(w.norm()),
        "weight_update": float((w - w0).norm()),
        "weight_gradient": float(gradient.norm()),
    }
    for quantity, value in expected.items():
        assert row[quantity] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), (row["layer"], quantity)


@settings(max_examples=15)
@given(
    block=st.sampled_from(sorted(BLOCKS)),
    depth=st.integers(1, 4),
    samples=st.integers(1, 6),
    width=st.integers(3, 12),
    seed=st.integers(0, 99),
)
def test_every_number_equals_a_direct_computation(block: str, depth: int, samples: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = blocks.Stack(depth, BLOCKS[block], width).double()
    x = torch.randn(samples, 8, dtype=torch.float64)
    first = Direct(model, x, signed_sum)
    with FeatureMonitor(model, x) as monitor:
        train(model, x, 2, monitor)
        last = Direct(model, x, signed_sum)
        monitor.rows.clear()
        train(model, x, 1, monitor)
        now = Direct(model, x, signed_sum)
    layers = [row for row in monitor.rows if row["kind"] == "layer"]
    assert {row["layer"] for row in layers} == {n for n, p in model.named_parameters() if p.ndim == 2}
    for row in layers:
        check_layer(row, first, last, now, model.get_parameter(row["layer"]).grad)
    streams = [row for row in monitor.rows if row["kind"] == "stream"]
    assert [row["position"] for row in streams] == list(range(depth))
    for row in streams:
        name = f"blocks.{row['position']}"
        h, g = now.outputs[name], now.outputs[name].grad
        assert row["branch"].startswith(name) and row["additions"] == depth
        assert row["size"] == pytest.approx(rms(h), rel=1e-9)
        assert row["update"] == pytest.approx(rms(h - first.outputs[name]), rel=1e-9)
        assert row["change"] == pytest.approx(rms(h - last.outputs[name]), rel=1e-9)
        assert row["added"] == pytest.approx(rms(h - now.inputs[name]), rel=1e-9)
        assert row["gradient"] == pytest.approx(rms(g), rel=1e-9)
        assert row["gradient_alignment"] == pytest.approx(cosine(h, g), rel=1e-8, abs=1e-12)
    (function,) = [row for row in monitor.rows if row["kind"] == "function"]
    assert function["size"] == pytest.approx(rms(now.result), rel=1e-9)
    assert function["update"] == pytest.approx(rms(now.result - first.result), rel=1e-9)
    assert function["change"] == pytest.approx(rms(now.result - last.result), rel=1e-9)


def test_convolutions_batch_norms_and_in_place_sums_equal_a_direct_computation() -> None:
    model, x = blocks.BottleneckNet(2).double(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    first = Direct(model, x, signed_sum)
    with FeatureMonitor(model, x) as monitor:
        train(model, x, 2, monitor)
        last = Direct(model, x, signed_sum)
        monitor.rows.clear()
        train(model, x, 1, monitor)
    now = Direct(model, x, signed_sum)
    layers = {row["layer"]: row for row in monitor.rows if row["kind"] == "layer"}
    assert set(layers) == {n for n, p in model.named_parameters() if p.ndim in (2, 4)}
    for row in layers.values():
        check_layer(row, first, last, now, model.get_parameter(row["layer"]).grad)
    for row in monitor.rows:
        if row["kind"] == "stream":  # the sum before the block's ReLU: what the last norm returned, plus the shortcut
            name = f"stages.{row['position']}"
            # bn3's output is overwritten by the sum in place
            assert row["size"] == pytest.approx(rms(now.outputs[f"{name}.bn3"]), rel=1e-9)
            added = nn.functional.batch_norm(
                now.outputs[f"{name}.conv3"], None, None, *now.modules[f"{name}.bn3"].parameters(), True
            )
            assert row["added"] == pytest.approx(rms(added), rel=1e-9)


def test_the_change_of_a_feature_splits_into_its_own_and_what_came_from_below() -> None:
    """own + below = update as vectors, so the law of cosines ties the four numbers together."""
    model, x = blocks.Stack(4, blocks.PreNorm).double(), torch.randn(7, 8, dtype=torch.float64)
    with FeatureMonitor(model, x) as monitor:
        train(model, x, 3, monitor)
    for row in monitor.rows:
        if row["kind"] == "layer":
            own, below, update = row["own"], row["below"], row["update"]
            inner = row["own_share"] * update**2  # <own, own + below>
            assert below**2 == pytest.approx(update**2 - 2 * inner + own**2, rel=1e-8, abs=1e-15)
            assert row["own_share"] == pytest.approx(1.0) or row["layer"] != "stem.weight"


def test_packed_attention_weights_and_functional_code_are_seen() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).double()
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    monitor = FeatureMonitor(encoder, x)
    packed = "layers.1.self_attn.in_proj_weight"
    assert packed in monitor.layers and "layers.1.self_attn.out_proj.weight" in monitor.layers
    before = encoder.layers[1].self_attn.in_proj_weight.detach().clone()
    with torch.no_grad():
        encoder.layers[1].self_attn.in_proj_weight.add_(torch.randn(24, 8, dtype=torch.float64))
    inputs = []
    handle = encoder.layers[1].self_attn.register_forward_hook(lambda m, a, o: inputs.append(a[0]))
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    encoder(x)
    handle.remove()
    encoder.eval()
    monitor.record(0)
    (row,) = [row for row in monitor.rows if row["layer"] == packed]
    own = inputs[0] @ (encoder.layers[1].self_attn.in_proj_weight - before).T
    assert row["own"] == pytest.approx(rms(own), rel=1e-9) and row["below"] == pytest.approx(0, abs=1e-12)
    assert row["role"] == "inner"

    functional = blocks.Functional(3, 6).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    with FeatureMonitor(functional, x, layers="inner.*") as monitor:
        start = functional.inner[0].detach().clone()
        with torch.no_grad():
            functional.inner[0].mul_(1.5)
        monitor.record(0)
    assert [row["layer"] for row in monitor.rows if row["kind"] == "layer"] == ["inner.0", "inner.1", "inner.2"]
    (row,) = [row for row in monitor.rows if row["layer"] == "inner.0"]
    assert row["own"] == pytest.approx(rms((x @ functional.stem.T) @ (0.5 * start).T), rel=1e-9)


class Masked(nn.Linear):
    """A linear layer some of whose weights are cut, by a buffer."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.arange(outputs)[:, None] + torch.arange(inputs)) % 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


BUFFERED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(12, 24)), "parametrizations.weight.original"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(12, 24)), "weight_orig"),
    "a mask": (lambda: Masked(12, 24), "weight"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(12, 24), "weight", 0.5), "weight_orig"),
}


@pytest.mark.parametrize("kind", BUFFERED)
def test_weights_that_are_computed_with_buffers_are_seen(kind: str) -> None:
    make, weight = BUFFERED[kind]
    model, x = blocks.Stack(2, blocks.PreNorm).double(), torch.randn(7, 8, dtype=torch.float64)
    model.blocks[1].fc1 = make().double()
    with FeatureMonitor(model, x) as monitor:
        train(model, x, 3, monitor)
    inputs = {}
    model.eval().blocks[1].fc1.register_forward_hook(lambda module, args, output: inputs.update(h=args[0]))
    model(x)
    (row,) = [row for row in monitor.rows if row["layer"] == f"blocks.1.fc1.{weight}"][-1:]
    fc1 = model.blocks[1].fc1
    assert row["size"] == pytest.approx(rms(fc1(inputs["h"]) - fc1.bias), rel=1e-9)


@settings(max_examples=12)
@given(
    block=st.sampled_from(sorted(BLOCKS)),
    depth=st.integers(1, 4),
    every=st.integers(1, 3),
    seed=st.integers(0, 99),
    dropout=st.booleans(),
)
def test_training_does_not_notice_a_monitor(block: str, depth: int, every: int, seed: int, dropout: bool) -> None:
    def run(watch: bool) -> tuple[list[float], dict[str, Tensor], Tensor]:
        torch.manual_seed(seed)
        model = blocks.Stack(depth, BLOCKS[block])
        if dropout:
            model.head = nn.Sequential(nn.Dropout(0.4), model.head)
        model.train()
        x = torch.randn(6, 8)
        monitors = [FeatureMonitor(model, x[:3], every=every), FeatureMonitor(model, x[2:])] if watch else []
        both = type("Both", (), {"record": staticmethod(lambda step: [m.record(step) for m in monitors])})
        losses = train(model, x, 4, both)  # type: ignore[arg-type]
        return losses, model.state_dict(), torch.rand(3)

    (losses, state, random), (watched_losses, watched_state, watched_random) = run(False), run(True)
    assert losses == watched_losses
    assert all(torch.equal(state[name], watched_state[name]) for name in state)
    assert torch.equal(random, watched_random)


def test_a_recording_leaves_batch_norm_mode_gradients_hooks_and_graphs_alone() -> None:
    model, x = blocks.BottleneckNet(2), torch.randn(4, 3, 8, 8)
    model.stages[1].eval()
    loss = model(x).square().sum()  # a graph that waits for its backward pass while the monitor records
    modes = [module.training for module in model.modules()]
    buffers = {name: (id(buffer), buffer.clone(), buffer._version) for name, buffer in model.named_buffers()}
    frozen = model.head.bias.requires_grad_(False)
    with FeatureMonitor(model, x) as monitor, torch.no_grad():
        monitor.record(0)
    assert [module.training for module in model.modules()] == modes
    for name, buffer in model.named_buffers():
        was, value, version = buffers[name]
        assert id(buffer) == was and torch.equal(buffer, value) and buffer._version == version, name
    assert all(parameter.grad is None for parameter in model.parameters()) and not frozen.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    loss.backward()


def test_autocast_around_the_record_changes_nothing() -> None:
    model, x = blocks.Stack(2, blocks.PreNorm), torch.randn(4, 8)
    plain, cast = FeatureMonitor(model, x), FeatureMonitor(model, x)
    train(model, x, 1)
    plain.record(0)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)  # fills autocast's cache of weights
        cast.record(0)
        assert torch.is_autocast_enabled("cpu")
    assert repr(plain.rows) == repr(cast.rows)


def test_a_compiled_model_gives_the_numbers_of_the_module_inside() -> None:
    model, x = blocks.Stack(2, blocks.PreNorm), torch.randn(4, 8)
    compiled = torch.compile(model, backend="eager")
    monitor, through = FeatureMonitor(model, x), FeatureMonitor(compiled, x)
    train(compiled, x, 2)  # type: ignore[arg-type]
    monitor.record(0)
    through.record(0)
    assert repr(monitor.rows) == repr(through.rows) and monitor.rows[-1]["update"] > 0
    assert "layer" in {row["kind"] for row in through.rows}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.evidence)])
def test_compiled_training_under_autocast_is_bit_identical_and_compiles_once(backend: str) -> None:
    def run(watch: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, x = blocks.Stack(2, blocks.StochasticDepth), torch.randn(8, 8)
        compiled = torch.compile(model, backend=backend)
        monitor = FeatureMonitor(compiled, x) if watch else None  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        torch._dynamo.utils.counters.clear()
        for step in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = compiled(x).float().square().mean()
                if monitor is not None:
                    monitor.record(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch._dynamo.utils.counters["frames"]["total"] == 1
        return model.state_dict()

    plain, watched = run(False), run(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_half_precision_networks_are_measured_in_single() -> None:
    model, x = blocks.Stack(2, blocks.PreNorm).bfloat16(), torch.randn(4, 8).bfloat16()
    with FeatureMonitor(model, x) as monitor:
        train(model, x, 2, monitor)
    assert all(math.isfinite(row["size"]) and row["size"] > 0 for row in monitor.rows)


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224", "gpt2-lm", "mixtral", "seq2seq"])
def test_every_weight_in_the_branches_of_a_library_model_is_watched(name: str) -> None:
    entry = models.entry(name)
    if not entry.available:
        pytest.skip(f"{entry.requires} is not installed")
    model = entry.build()
    with FeatureMonitor(model, entry.inputs()) as monitor:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        monitor.record(0)
    layers = {row["layer"].partition("#")[0]: row for row in monitor.rows if row["kind"] == "layer"}
    matrices = {n for b in monitor.branches for n in (*b.inner, *b.outer) if model.get_parameter(n).ndim >= 2}
    assert matrices and matrices <= set(layers)
    for row in layers.values():  # (W - W0) h = 0.25 W0 h, whatever the operation
        assert row["own"] == pytest.approx(0.25 * row["initial"], rel=1e-4)
    assert sum(row["kind"] == "stream" for row in monitor.rows) == len(monitor.branches)


def test_gradients_are_those_of_the_objective() -> None:
    model, x = blocks.Stack(2, blocks.PreNorm).double(), torch.randn(4, 8, dtype=torch.float64)
    monitor = FeatureMonitor(model, x, objective=lambda output: 3 * signed_sum(output), device="cpu")
    plain = FeatureMonitor(model, x)
    monitor.record(0)
    plain.record(0)
    for tripled, row in zip(monitor.rows[1:], plain.rows[1:], strict=True):
        assert tripled["gradient"] == pytest.approx(3 * row["gradient"])
        assert tripled["gradient_alignment"] == pytest.approx(row["gradient_alignment"], abs=1e-12)


def test_a_weight_used_twice_is_two_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.fc(self.norm(x))
            return x + self.fc(self.norm(x))

    monitor = FeatureMonitor(Tied(), torch.randn(4, 8))
    assert monitor.layers == ("fc.weight", "fc.weight#1")
    assert len({id(weight) for weight in monitor._weights.values()}) == 1  # kept once


def test_routed_experts_are_watched_when_they_get_other_samples_or_none() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.experts = torch.zeros(3), nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            chosen = (x[:, :3] + self.bias).argmax(1)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                if (chosen == i).any():
                    y = y.index_add(0, (chosen == i).nonzero()[:, 0], expert(x[chosen == i]))
            return x + y

    block = Experts().double()
    x = torch.randn(30, 8, dtype=torch.float64)
    monitor = FeatureMonitor(block, x)
    block.bias = torch.tensor([9.0, 0.0, -9.0])  # all to the first
    change = torch.randn(8, 8, dtype=torch.float64)
    with torch.no_grad():
        block.experts[0].weight.add_(change)
    monitor.record(0)
    (row,) = [row for row in monitor.rows if row["kind"] == "layer"]
    assert row["layer"] == "experts.0.weight" and math.isnan(row["update"]) and math.isnan(row["own_share"])
    assert row["own"] == pytest.approx(rms(x @ change.T), rel=1e-9)


@pytest.mark.parametrize(
    "layers, watched",
    [
        ("blocks.1", ["blocks.1.fc1.weight", "blocks.1.fc2.weight"]),
        ("*.fc1", ["blocks.0.fc1.weight", "blocks.1.fc1.weight"]),
        (["head", "blocks.0.fc2.weight"], ["blocks.0.fc2.weight", "head.weight"]),
        ([], []),
    ],
)
def test_layers_are_named_by_their_weights_or_modules(layers, watched: list[str]) -> None:
    model, x = blocks.Stack(2, blocks.PreNorm), torch.randn(4, 8)
    with FeatureMonitor(model, x, layers=layers) as monitor:
        assert list(monitor.layers) == watched
        monitor.record(0)
    assert [row["layer"] for row in monitor.rows if row["kind"] == "layer"] == watched
    assert sum(row["kind"] == "stream" for row in monitor.rows) == 2


def test_memory_is_one_copy_of_weights_and_one_of_features_until_the_first_record() -> None:
    model, x = blocks.Stack(2, blocks.PreNorm).double(), torch.randn(5, 8, dtype=torch.float64)
    monitor = FeatureMonitor(model, x)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    features = 5 * (12 + 2 * (24 + 12 + 12) + 3 + 3)  # stem, two blocks of fc1, fc2 and the sum, head, output
    assert monitor.memory == 8 * (weights + features)
    train(model, x, 1, monitor)
    assert monitor.memory == 8 * (weights + 2 * features)
    monitor.close()
    assert monitor.memory == 0


def test_a_resumed_monitor_goes_on_as_if_nothing_had_happened(tmp_path) -> None:
    def fresh() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(5)
        return blocks.Stack(2, blocks.LayerScale).double(), torch.randn(4, 8, dtype=torch.float64)

    model, x = fresh()
    straight = FeatureMonitor(model, x)
    train(model, x, 1, straight)
    train(model, x, 1, straight)
    model, x = fresh()
    monitor = FeatureMonitor(model, x)
    train(model, x, 1, monitor)
    torch.save({"model": model.state_dict(), "monitor": monitor.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    torch.manual_seed(6)
    model = blocks.Stack(2, blocks.LayerScale).double()
    model.load_state_dict(saved["model"])
    resumed = FeatureMonitor(model, x)
    resumed.load_state_dict(saved["monitor"])
    train(model, x, 1, resumed)
    assert repr(resumed.rows) == repr(straight.rows)
    with pytest.raises(MeasurementError, match="another model, probe batch"):
        FeatureMonitor(model, x[:2]).load_state_dict(saved["monitor"])
    with pytest.raises(MeasurementError, match="recorded on another probe batch"):
        FeatureMonitor(model, x + 1e-9).load_state_dict(saved["monitor"])


def test_parameters_that_were_replaced_are_found_by_name() -> None:
    model, x = blocks.Stack(2, blocks.PreNorm).double(), torch.randn(4, 8, dtype=torch.float64)
    monitor = FeatureMonitor(model, x)
    train(model, x, 1)
    state = {name: 1.5 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model(x).square().sum().backward()
    monitor.record(0)
    for row in monitor.rows:
        if row["kind"] == "layer":
            assert row["weight"] == pytest.approx(float(state[row["layer"]].norm()))
            assert row["weight_gradient"] == pytest.approx(float(model.get_parameter(row["layer"]).grad.norm()))


def test_a_folded_multiplier_is_in_the_rows() -> None:
    model, x = blocks.Stack(8, blocks.PreNorm), torch.randn(4, 8)
    dm.parametrize(model, depth_multiplier=4, example_inputs=x)
    monitor = FeatureMonitor(model, x)
    monitor.record(0)
    folded = {row["layer"]: row["folded"] for row in monitor.rows if row["kind"] == "layer"}
    assert folded["blocks.3.fc2.weight"] == pytest.approx(0.5) and folded["blocks.3.fc1.weight"] == 1


@pytest.mark.parametrize(
    "message, act",
    [
        (
            "matches no weight operation. Did you mean 'blocks.0.fc2.weight'",
            lambda model, x: FeatureMonitor(model, x, layers="blocks.0.fc9.weight"),
        ),
        ("the probe is on meta", lambda model, x: FeatureMonitor(model, x.to("meta"))),
        ("has no residual branches", lambda _, x: FeatureMonitor(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), x)),
        ("not finite on the probe", lambda model, x: FeatureMonitor(model, x * math.nan)),
        ("every must be a positive integer", lambda model, x: FeatureMonitor(model, x, every=0)),
        ("meta device", lambda model, x: FeatureMonitor(model.to("meta"), x.to("meta"))),
    ],
)
def test_bad_input_is_one_clear_line(message: str, act: Callable[[nn.Module, Tensor], object]) -> None:
    with pytest.raises(dm.DepthMuPError) as caught:
        act(blocks.Stack(2, blocks.PreNorm), torch.randn(4, 8))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_closed_monitor_does_not_record() -> None:
    monitor = FeatureMonitor(blocks.Stack(2, blocks.PreNorm), torch.randn(4, 8))
    monitor.close()
    with pytest.raises(MeasurementError, match="closed"):
        monitor.record(0)


def test_a_network_that_overflows_in_training_is_recorded_not_raised() -> None:
    model, x = blocks.Stack(2, blocks.LayerScale), torch.randn(4, 8)
    with FeatureMonitor(model, x) as monitor:
        with torch.no_grad():
            model.blocks[0].fc2.weight.fill_(math.inf)
        monitor.record(0)
    assert not math.isfinite(monitor.rows[0]["size"])
