"""Makes ``import torchvision`` work beside a CPU-only torch. Import this before torchvision, timm or transformers.

torchvision's wheels are built for CUDA. Beside a CPU-only torch their operator library does not load, and then
``import torchvision`` stops at "operator torchvision::nms does not exist", and timm and transformers with it. Two
declared operators are all that the import asks for; no model here calls them. Without torchvision nothing happens.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

OPERATORS = ("nms", "qnms")
_alive: list[torch.library.Library] = []  # a Library takes its operators with it when it is collected


def make_torchvision_importable() -> None:
    """Loads torchvision's operators or, where they cannot load, declares the two that its import needs."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for folder in spec.submodule_search_locations or ():
        for library in (*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                continue
            return
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _alive.append(fragment)


make_torchvision_importable()
