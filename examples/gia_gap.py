"""Does the gap that gradient independence leaves in training close with depth? Half a minute.

    python examples/gia_gap.py

Trains the same networks under both couplings, on the same draws, and prints how far the function has moved after four
steps, the gap between the two with its standard error, and the gap in the inner layers' features for two-layer blocks.
"""

from __future__ import annotations

import math

import torch

from torch_depthmup.diagnostics.nfd import Setting, gia_gap


def main() -> None:
    inputs = torch.nn.functional.normalize(torch.randn(2, 10, generator=torch.Generator().manual_seed(0))) * math.sqrt(
        10
    )
    targets = torch.tensor([1.0, -1.0])
    for layers, rule in ((1, "depth-mup-corrected"), (2, "depth-mup"), (2, "depth-mup-corrected"), (2, "complete-p")):
        print(f"blocks of {layers}, {rule}, tanh, 4 steps at lr 1")
        for depth in (8, 32, 128):
            base = 1 if layers == 1 else 8
            setting = Setting(depth=depth, base_depth=base, steps=4, lr=1.0, block_layers=layers, rule=rule)
            gap = gia_gap(setting, inputs, targets, width=4000, seeds=6)
            moved = gap.reused.mean("outputs")[-1, 0, 0] - gap.reused.mean("outputs")[0, 0, 0]
            mean, error = (value[-1, 0, 0] for value in gap.function())
            inner, inner_error = (value[-1].mean() for value in gap.gap("inner_update"))
            print(
                f"  depth {depth:4d}: f moves by {moved:+.3f}, of which {mean:+.3f} ± {error:.3f} is the gap; "
                f"inner features' update differs by {inner:+.4f} ± {inner_error:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
