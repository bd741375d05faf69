"""Tune a stock Llama of transformers at 2 layers x 64, train it at 12 layers x 256 with that learning rate.

    pip install '.[demo]' transformers && python examples/transfer_llm.py

The text is the language reference of Python, which its standard library ships; its characters are the tokens. Each
model starts as transformers starts it, and is trained with and without the plugin. The loss is that of a tenth of the
text that was not trained on. Prints a table, and writes transfer_llm.csv beside this file and figures/transfer_llm.png:
about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import torch_depthmup as dm

HERE = Path(__file__).parent
BASE, TARGET = (2, 64), (12, 256)
BATCH, LENGTH = 16, 16


@dataclass(frozen=True)
class Run:
    layers: int
    width: int
    plugin: bool
    lr: float
    seed: int
    steps: int

    @property
    def size(self) -> tuple[int, int]:
        return self.layers, self.width


def characters() -> tuple[Tensor, Tensor, int]:
    """Nine tenths of the text to train on, the last tenth to measure on, and the number of different characters."""
    text = "".join(topics[key] for key in sorted(topics))
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])
    held_out = len(tokens) // 10
    return tokens[:-held_out], tokens[-held_out:], len(number)


def batch(tokens: Tensor, size: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - LENGTH, (size, 1), generator=generator)
    return tokens[starts + torch.arange(LENGTH)]


def llama(layers: int, width: int, vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            use_cache=False,
        )
    )


def train(run: Run) -> float:
    """The loss on held-out text after the run's steps; the learning rate falls linearly to 0."""
    torch.set_num_threads(1)
    training, held_out, vocabulary = characters()
    torch.manual_seed(run.seed)
    model, base = llama(*run.size, vocabulary), llama(*BASE, vocabulary)
    generator = torch.Generator().manual_seed(run.seed)
    if run.plugin:
        dm.parametrize(model, base=base, example_inputs=batch(training, 2, generator))
        optimizer = dm.AdamW(model.parameters(), lr=run.lr)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / run.steps)
    for _ in range(run.steps):
        tokens = batch(training, BATCH, generator)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
    tokens = batch(held_out, 256, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)


def table(losses: dict[Run, float]) -> None:
    rates = sorted({run.lr for run in losses})
    print("held-out loss, median over seeds")
    print(f"{'lr':<26}", *(f"{lr:>8.5f}" for lr in rates))
    for name, line in lines(losses).items():
        best = min(line, key=line.__getitem__)
        print(f"{name:<26}", *(f"{line[lr]:8.3f}" if lr in line else " " * 8 for lr in rates), f"  best lr {best:.5f}")


def lines(losses: dict[Run, float]) -> dict[str, dict[float, float]]:
    """For each setting the median loss at each learning rate."""
    found: dict[str, dict[float, list[float]]] = {}
    for run, loss in losses.items():
        name = f"{run.layers} x {run.width}, {'plugin' if run.plugin else 'plain'}"
        name = f"{run.layers} x {run.width} (base)" if run.size == BASE else name
        found.setdefault(name, {}).setdefault(run.lr, []).append(loss)
    return {name: {lr: median(values) for lr, values in sorted(line.items())} for name, line in found.items()}


def figure(losses: dict[Run, float], path: Path) -> None:
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, line), colour in zip(lines(losses).items(), ("#777777", "#0072b2", "#d55e00"), strict=True):
        axes.plot(list(line), list(line.values()), "o-", color=colour, label=name)
        best = min(line, key=line.__getitem__)
        axes.plot(best, line[best], "o", color=colour, markersize=11, fillstyle="none")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate (ring: the best)")
    axes.set_ylabel("held-out loss, median over seeds")
    axes.set_title("Llama from transformers, characters of Python's reference", fontsize=10)
    axes.legend(frameon=False)
    drawn.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--exponents", type=int, nargs="+", default=range(-11, -5), help="of two, for the learning rate"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR")
    options = parser.parse_args()
    runs = [
        Run(*size, plugin, 2.0**exponent, seed, options.steps)
        for size, plugin in ((BASE, True), (TARGET, True), (TARGET, False))
        for exponent in options.exponents
        for seed in range(options.seeds)
    ]
    losses: dict[Run, float] = {}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for run, loss in zip(runs, pool.map(train, runs), strict=True):
            losses[run] = loss
            print(*astuple(run), f"{loss:.4f}", flush=True)
    with (options.out / "transfer_llm.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in fields(Run)), "loss"])
        writer.writerows([*astuple(run), f"{loss:.4f}"] for run, loss in losses.items())
    table(losses)
    (options.out / "figures").mkdir(exist_ok=True)
    figure(losses, options.out / "figures" / "transfer_llm.png")


if __name__ == "__main__":
    main()
