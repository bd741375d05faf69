"""How long does it take to look at a network? Processor time and the clock, of `dm.find_branches` and `dm.plan`.

    python examples/benchmarks/finding.py [--repeats 5] [--blocks 100]

A pre-norm transformer of many blocks, with values, and transformers' Llama at the shape of its 70 billion parameters,
on ``meta``, with a base of two layers. Each line is the median of the repeats, and their range.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import torch_depthmup as dm


class Block(nn.Module):
    """Attention and MLP, as in GPT-2."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def transformer(blocks: int, width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Embedding(50, width), *(Block(width) for _ in range(blocks)), nn.Linear(width, 50))


def llama(layers: int) -> nn.Module:
    """Llama 3 70B with as many layers as given (80 in the original), on ``meta``."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def measure(label: str, action: Callable[[], object], repeats: int) -> None:
    clock, processor = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        action()
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    parts = [f"{statistics.median(times):6.2f} s [{min(times):.2f}, {max(times):.2f}]" for times in (processor, clock)]
    print(f"{label:44s} processor {parts[0]:24s} clock {parts[1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")

    tokens = torch.arange(16)[None]
    deep, base = transformer(options.blocks), transformer(2)
    name, repeats = f"{options.blocks} blocks", options.repeats
    measure(f"find_branches, {name}", lambda: dm.find_branches(deep, tokens), repeats)
    measure(f"plan, {name}", lambda: dm.plan(deep, base=base, example_inputs=tokens), repeats)

    large, small = llama(80), llama(2)
    inputs = {"input_ids": tokens, "use_cache": False}
    size = sum(parameter.numel() for parameter in large.parameters())
    name = f"Llama of {size / 1e9:.0f} G parameters on meta"
    measure(f"find_branches, {name}", lambda: dm.find_branches(large, inputs), repeats)
    measure(f"plan, {name}", lambda: dm.plan(large, base=small, example_inputs=inputs), repeats)
    print(f"largest memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
