"""What the plugin costs: paired ratios against plain torch and mup, alternating in one process.

    python examples/benchmarks/overhead.py [--repeats 15] [--threads 1] [--only step|passes]

Each line is the median over pairs of (processor time with the plugin / without), with its quartiles. Forward and
backward on a ResNet-50-shaped and a GPT-2-shaped model, once folded and once wrapped; optimizer steps in shuffled
rounds, four times as many; how many functions a step calls, which no load of the machine changes; time and peak memory
of `dm.parametrize`. The two models are written here at the published shapes.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import platform
import pstats
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mup
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        projects = stride != 1 or channels != out
        self.down = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if projects else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


def resnet50(blocks: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Sequential:
    """ResNet-50: 25.6 M parameters."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers, channels = [], 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for i in range(count):
            layers.append(Bottleneck(channels, width, 2 if stage and not i else 1))
            channels = 4 * width
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.ln_1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 small at a vocabulary of 8192: 12 layers of width 768."""

    def __init__(self, layers: int = 12, width: int = 768, vocabulary: int = 8192):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(1024, width)
        self.h = nn.ModuleList([Layer(width, width // 64) for _ in range(layers)])
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.h:
            x = layer(x)
        return self.head(self.ln_f(x))


def pairs(plain: Callable[[], None], plugin: Callable[[], None], repeats: int) -> list[float]:
    """Ratios of processor time of alternating runs, the order swapped from pair to pair."""
    plain(), plugin()
    ratios = []
    for i in range(repeats):
        times = {}
        for label in ("plain", "plugin") if i % 2 else ("plugin", "plain"):
            start = time.process_time()
            (plain if label == "plain" else plugin)()
            times[label] = time.process_time() - start
        ratios.append(times["plugin"] / times["plain"])
    return ratios


def line(label: str, ratios: list[float]) -> None:
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"{label:<62} {statistics.median(ratios):6.3f}   [{low:.3f}, {high:.3f}]  {len(ratios)} pairs", flush=True)


def train(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(inputs).float().square().mean().backward()

    return run


def peak_memory(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the most resident memory above the start in MB, sampled every millisecond."""
    done = threading.Event()
    start = peak = _resident()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident())

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    action()
    seconds = time.perf_counter() - begin
    done.set()
    thread.join()
    return seconds, (peak - start) / 1e6


def _resident() -> int:
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * 4096 if pages.exists() else 0


def calls(optimizer: torch.optim.Optimizer) -> int:
    """Python and C functions called in one step."""
    with cProfile.Profile() as profile:
        optimizer.step()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def compare_steps(name: str, model: nn.Module, rounds: int) -> None:
    """dm.AdamW beside torch's, torch's with as many groups, and mup's, all over the same weights and gradients.

    A plan gives the parameters several learning rates, so they are in several groups, with or without this package.
    Where no decay is written, mup's constructor takes 0 and torch's 0.01, which is a pass more over the weights: the
    same one is written for all. Which optimizer allocates its moments first changes a step's time by up to 5 %, so each
    is made first once. Time is that of the processor, since other programs run beside.
    """
    mup.set_base_shapes(model, None, do_assert=False)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    options = {"lr": 1e-9, "weight_decay": 1e-2}
    groups = [group["param_names"] for group in dm.AdamW(model.parameters(), **options).param_groups]
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "dm.AdamW": lambda: dm.AdamW(parameters.values(), **options),
        "torch.optim.AdamW": lambda: torch.optim.AdamW(parameters.values(), **options),
        "torch.optim.AdamW in the same groups": lambda: torch.optim.AdamW(
            [{"params": [parameters[name] for name in names]} for names in groups], **options
        ),
        "mup.MuAdamW": lambda: mup.MuAdamW(parameters.values(), **options),
    }
    times: dict[str, list[float]] = {label: [] for label in makers}
    for turn in range(len(makers)):
        labels = [*makers][turn:] + [*makers][:turn]
        optimizers = {label: makers[label]() for label in labels}
        for optimizer in optimizers.values():
            for _ in range(12):  # in the first ones more is looked at
                optimizer.step()
        for _ in range(rounds // len(makers)):
            for label in random.sample(labels, len(labels)):
                start = time.process_time()
                optimizers[label].step()
                times[label].append(time.process_time() - start)
    for label in list(makers)[1:]:
        ratios = [a / b for a, b in zip(times["dm.AdamW"], times[label], strict=True)]
        line(f"{name}: step, dm.AdamW / {label}", ratios)
    print(f"{name}: calls a step: " + ", ".join(f"{label} {calls(made)}" for label, made in optimizers.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="pairs for each line (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--only", choices=["step", "passes"], help="only the optimizer steps, or forward and backward")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads; ratio plugin / plain, quartiles"
    )
    models = {
        "ResNet-50": (resnet50, torch.randn(2, 3, 96, 96), lambda: resnet50((1, 1, 1, 1))),
        "GPT-2": (GPT2, torch.randint(0, 8192, (1, 64)), lambda: GPT2(layers=3)),
    }
    for name, (make, inputs, make_base) in models.items():
        fresh = make()
        plain = copy.deepcopy(fresh)
        for how in ("fold", "wrap"):
            scaled = copy.deepcopy(fresh)
            seconds, memory = peak_memory(lambda m=scaled, b=make_base, x=inputs, h=how: dm.parametrize(
                m, base=b(), example_inputs=x, how=h))  # fmt: skip
            if how == "fold" and options.only != "passes":
                compare_steps(name, copy.deepcopy(scaled), 4 * options.repeats)
            if options.only == "step":
                continue
            size = sum(p.numel() * p.element_size() for p in plain.parameters()) / 1e6
            line(
                f"{name}: forward + backward, {how}",
                pairs(train(plain, inputs), train(scaled, inputs), options.repeats),
            )
            print(f"{name}: parametrize(how={how!r}) {seconds:.2f} s, peak {memory:.0f} MB over {size:.0f} MB")
    blocks = nn.Sequential(
        *[dm.Residual(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))) for _ in range(100)]
    )
    start = time.perf_counter()
    dm.find_branches(blocks, torch.randn(2, 8))
    print(f"find_branches, 100 blocks: {time.perf_counter() - start:.3f} s")


if __name__ == "__main__":
    main()
