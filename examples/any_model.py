"""Three models nobody here wrote: their branches, the plan in one call, and what cannot be folded. Ten seconds.

    python examples/any_model.py

Uses torchvision, timm or transformers where installed, and PyTorch's own transformer otherwise.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

import torch_depthmup as dm


def encoder(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def main() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 5, 64)
    model = encoder(12)
    for branch in dm.find_branches(model, tokens)[:2]:
        print(branch, "\n")
    print(dm.parametrize(model, base=encoder(2), example_inputs=tokens), "\n")
    print(dm.plan_of(model).explain("layers.7.linear2.weight"), "\n")
    if importlib.util.find_spec("timm"):
        try:
            import timm
        except RuntimeError as error:  # torchvision built for CUDA beside a CPU-only torch
            print(f"timm does not import here: {error}")
            return
        images = torch.randn(2, 3, 64, 64)
        vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=12)
        base = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4)
        print(dm.parametrize(vit, base=base, example_inputs=images), "\n")
        gated = timm.create_model("seresnet50")
        try:
            dm.parametrize(gated, depth_multiplier=2, example_inputs=images)
        except dm.DepthMuPError as error:
            print(f"fold is refused where a gate comes last:\n  {error}\n")
        dm.parametrize(gated, depth_multiplier=2, example_inputs=images, how="wrap")
        print("wrap works: ", dm.plan_of(gated).how)


if __name__ == "__main__":
    main()
